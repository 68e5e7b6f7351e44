"""Ensembles: how families combine predictions, one checkpoint of several, which networks cannot form one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr import schema
from cxr.boxes import ScoredBoxes, wbf
from cxr.data import shards
from cxr.data.shard_loader import ShardStream
from cxr.errors import UserError
from cxr.families import checkpoint, recipe_from_dict
from cxr.families.align import AlignRecipe
from cxr.families.attend import LOGITS
from cxr.families.base import Recipe
from cxr.families.capabilities import Combinable, Embedder, HeatMaps, LatentEncoder, combinable
from cxr.families.checkpoint import Checkpoint
from cxr.families.detect import PREDICTIONS
from cxr.families.ensemble import EnsembleRecipe, join
from cxr.families.localize import HEAT
from cxr.families.segmentation import MASK_VALUES, PIXEL_PROBABILITIES
from cxr.metrics.classification import auroc, choose_thresholds
from cxr.metrics.segmentation.mask_thresholds import choose_rule, rule_rows
from cxr.models.ensemble import Ensemble
from tests.by_family import by_family
from tests.families.test_recipes import SMALL, some_batches
from tests.made_shards import write_shards

CPU = torch.device("cpu")
FINDINGS = ("Mass", "Nodule")
COMBINABLE = by_family(family for family, recipe in SMALL.items() if isinstance(recipe, Combinable))


def known(split: str, number: int) -> Mapping[str, object]:
    bits = np.packbits(np.arange(32 * 32) % 32 < 16).tobytes()
    mask = [{schema.LABEL: label, schema.MASK_BITS: bits} for label in (schema.LUNGS, schema.PNEUMOTHORAX)]
    box = {schema.LABEL: "Mass", "x_min": 4.0, "y_min": 4.0, "x_max": 20.0, "y_max": 20.0}
    frame = {"x_scale": 1.0, "y_scale": 1.0, "x_offset": 0.0, "y_offset": 0.0}
    return {
        schema.LABELS: [number % 2, int(number % 3 == 0)],
        schema.MASKS: mask,
        schema.BOXES: [box] if number % 2 else [],
        schema.RESIZE_TRANSFORM: frame,
        schema.PATIENT_ID: f"{split} {number}",
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    counts = {"train": 4, "val": 24, "test": 4}
    return write_shards(tmp_path_factory.mktemp("shards"), counts, known=known, findings=FINDINGS)


def saved(recipe: Recipe, folder: Path, seed: int, findings: tuple[str, ...] = FINDINGS) -> Checkpoint:
    """An untrained network as a checkpoint."""
    torch.manual_seed(seed)
    network = recipe.network(findings)
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=findings, metrics={})
    return checkpoint.load(str(folder))


def members_of(family: str, tmp_path: Path, count: int = 3) -> list[Checkpoint]:
    recipe = SMALL[family].replace(ema=0.0)
    return [saved(recipe.replace(seed=seed), tmp_path / f"member-{seed}", seed) for seed in range(count)]


def raw(model: Checkpoint) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return combinable(model.recipe).raw_predictions(model.network, next(some_batches()))


@pytest.mark.parametrize("family", COMBINABLE)
def test_an_ensemble_is_one_checkpoint_that_scores_like_its_members_together(
    family: str, made: str, tmp_path: Path
) -> None:
    members = members_of(family, tmp_path)
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    for folder in tmp_path.glob("member-*"):
        for file in folder.iterdir():
            file.unlink()  # the ensemble needs no other checkpoint
    again = checkpoint.load(str(tmp_path / "ensemble"))
    assert again.recipe == ensemble.recipe
    assert again.findings == FINDINGS
    assert recipe_from_dict(json.loads(json.dumps(again.recipe.to_dict()))) == again.recipe
    assert again.recipe.score_columns == SMALL[family].score_columns
    assert again.recipe.monitor in again.about["metrics"]
    card = (tmp_path / "ensemble" / "README.md").read_text()
    assert f"Members: 3 networks of family `{family}`." in card
    assert "Member 2: Settings that differ" in card
    assert isinstance(again.network, Ensemble)
    for own, member in zip(again.network.members, members, strict=True):
        assert all(
            torch.equal(own.state_dict()[name], values) for name, values in member.network.state_dict().items()
        )
    batch = next(some_batches())
    first = combinable(members[0].recipe)
    with torch.inference_mode():
        expected = first.decide(first.combine([raw(member) for member in members]), again.network)
        predicted = again.recipe.predict(again.network, batch)
        pictures = again.recipe.render(again.network, batch)
        single = members[0].recipe.predict(members[0].network, batch)
    assert list(predicted) == list(expected) == list(single)
    for name, values in expected.items():
        assert torch.allclose(predicted[name].float(), values.float(), atol=1e-6, equal_nan=True), name
    assert all(
        images.dtype == torch.uint8 and len(images) == len(batch[schema.PIXELS]) for images in pictures.values()
    )


@pytest.mark.parametrize("family", [pytest.param("aecnn", marks=pytest.mark.slow), "attend", "classify", "localize"])
def test_classifiers_average_probabilities_and_heat_maps(family: str, made: str, tmp_path: Path) -> None:
    members = members_of(family, tmp_path)
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    with torch.inference_mode():
        predicted = ensemble.recipe.predict(ensemble.network, next(some_batches()))
    singles = [raw(member) for member in members]
    mean = sum(single[schema.PROBABILITIES] for single in singles) / 3
    assert torch.allclose(predicted[schema.PROBABILITIES], torch.as_tensor(mean))
    assert not torch.allclose(singles[0][schema.PROBABILITIES], singles[1][schema.PROBABILITIES])
    decided = predicted[schema.PROBABILITIES] >= ensemble.network.get_buffer("thresholds")
    assert torch.equal(predicted[schema.DECISIONS], decided.to(torch.int8))
    if family == "localize":
        heat = np.rint(np.mean([single[HEAT].numpy() for single in singles], axis=0))
        assert np.abs(predicted[HEAT].numpy() - heat).max() <= 1
    if family == "attend":
        cells = sum(single[LOGITS].sigmoid() for single in singles) / 3
        assert torch.allclose(predicted[LOGITS].sigmoid(), torch.as_tensor(cells), atol=1e-6)


def test_heat_maps_are_averaged_and_other_capabilities_end_at_the_members(made: str, tmp_path: Path) -> None:
    members = members_of("classify", tmp_path)
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    batch = next(some_batches())
    assert isinstance(ensemble.recipe, HeatMaps)
    maps = [m.recipe.heat_maps(m.network, batch) for m in members if isinstance(m.recipe, HeatMaps)]
    assert torch.allclose(ensemble.recipe.heat_maps(ensemble.network, batch), torch.stack(maps).mean(0), atol=1e-6)
    assert not isinstance(ensemble.recipe, Embedder | LatentEncoder)
    assert not isinstance(EnsembleRecipe.of([SMALL["lungs"]]), HeatMaps)


@pytest.mark.parametrize("family", ["lungs", pytest.param("pneumothorax", marks=pytest.mark.slow)])
def test_masks_come_from_the_mean_of_pixel_probabilities(family: str, made: str, tmp_path: Path) -> None:
    members = members_of(family, tmp_path)
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    with torch.inference_mode():
        predicted = ensemble.recipe.predict(ensemble.network, next(some_batches()))
    mean = torch.stack([raw(member)[PIXEL_PROBABILITIES] for member in members]).mean(0)
    top, min_area, bottom = ensemble.network.get_buffer("rule").tolist()
    certain = (mean > top).flatten(1).sum(1) >= min_area * 32 * 32
    assert torch.equal(predicted[MASK_VALUES] > 0.5, (mean > bottom) & certain[:, None, None])


def test_boxes_are_fused_like_lists_of_boxes(made: str, tmp_path: Path) -> None:
    """Predictions of untrained detectors are many weak boxes; each image's are compared."""
    members = members_of("detect", tmp_path)
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    with torch.inference_mode():
        predicted = ensemble.recipe.predict(ensemble.network, next(some_batches()))[PREDICTIONS]
    by_image = zip(*(raw(member)[PREDICTIONS].double().numpy() for member in members), strict=True)
    for boxes_N6, of_members in zip(predicted.numpy(), by_image, strict=True):
        lists = [boxes[~np.isnan(boxes[:, 4])] for boxes in of_members]
        scored = [ScoredBoxes(b[:, :4].clip(0, 1), b[:, 4], b[:, 5].astype(int)) for b in lists]
        ((boxes, scores, labels),) = wbf([scored], iou_thr=0.55)
        expected = np.column_stack([boxes, scores, labels])[: len(boxes_N6)]
        assert len(expected)
        assert boxes_N6[: len(expected)] == pytest.approx(expected, abs=1e-6)
        assert np.isnan(boxes_N6[len(expected) :]).all()


