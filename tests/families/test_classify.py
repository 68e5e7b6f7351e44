"""Family classify: unknown labels, frozen layers, learning rates by layer, mixup, flips and heat maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.base import SingleProcess
from cxr.families.capabilities import Embedder, HeatMaps
from cxr.families.classify import ClassifyRecipe, ClassifyTask, layer_decay_groups
from cxr.families.localize import LocalizeRecipe
from cxr.families.presets import PRESETS, preset
from cxr.models.image_classifier import ImageClassifier
from cxr.training.engine import Engine

FINDINGS = ("Mass", "Nodule", "Hernia")
STILL = {"flip": 0.0, "rotation_deg": 0.0, "max_zoom": 1.0, "translate": 0.0, "exposure": 0.0}
RECIPE = ClassifyRecipe(size=64, batch_size=4, epochs=2, **STILL)  # pyright: ignore[reportArgumentType]
FROZEN: dict[str, Any] = {"backbone_pretrained": "/some/weights.pt"}  # never read here


def batch(labels: list[list[int]] | None = None, seed: int = 0) -> Batch:
    """Noisy images with a bright square, at the middle of the left edge, where they show a Mass."""
    given = torch.tensor(labels or [[1, 0, 0], [0, 1, 0], [1, -1, 0], [0, 0, -1]], dtype=torch.int8)
    pixels = torch.randint(40, 80, (len(given), 64, 64), generator=torch.Generator().manual_seed(seed))
    pixels[given[:, 0] == 1, 24:40, :12] = 230
    return {schema.PIXELS: pixels.to(torch.uint8), schema.LABELS: given}


def batches() -> Iterator[Batch]:
    return iter([batch(), batch(seed=1)])


def task_of(recipe: ClassifyRecipe = RECIPE) -> ClassifyTask:
    torch.manual_seed(0)
    return recipe.task(recipe.network(FINDINGS))


def classifier_of(task: ClassifyTask) -> ImageClassifier:
    assert isinstance(task.network, ImageClassifier)
    return task.network


class Fixed(nn.Module):
    """Returns the same logits for all images."""

    def __init__(self, logits_BF: Tensor) -> None:
        super().__init__()
        self.findings, self.logits_BF = FINDINGS, nn.Parameter(logits_BF)

    def forward(self, _: Tensor) -> Tensor:
        return self.logits_BF


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
def test_unknown_labels_have_no_loss_and_no_gradient(loss: str) -> None:
    labels = torch.tensor([[1, 0, -1], [-1, 0, 1]], dtype=torch.int8)
    network = Fixed(torch.tensor([[0.3, 1.0, 4.0], [2.0, -1.0, -0.5]]))
    task = RECIPE.replace(loss=loss).task(network)
    terms = task({schema.PIXELS: torch.zeros(2, 64, 64), schema.LABELS: labels})
    assert list(terms) == [loss]
    terms[loss].backward()
    assert network.logits_BF.grad is not None
    assert torch.equal(network.logits_BF.grad == 0, labels == schema.UNKNOWN)
    network.logits_BF.data[0, 2] = -7
    other = task({schema.PIXELS: torch.zeros(2, 64, 64), schema.LABELS: labels})
    assert torch.equal(other[loss], terms[loss])


def test_the_cross_entropy_is_that_of_all_classifiers() -> None:
    """The mean over all images and findings, with class weights; see `ClassifierTask.bce`."""
    labels, logits = batch()[schema.LABELS], torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    task = RECIPE.task(Fixed(logits))
    task.class_weight = torch.tensor([[1.0, 1, 1], [2.0, 3, 5]])
    found = task(batch())["bce"]
    torch.testing.assert_close(found, task.bce(logits, labels))


def test_the_loss_of_several_workers_equals_that_of_one() -> None:
    labels, logits = batch()[schema.LABELS], torch.randn(4, 3)

    def loss(rows: slice) -> Tensor:
        task = RECIPE.replace(loss="asymmetric").task(Fixed(logits[rows]))
        return task({schema.PIXELS: torch.zeros(4, 64, 64)[rows], schema.LABELS: labels[rows]})["asymmetric"]

    torch.testing.assert_close((loss(slice(2)) + loss(slice(2, 4))) / 2, loss(slice(4)))


def test_positives_are_weighted_by_their_rarity() -> None:
    task = task_of(RECIPE.replace(pos_weight_power=1.0))
    task.begin(batches, SingleProcess())
    assert task.class_weight.tolist() == [[1, 1, 1], [1, 2, 6]]  # 4 of 8, 2 of 6, and no (counted as 1) of 6


def moved(recipe: ClassifyRecipe) -> tuple[set[str], Engine]:
    """Names of the tensors, parameters and statistics, that an epoch of each stage changed."""
    task = task_of(recipe)
    before = {name: values.clone() for name, values in task.network.state_dict().items()}
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))
    engine.epoch(batches())
    after = task.network.state_dict()
    return {name for name, values in before.items() if not torch.equal(values, after[name])}, engine


def test_a_frozen_backbone_keeps_its_weights_and_statistics() -> None:
    changed, _ = moved(RECIPE.replace(freeze_backbone=True, **FROZEN))
    assert changed == {"head.weight", "head.bias"}


def test_a_frozen_backbone_drops_no_blocks_at_random() -> None:
    recipe = ClassifyRecipe(size=32, backbone="convnext_tiny", freeze_backbone=True, **FROZEN)
    task = task_of(recipe)
    task.enter_stage("")
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        features = [
            task.train(mode).network.get_submodule("backbone")(x.expand(-1, 3, -1, -1)) for mode in (True, False)
        ]
    assert torch.equal(*features)


def test_the_first_layers_can_be_frozen() -> None:
    changed, _ = moved(RECIPE.replace(freeze_layers=3, **FROZEN))  # the stem and two blocks
    stages = {name.split(".")[2] for name in changed if name.startswith("backbone.")}
    assert stages == {"layer3", "layer4"}


def test_freezing_all_layers_is_rejected() -> None:
    recipe = RECIPE.replace(**FROZEN, freeze_layers=100)
    with pytest.raises(
        UserError, match=r"freeze_layers: expected fewer than the \d+ layers of .*; use freeze_backbone"
    ):
        recipe.network(schema.FINDINGS)


def test_a_first_stage_trains_only_the_head() -> None:
    recipe = RECIPE.replace(head_epochs=1)
    assert [stage.name for stage in recipe.stages()] == ["head", "all"]
    changed, engine = moved(recipe)
    assert changed == {"head.weight", "head.bias"}
    engine.enter(recipe.stages()[1])
    engine.epoch(batches())
    assert all(parameter.requires_grad for parameter in engine.task.network.parameters())


def test_learning_rates_fall_from_layer_to_layer_towards_the_input() -> None:
    """The small network has a stem and four blocks: lr · .5^i, where the last block has i = 1."""
    network = classifier_of(task_of())
    groups: list[Any] = layer_decay_groups(network, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    names = {name: id(parameter) for name, parameter in network.named_parameters()}
    assert rate.keys() == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert groups[0]["lr"] == 1.0, "the learning rate that a run reports is the head's"
    expected = {
        "head.weight": 1.0,
        "backbone.body.layer4.0.conv1.weight": 0.5,
        "backbone.body.layer1.0.bn1.bias": 0.0625,
    }
    expected["backbone.body.conv1.weight"] = 0.03125
    assert {name: rate[names[name]] for name in expected} == pytest.approx(expected)
    assert decay[names["backbone.body.conv1.weight"]] == 0.1
    assert decay[names["backbone.body.bn1.weight"]] == decay[names["head.bias"]] == 0


def test_without_decay_all_layers_have_one_learning_rate() -> None:
    groups: list[Any] = layer_decay_groups(classifier_of(task_of()), lr=0.3, weight_decay=0.1, layer_decay=1.0)
    assert [group["lr"] for group in groups] == [0.3, 0.3]


def test_the_schedule_scales_the_learning_rate_of_every_layer() -> None:
    recipe = RECIPE.replace(layer_decay=0.5, warmup=0.5)
    engine = Engine(task_of(recipe), recipe, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))
    rates = torch.tensor(engine.schedule.get_last_lr())
    engine.epoch(batches())
    torch.testing.assert_close(torch.tensor(engine.schedule.get_last_lr()) / rates, torch.full((len(rates),), 2.0))


def test_mixup_changes_labels_only_in_training() -> None:
    recipe = RECIPE.replace(mixup=0.4)
    task, given = task_of(recipe), batch()
    torch.manual_seed(0)
    mixed = task.augment(given)
    assert mixed[schema.LABELS].is_floating_point()
    assert not torch.equal(mixed[schema.LABELS], given[schema.LABELS].float())
    assert given[schema.LABELS].dtype == torch.int8
    assert task(mixed)["bce"].isfinite()
    assert RECIPE.task(task.network).augment(given)[schema.LABELS] is given[schema.LABELS]


def test_mixup_on_one_image_per_worker_has_partners() -> None:
    task = task_of(RECIPE.replace(mixup=1.0))
    alone = [{name: values[i : i + 1] for name, values in batch().items()} for i in range(4)]
    mixed = [task.augment(one)[schema.PIXELS] for one in task.look_ahead(iter(alone))]
    changed = [(one - given[schema.PIXELS] / 255).abs().max() for one, given in zip(mixed, alone, strict=True)]
    assert max(changed) > 0.1


@torch.inference_mode()
def test_probabilities_are_averaged_over_the_mirror_image() -> None:
    task = task_of()
    task.eval()
    given, mirrored = batch(), batch()
    mirrored[schema.PIXELS] = mirrored[schema.PIXELS].flip(-1)
    both = (RECIPE.probabilities(task.network, given) + RECIPE.probabilities(task.network, mirrored)) / 2
    recipe = RECIPE.replace(tta_flip=True)
    torch.testing.assert_close(recipe.probabilities(task.network, given), both)
    torch.testing.assert_close(recipe.probabilities(task.network, mirrored), both)


def learned() -> ClassifyTask:
    """A task that tells images with a bright square from others."""
    recipe = RECIPE.replace(epochs=12, lr=5e-3)
    task = task_of(recipe)
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=4, device=torch.device("cpu"))
    for epoch in range(recipe.epochs):
        engine.epoch(iter([batch(seed=2 + 4 * epoch + step) for step in range(4)]))
    task.eval()
    return task


def test_heat_maps_show_where_a_finding_is_and_peak_at_its_probability(tmp_path: Path) -> None:
    task = learned()
    with torch.inference_mode():
        p = RECIPE.probabilities(task.network, batch())
        heat = RECIPE.heat_maps(task.network, batch())
        pictures = RECIPE.render(task.network, batch())
    assert p[0, 0] > 0.9
    assert p[3, 0] < 0.1
    assert heat.shape == (4, 3, 8, 8)
    assert heat.min() >= 0
    peaks = heat.amax((2, 3))
    assert torch.all(((peaks - p).abs() < 1e-5) | (peaks == 0))
    with torch.inference_mode():
        flipped = RECIPE.replace(tta_flip=True)
        p_flipped, heat_flipped = (f(task.network, batch()) for f in (flipped.probabilities, flipped.heat_maps))
    assert abs(p_flipped[0, 0] - p[0, 0]) > 1e-4, "the image is not symmetric"
    torch.testing.assert_close(heat_flipped[0, 0].max(), p_flipped[0, 0])
    assert (peaks[:, 0] > 0).tolist() == [True, False, True, False], "there is no evidence of an absent finding"
    assert divmod(int(heat[0, 0].argmax()), 8) == (4, 0), "of the rows 3 and 4 and the columns 0 and 1"
    assert pictures["heat"].shape == (4, 64, 64, 3)
    task.save_pictures(batches, tmp_path, list("abcd"))
    assert (tmp_path / "heat_maps.png").stat().st_size > 1000


def test_embeddings_are_the_input_of_the_head() -> None:
    task = task_of(RECIPE.replace(head="attention"))
    task.eval()
    network = classifier_of(task)
    with torch.inference_mode():
        embedding = RECIPE.embed(network, batch())
        torch.testing.assert_close(
            network.head(embedding).sigmoid(), RECIPE.probabilities(network, batch()), rtol=1e-4, atol=1e-5
        )
    assert embedding.shape == (4, network.backbone.width)


def test_classifiers_embed_and_explain() -> None:
    assert isinstance(RECIPE, Embedder)
    assert isinstance(RECIPE, HeatMaps)
    assert isinstance(LocalizeRecipe(), HeatMaps)
    assert not isinstance(LocalizeRecipe(), Embedder)


def test_a_checkpoint_starts_another_training(tmp_path: Path) -> None:
    task = task_of()
    checkpoint.save(tmp_path, RECIPE, task, task.network.state_dict(), findings=FINDINGS, metrics={})
    recipe = RECIPE.replace(backbone_pretrained=str(tmp_path))
    other = recipe.task(recipe.network(("Edema",)))
    other.begin(batches, SingleProcess())
    own, given = other.network.state_dict(), task.network.state_dict()
    assert torch.equal(own["backbone.body.layer4.0.conv1.weight"], given["backbone.body.layer4.0.conv1.weight"])
    assert own["head.weight"].shape == (1, 96)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbone": "cat"}, "backbone: expected small, timm:NAME"),
        ({"input": "cat"}, "input: expected one of"),
        ({"head": "cat"}, "head: expected one of linear"),
        ({"loss": "cat"}, "loss: expected one of bce"),
        ({"freeze_backbone": True}, "without backbone_pretrained"),
        ({"freeze_layers": 2}, "without backbone_pretrained"),
        ({"freeze_backbone": True, "head_epochs": 1, **FROZEN}, "head_epochs: expected 0"),
        ({"layer_decay": 0.0}, "layer_decay: expected"),
        ({"margin": 1.0}, "margin: expected"),
        ({"mixup": -1.0}, "mixup: expected"),
        ({"max_zoom": 0.5}, "max_zoom: expected"),
    ],
)
def test_wrong_settings_are_rejected(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RECIPE.replace(**wrong)


@pytest.mark.parametrize("name", PRESETS["classify"])
def test_presets_describe_networks_that_exist(name: str) -> None:
    recipe = preset(ClassifyRecipe, name)
    with torch.device("meta"):
        network = recipe.network(FINDINGS)
    assert network.head.out_features == 3


def test_a_backbone_that_does_not_exist_is_reported_before_an_archive_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchvision has no network resnet51"):
        ClassifyRecipe(backbone="resnet51").resolve_weights(str(tmp_path))


def test_a_search_chooses_among_sizes_of_the_backbone() -> None:
    space = RECIPE.replace(backbone="densenet169").search_space()
    assert space["backbone"].choices == ("densenet121", "densenet169", "densenet201")  # pyright: ignore
    pretrained = RECIPE.replace(backbone="densenet169", **FROZEN).search_space()
    assert "backbone" not in pretrained
    assert "layer_decay" in pretrained
    assert "layer_decay" not in RECIPE.replace(freeze_backbone=True, **FROZEN).search_space()
