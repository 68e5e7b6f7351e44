"""Classifiers: one channel in, weights by torchvision's names, stems for small images."""

from __future__ import annotations

import pytest
import torch

from cxr.models import perceptual
from cxr.models.classifier import Classifier, ClassifierName, StemStride, load_body, norm_layers


@pytest.mark.parametrize("name", ["densenet121", "resnet18"])
@pytest.mark.parametrize(("stride", "side"), [(4, 1), (2, 2), (1, 4)])
def test_the_stem_has_the_requested_stride(name: ClassifierName, stride: StemStride, side: int) -> None:
    classifier = Classifier(name, 3, stride).eval()
    seen = []
    last = classifier.body.features if name == "densenet121" else classifier.body.layer4
    last.register_forward_hook(lambda *call: seen.append(call[2].shape))
    assert classifier(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    assert seen[0][-1] == side


def test_other_networks_are_rejected() -> None:
    with pytest.raises(ValueError, match="expected one of densenet121"):
        Classifier("alexnet", 3)  # pyright: ignore[reportArgumentType]


def test_weights_of_another_task_are_taken_without_their_head() -> None:
    torch.manual_seed(0)
    one, other = Classifier("resnet18", 1000), Classifier("resnet18", 3)
    head = other.body.fc.weight.clone()
    load_body(other, one.body.state_dict())
    assert torch.equal(other.body.layer4[1].conv2.weight, one.body.layer4[1].conv2.weight)
    assert torch.equal(other.body.fc.weight, head)


def test_weights_are_found_inside_a_checkpoint_with_their_head() -> None:
    torch.manual_seed(0)
    one, other = Classifier("resnet18", 3), Classifier("resnet18", 3, 1)
    state = {f"classifier.{name}": values for name, values in one.state_dict().items()} | {
        "thresholds": torch.ones(3)
    }
    load_body(other, state, head=True)
    assert torch.equal(other.body.fc.weight, one.body.fc.weight)


def test_weights_of_another_network_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"^layer1.0.conv1.weight of .*: expected shape 64 x 64 x 3 x 3, got 1$"):
        load_body(
            Classifier("resnet18", 3),
            Classifier("resnet34", 3).body.state_dict() | {"layer1.0.conv1.weight": torch.ones(1)},
        )


def test_a_classifier_serves_as_perceptual_network() -> None:
    torch.manual_seed(0)
    classifier = Classifier("densenet121", 3)
    state = {f"classifier.{name}": values for name, values in classifier.state_dict().items()}
    features = perceptual.build("densenet121", state, 2)
    shallow = features(torch.rand(1, 1, 32, 32))
    assert [tuple(x.shape[1:]) for x in shallow] == [(64, 16, 16), (128, 4, 4)]
    assert torch.equal(next(features.parameters()), classifier.body.features.conv0.weight)


def test_norm_layers_are_all_found() -> None:
    assert len(norm_layers(Classifier("resnet18", 3))) == 20