def validation(model: Checkpoint, made: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of the validation images."""
    stream = ShardStream(shards.read_info(made), "val", (schema.PIXELS, schema.LABELS), batch_size=24)
    (batch,) = stream.every()
    with torch.inference_mode():
        p = model.recipe.predict(model.network, batch)[schema.PROBABILITIES]
    return p.numpy(), batch[schema.LABELS].numpy()


def test_thresholds_are_chosen_on_the_ensembles_own_probabilities(made: str, tmp_path: Path) -> None:
    members = members_of("classify", tmp_path)
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    p, labels = validation(ensemble, made)
    own = choose_thresholds(p, labels).values
    assert ensemble.network.get_buffer("thresholds").tolist() == pytest.approx(own)
    assert ensemble.about["learned"]["thresholds"]["values"] == pytest.approx(own.tolist())
    assert ensemble.about["metrics"]["mean_auroc"] == pytest.approx(auroc(p, labels).mean())
    of_member = choose_thresholds(validation(members[0], made)[0], labels).values
    assert own.tolist() != pytest.approx(of_member.tolist(), abs=1e-4)


@pytest.mark.slow
def test_the_rule_of_masks_is_chosen_on_the_ensembles_own_probabilities(made: str, tmp_path: Path) -> None:
    members = members_of("pneumothorax", tmp_path)
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    columns = (schema.PIXELS, schema.MASKS)
    stream = ShardStream(shards.read_info(made), "val", columns, batch_size=24, mask_label=schema.PNEUMOTHORAX)
    (batch,) = stream.every()
    assert isinstance(ensemble.recipe, EnsembleRecipe)
    with torch.inference_mode():
        p = ensemble.recipe.raw_predictions(ensemble.network, batch)[PIXEL_PROBABILITIES]
    rule = choose_rule(rule_rows(p, batch[schema.MASKS] == 1))
    assert ensemble.network.get_buffer("rule").tolist() == list(rule.describe().values())


def test_members_trained_in_folds_judge_only_images_they_were_not_trained_on(made: str, tmp_path: Path) -> None:
    recipe = SMALL["classify"].replace(folds=2)
    members = [saved(recipe.replace(fold=fold), tmp_path / f"member-{fold}", fold) for fold in (0, 1)]
    ensemble = join(members, made, str(tmp_path / "ensemble"), CPU)
    learned = ensemble.about["learned"]["thresholds"]
    counts = [sum(pair) for pair in zip(learned["positives"], learned["negatives"], strict=True)]
    assert counts == [28, 28], "each image of the train and val splits, once"


def test_networks_that_do_not_fit_together_are_refused(made: str, tmp_path: Path) -> None:
    recipe = SMALL["classify"]
    first = saved(recipe, tmp_path / "first", 0)
    out = str(tmp_path / "ensemble")

    def expect(other: Checkpoint, message: str) -> None:
        with pytest.raises(UserError, match=message):
            join([first, other], made, out, CPU)

    swapped = saved(recipe, tmp_path / "swapped", 1, findings=("Nodule", "Mass"))
    expect(swapped, "different findings.*Mass, Nodule; Nodule, Mass")
    expect(saved(recipe.replace(size=24), tmp_path / "small", 1), r"different size \(32 and 24\)")
    expect(saved(recipe.replace(equalize="clahe"), tmp_path / "clahe", 1), "different equalize")
    expect(saved(SMALL["localize"], tmp_path / "localize", 1), "one family, got classify and localize")
    assert not Path(out).exists()
    others = write_shards(tmp_path / "others", {"val": 8}, findings=("Mass",))
    with pytest.raises(UserError, match="has the findings Mass, but"):
        join([first, first], others, out, CPU)


def test_families_without_ensembles_say_so() -> None:
    with pytest.raises(UserError, match="family 'align' cannot form an ensemble"):
        EnsembleRecipe.of([SMALL["align"], AlignRecipe(lungs=False)])
    with pytest.raises(UserError, match="without a trained classifier cannot form an ensemble"):
        EnsembleRecipe.of([SMALL["aecnn"].replace(last_stage="autoencoder")] * 2)


def test_detectors_of_different_sizes_form_an_ensemble_of_the_largest_size() -> None:
    small, large = SMALL["detect"], SMALL["detect"].replace(size=64)
    assert EnsembleRecipe.of([small, large]).size == 64
