"""AE-CNN: its stages, trained parameters, unknown labels, crops, thresholds and initialization."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.aecnn import AecnnRecipe, AecnnTask, crop_probabilities
from cxr.families.base import SingleProcess
from cxr.families.presets import preset
from cxr.models.aecnn import AECNN, Codec, PublishedCodec, ResidualCodec
from cxr.training.engine import Engine
from cxr.training.worker import stage_at

FINDINGS = ("Mass", "Nodule", "Hernia")
SMALL = AecnnRecipe(size=32, patch=16, width=8, backbone="resnet18", stem_stride=1, rotation_deg=0, flip=0)


def small_network(codec: Codec | None = None) -> AECNN:
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    head = nn.Sequential(norm, nn.Flatten(), nn.Linear(32, len(FINDINGS)))
    return AECNN(codec or ResidualCodec(4, 1, 8), head, FINDINGS)


def batch(labels: list[list[int]] | None = None, size: int = 32) -> Batch:
    """Four images; those with a Mass are brighter. No Hernia."""
    given = torch.tensor(labels or [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.int8)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 140, (len(given), size, size), generator=generator)
    pixels += 100 * (given[:, :1, None] == 1)
    return {schema.PIXELS: pixels.to(torch.uint8), schema.LABELS: given}


def some() -> Iterator[Batch]:
    return iter([batch(), batch()])


def task_in(stage: str, recipe: AecnnRecipe = SMALL, network: AECNN | None = None) -> AecnnTask:
    task = recipe.task(network or small_network())
    task.enter_stage(stage)
    return task


def test_stages_run_from_first_stage_to_last_stage() -> None:
    def names(**changes: object) -> list[str]:
        return [stage.name for stage in SMALL.replace(**changes).stages()]

    assert names() == ["classifier", "autoencoder", "joint"]
    assert names(first_stage="autoencoder") == ["autoencoder", "joint"]
    assert names(first_stage="autoencoder", last_stage="autoencoder") == ["autoencoder"]
    assert names(compressor="none") == ["classifier", "joint"]
    assert SMALL.monitor == "mean_auroc"
    assert SMALL.replace(first_stage="autoencoder", last_stage="autoencoder").monitor == "psnr_pooled"
    assert SMALL.unranked_epochs == SMALL.classifier_epochs + SMALL.autoencoder_epochs
    assert [stage_at(SMALL, epoch).name for epoch in (0, 7, 8, 11, 12, 99)] == [
        "classifier", "classifier", "autoencoder", "autoencoder", "joint", "joint",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"first_stage": "joint", "last_stage": "classifier"}, "no stage"),
        ({"first_stage": "autoencoder", "last_stage": "autoencoder", "compressor": "resize"}, "no stage"),
        ({"compressor": "published", "last_stage": "classifier"}, "untrained"),
        ({"compressor": "published", "compression": 4}, "expected 16 for the published codec"),
        ({"compression": 5}, "compression: expected one of 4, 16, 64, got 5"),
        ({"size": 30}, "multiple of 4"),
        ({"crop": 64}, "at most size=32"),
        ({"bce_weight": 0.0}, "bce_weight: expected a positive number"),
        ({"latent_bits": 12}, "8, 16"),
        ({"patches": 0}, "patches: expected 1 or more"),
        ({"flip": 7.0}, "flip: expected a probability from 0 to 1"),
        ({"classifier_lr": -1.0}, "classifier_lr: expected a positive number"),
        ({"rotation_deg": -5.0}, "rotation_deg: expected 0 or more"),
        ({"depth": 5}, "depth: expected one of 1, 2, 3, 4"),
        ({"backbone": "densenet121", "stem_stride": 2}, "too small for densenet121"),
        ({"start_from": "s3://b/c", "last_stage": "classifier"}, "downsampled images"),
    ],
)
def test_invalid_settings_are_rejected(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SMALL.replace(**wrong)


def test_the_published_preset_has_the_settings_of_the_paper() -> None:
    recipe = preset(AecnnRecipe, "published").replace(backbone="densenet121")
    assert (recipe.size, recipe.crop, recipe.compressor, recipe.tta_crops) == (1024, 896, "published", "ten")
    assert (recipe.mse_weight, recipe.bce_weight, recipe.lr, recipe.weight_decay) == (0.1, 0.9, 1e-4, 1e-5)
    assert isinstance(recipe.replace(backbone="resnet18").network(FINDINGS).codec, PublishedCodec)


@pytest.mark.parametrize(
    ("stage", "terms", "moves"),
    [
        ("classifier", {"bce"}, {"classifier"}),
        ("autoencoder", {"mse"}, {"codec"}),
        ("joint", {"bce", "mse"}, {"classifier", "codec"}),
    ],
)
def test_each_stage_trains_its_parts(stage: str, terms: set[str], moves: set[str]) -> None:
    task = task_in(stage)
    before = {name: p.clone() for name, p in task.network.named_parameters()}
    losses = task(task.augment(batch()))
    assert set(losses) == terms
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.1)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, p in task.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == moves


def test_unknown_labels_do_not_affect_training() -> None:
    task = task_in("joint").eval()
    logits = torch.randn(4, 3, requires_grad=True)
    unknown = batch([[1, 0, 0], [0, -1, 0], [1, 1, 0], [-1, -1, -1]])
    task.bce(logits, unknown[schema.LABELS]).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, unknown[schema.LABELS] == -1)


def test_the_cross_entropy_of_several_workers_equals_that_of_one() -> None:
    task, logits = task_in("joint"), torch.randn(4, 3)
    whole = batch([[1, 0, 0], [0, -1, 0], [1, 1, 0], [-1, -1, -1]])
    parts = [{schema.LABELS: whole[schema.LABELS][rows]} for rows in (slice(2), slice(2, 4))]
    halves = [
        task.bce(logits[rows], part[schema.LABELS]) for rows, part in zip((slice(2), slice(2, 4)), parts, strict=True)
    ]
    assert torch.stack(halves).mean() == pytest.approx(task.bce(logits, whole[schema.LABELS]).item())


def test_pos_weight_power_raises_the_weight_of_rare_findings() -> None:
    task = task_in("joint", SMALL.replace(pos_weight_power=0.5))
    labels = [[1, 1, 0]] + [[1, 0, 0]] * 2 + [[0, 0, 0]] * 6 + [[-1, -1, 0]]
    task.begin(lambda: iter([batch(labels)]), SingleProcess())
    negative, positive = task.class_weight.tolist()
    assert negative == [1, 1, 1]
    assert positive == pytest.approx([math.sqrt(6 / 3), math.sqrt(8 / 1), math.sqrt(10)])


def test_batch_norm_adapts_unless_it_is_frozen() -> None:
    def mean_after_two_epochs(norm_epochs: int | None) -> list[Tensor]:
        recipe = SMALL.replace(batchnorm_calibration_epochs=norm_epochs)
        engine = Engine(
            recipe.task(small_network()), recipe, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu")
        )
        means = []
        for _ in range(2):
            engine.epoch(some())
            engine.finish_epoch(some)
            means.append(engine.task.network.classifier[0][1].running_mean.clone())  # pyright: ignore
        return means

    first, second = mean_after_two_epochs(None)
    assert not torch.equal(first, second)
    first, second = mean_after_two_epochs(1)
    assert torch.equal(first, second)
    assert first.abs().max() > 0


def test_unmeasurable_metrics_are_omitted_and_thresholds_saved() -> None:
    task = task_in("joint").eval()
    metrics = task.evaluate(some, SingleProcess())
    assert metrics["findings_measured"] == 2
    assert "auroc/Hernia" not in metrics
    assert metrics["mean_auroc"] == pytest.approx(np.mean([metrics["auroc/Mass"], metrics["auroc/Nodule"]]))
    kept = task.describe()["thresholds"]
    assert kept["findings"] == list(FINDINGS)
    network = task.network
    assert isinstance(network, AECNN)
    assert network.thresholds.tolist() == pytest.approx(kept["values"])
    assert kept["values"][2] == 0.5
    predicted = SMALL.predict(network, batch())
    assert torch.equal(predicted[schema.DECISIONS].bool(), predicted[schema.PROBABILITIES] >= network.thresholds)


def test_decoded_images_are_compared_with_resized_ones() -> None:
    metrics = task_in("autoencoder").eval().evaluate(some, SingleProcess())
    assert set(metrics) == {"psnr_pooled", "psnr_mean_per_image", "psnr_resized"}
    assert metrics["psnr_pooled"] == pytest.approx(metrics["psnr_resized"], abs=0.1)  # the codec starts as resizing
    assert "psnr_pooled" not in task_in("classifier").eval().evaluate(some, SingleProcess())
    assert "psnr_pooled" not in AecnnTask.evaluate(task_in("joint", SMALL.replace(compressor="none"), SMALL.replace(
        compressor="none").network(FINDINGS)).eval(), some, SingleProcess())  # fmt: skip


def test_the_published_codec_learns_without_clipped_latents() -> None:
    network = small_network(PublishedCodec())
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        network.codec.encoder[2].bias.fill_(5)  # pyright: ignore
    free = task_in("autoencoder", SMALL.replace(compressor="published", clip_latent=False), network)
    clipped = task_in("autoencoder", SMALL.replace(compressor="published"), network)
    assert torch.equal(free.aecnn.decode(free.latent(x)), network.codec.decode(network.codec.encode(x)).clamp(0, 1))
    assert torch.equal(clipped.aecnn.decode(clipped.latent(x)), network.decode(torch.ones(2, 1, 8, 8)))


def test_ten_crops_average_ten_predictions() -> None:
    network, latent = small_network().eval(), torch.rand(2, 1, 10, 10)
    five = [latent[..., a : a + 8, b : b + 8] for a, b in ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))]
    views = five + [view.flip(-1) for view in five]
    expected = torch.stack([network.classifier(view).sigmoid() for view in views]).mean(0)
    assert torch.allclose(crop_probabilities(network, latent, 32, "ten"), expected)
    assert torch.allclose(crop_probabilities(network, latent, 32, "center"), network.classifier(five[0]).sigmoid())


def test_training_starts_from_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SMALL.network(FINDINGS)
    task = SMALL.task(network)
    checkpoint.save(tmp_path, SMALL, task, network.state_dict(), findings=FINDINGS, metrics={})
    again = SMALL.replace(first_stage="joint", start_from=str(tmp_path))
    fresh = again.task(again.network(FINDINGS))
    fresh.begin(some, SingleProcess())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), fresh.network.parameters(), strict=True))
    wider = SMALL.replace(width=16, start_from=str(tmp_path))
    with pytest.raises(ValueError, match="of the network that these settings describe: expected shape 16 x"):
        wider.task(wider.network(FINDINGS)).begin(some, SingleProcess())
    head = SMALL.replace(compressor="none", backbone_pretrained=str(tmp_path))
    head, _ = head.resolve_weights(str(tmp_path / "out"))
    other = head.task(head.network(("Edema",)))
    other.begin(some, SingleProcess())
    body = other.network.classifier.body  # pyright: ignore
    assert torch.equal(body.layer1[0].conv1.weight, network.classifier.body.layer1[0].conv1.weight)  # pyright: ignore


def test_weights_of_another_classifier_are_rejected_before_training(tmp_path: Path) -> None:
    torch.save({"features.conv0.weight": torch.ones(1)}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"none of the .* tensors of the classifier"):
        SMALL.replace(backbone_pretrained=str(tmp_path / "odd.pt")).resolve_weights(str(tmp_path / "out"))


def test_start_from_requires_the_same_findings(tmp_path: Path) -> None:
    network = SMALL.network(FINDINGS)
    checkpoint.save(tmp_path, SMALL, SMALL.task(network), network.state_dict(), findings=FINDINGS, metrics={})
    out = str(tmp_path / "out")
    begun, _ = SMALL.replace(start_from=str(tmp_path)).resolve_weights(out)
    with pytest.raises(
        UserError, match="expected the archive's findings Nodule, Mass, Hernia, got Mass, Nodule, Hernia"
    ):
        begun.task(begun.network(("Nodule", "Mass", "Hernia"))).begin(some, SingleProcess())
    with pytest.raises(UserError, match=r"a checkpoint of family 'aecnn', does not fit: .* expected shape 16 x"):
        SMALL.replace(width=16, start_from=str(tmp_path)).resolve_weights(str(tmp_path / "other"))
    heads = []
    for findings in (FINDINGS, ("Nodule", "Mass", "Hernia")):
        recipe = SMALL.replace(backbone_pretrained=str(tmp_path))
        task = recipe.task(recipe.network(findings))
        task.begin(some, SingleProcess())
        heads.append(torch.equal(task.network.classifier.body.fc.weight, network.classifier.body.fc.weight))  # pyright: ignore
    assert heads == [True, False]


def test_a_search_does_not_sample_settings_that_initial_weights_determine() -> None:
    assert {"backbone", "compression", "depth"} <= set(SMALL.search_space())
    assert not {"backbone", "compression", "depth"} & set(SMALL.replace(start_from="/a/b").search_space())
    assert "backbone" not in SMALL.replace(backbone_pretrained="/a/b").search_space()
    assert set(SMALL.objectives) == {"mean_auroc", "mean_ap", "psnr_pooled"}
    assert set(SMALL.replace(compressor="none").objectives) == {"mean_auroc", "mean_ap"}


TIGHT = {"compressor": "published", "backbone": "resnet18", "stem_stride": 4}  # too small a latent for a DenseNet


@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({"size": 300, "patch": 60}, {"compression": (4, 16)}),
        ({"size": 64, **TIGHT}, {"backbone": ("resnet18",)}),
    ],
)
def test_a_search_does_not_sample_settings_that_exclude_each_other(
    settings: dict[str, object], sampled: dict[str, tuple[object, ...]]
) -> None:
    recipe = AecnnRecipe(**settings)  # pyright: ignore[reportArgumentType]
    drawn = recipe.search_space().items()
    choices = {name: each.choices for name, each in drawn if isinstance(each, CategoricalDistribution)}
    assert {name: choices[name] for name in sampled} == sampled
    for values in itertools.product(*choices.values()):
        recipe.replace(**dict(zip(choices, values, strict=True)))  # raises unless it is valid


def test_every_sampled_network_fits_its_latents() -> None:
    recipe = AecnnRecipe(size=128, width=8, depth=1)
    for compression in (4, 16, 64):
        network = recipe.replace(compression=compression, backbone="densenet121").network(FINDINGS).eval()
        with torch.inference_mode():
            assert network(torch.rand(1, 1, 128, 128))[0].shape == (1, 3)


def test_a_codec_without_classifier_has_no_probabilities() -> None:
    recipe = SMALL.replace(first_stage="autoencoder", last_stage="autoencoder")
    told = recipe.predict(recipe.network(FINDINGS).eval(), batch())
    assert told[schema.PROBABILITIES].isnan().all()
    assert (told[schema.DECISIONS] == schema.UNKNOWN).all()


def test_pictures_show_the_compression_error(tmp_path: Path) -> None:
    task_in("joint").eval().save_pictures(some, tmp_path, list("abcd"))
    assert (tmp_path / "compressed.png").stat().st_size > 1000
