"""Classifiers of X-rays: torchvision's DenseNets and ResNets on single-channel images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor, nn

from cxr.models import pretrained
from cxr.models.input_contract import IMAGENET
from cxr.models.pretrained import Fit

ClassifierName = Literal["densenet121", "densenet169", "densenet201", "resnet18", "resnet34", "resnet50"]
CLASSIFIERS: tuple[ClassifierName, ...] = get_args(ClassifierName)
StemStride = Literal[1, 2, 4]


class Classifier(nn.Module):
    """Images (B, 1, H, W) in [0, 1], of any size, to logits (B, findings).

    The network sees three channels, normalized as torchvision's weights expect.

    Args:
        name: a network of torchvision; the parameters of `body` have its names.
        findings: length of the output.
        stem_stride: factor by which the first layers reduce the image. 4 is the network as published, 2 omits the
            pooling, and 1 also the stride of the first convolution, for images of a few dozen pixels. The same
            pretrained weights fit all three.

    Raises:
        ValueError: there is no such network or stride.
    """

    def __init__(self, name: ClassifierName, findings: int, stem_stride: StemStride = 4) -> None:
        super().__init__()
        if name not in CLASSIFIERS or stem_stride not in get_args(StemStride):
            raise ValueError(
                f"classifier: expected one of {', '.join(CLASSIFIERS)} and a stem_stride of 1, 2 or 4, got {name} "
                f"and {stem_stride}"
            )
        from torchvision import models as torchvision_models  # imported here because it takes seconds

        self.contract = IMAGENET
        self.body = getattr(torchvision_models, name)(weights=None, num_classes=findings)
        _set_stem(self.body, stem_stride)

    def forward(self, x_B1HW: Tensor) -> Tensor:
        return self.body(self.contract.apply(x_B1HW))


def _set_stem(body: nn.Module, stride: StemStride) -> None:
    dense = hasattr(body, "features")
    layers, conv, pool = (body.features, "conv0", "pool0") if dense else (body, "conv1", "maxpool")
    if stride < 4:
        setattr(layers, pool, nn.Identity())
    if stride < 2:
        getattr(layers, conv).stride = (1, 1)


def load_body(classifier: nn.Module, state: Mapping[str, Tensor], *, head: bool = False) -> Fit:
    """Load torchvision's state dict, or that of a network that contains a Classifier.

    Args:
        classifier: a Classifier, or another network whose `body` has torchvision's parameter names.
        head: load the last layer too, whose shape depends on the findings.

    Raises:
        ValueError: the weights do not fit this network.
    """
    return pretrained.load(
        classifier.get_submodule("body"), state, "the classifier", skip=() if head else ("classifier.", "fc.")
    )


def norm_layers(network: nn.Module) -> list[nn.Module]:
    """The batch-norm layers, whose running statistics adapt to the training data."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
