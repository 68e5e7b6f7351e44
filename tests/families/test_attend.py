"""Align, attend, locate: pairs, the mean that replaces them, boxes in both frames, scores, invalid settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from cxr import schema
from cxr.boxes.from_heatmaps import BoxRule
from cxr.data.batch import HAS_BOXES, Batch
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.families.attend import (
    PARTNER,
    AttendRecipe,
    AttendTask,
    best_overlaps,
    choose_partners,
    predict_boxes,
    top_boxes,
    top_title,
)
from cxr.families.base import ScoringContext, SingleProcess
from cxr.families.outlines import PREDICTION_COLOR, outlined_boxes
from cxr.imaging.geometry import ResizeTransform
from cxr.models.contrast_attention import ContrastAttention, warp_boxes
from cxr.models.mil_loss import cells_inside
from cxr.models.spatial_transformer import bounded_theta, identity, invert
from cxr.training.engine import Engine

FINDINGS = ("Mass", "Nodule")
SMALL = AttendRecipe(
    size=64,
    epochs=8,
    batch_size=8,
    lr=2e-3,
    box_weight=0.2,
    rotation_deg=0,
    max_zoom=1,
    translate=0,
    precision="float32",
)
ALIGNER = AlignRecipe(size=32, backbone="conv3", lungs=False, iterations=1)
IDS = torch.arange(8) * (1 << 17)  # hashes spread evenly: box_fraction=.5 takes the first four


def batch(seed: int = 0) -> Batch:
    """Eight noisy images, the first four with a bright Mass in a different quarter each; no Nodule."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 60, (8, 64, 64), generator=generator)
    boxes = torch.full((8, 3, 5), math.nan)
    for i in range(4):
        y, x = 32 * (i // 2), 32 * (i % 2)
        pixels[i, y : y + 32, x : x + 32] += 160
        boxes[i, 0] = torch.tensor([0, x, y, x + 32, y + 32]) / 64
    labels = torch.zeros(8, 2, dtype=torch.int8)
    labels[:4, 0] = 1
    return {
        schema.PIXELS: pixels.to(torch.uint8),
        schema.LABELS: labels,
        schema.BOXES: boxes,
        HAS_BOXES: torch.ones(8, dtype=torch.bool),
        schema.IMAGE_ID: IDS.clone(),
    }


def some() -> Iterator[Batch]:
    return iter([batch(0), batch(1)])


def task_of(recipe: AttendRecipe = SMALL) -> AttendTask:
    torch.manual_seed(0)
    return recipe.task(recipe.network(FINDINGS))


def terms_of(task: AttendTask, batch: Batch) -> dict[str, Tensor]:
    """The loss of a training step."""
    return task(task.augment(batch))


def net_of(task: AttendTask) -> ContrastAttention:
    assert isinstance(task.network, ContrastAttention)
    return task.network


@pytest.fixture(scope="module")
def aligner(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttendRecipe, str]:
    """A small recipe with an aligner that rotates and shifts every image in the same way, and the aligner's URI."""
    folder = tmp_path_factory.mktemp("aligner") / "checkpoint"
    torch.manual_seed(0)
    task = ALIGNER.task(ALIGNER.network(()))
    task.network.head.bias.data = torch.tensor([0.2, -0.1, 0.5, 0.2, 0.1])  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint.save(folder, ALIGNER, task, task.network.state_dict(), findings=(), metrics={})
    recipe, _ = SMALL.replace(aligner=str(folder)).resolve_weights(str(tmp_path_factory.mktemp("out")))
    return recipe, str(folder)


def test_partners_are_other_images_without_findings_sampled_uniformly() -> None:
    without = torch.tensor([False, True, True, False, True])
    torch.manual_seed(0)
    drawn = torch.stack([choose_partners(without, 0, 5) for _ in range(600)])
    for image in range(5):
        wanted = {1, 2, 4} - {image}
        values, counts = drawn[:, image].unique(return_counts=True)
        assert set(values.tolist()) == wanted
        assert counts.min() > 0.7 * 600 / len(wanted)
    torch.manual_seed(0)
    assert torch.equal(choose_partners(without, 0, 5), drawn[0]), "seeded"
    assert choose_partners(torch.tensor([False, True, False]), 0, 3).tolist() == [1, -1, 1]
    assert choose_partners(torch.tensor([False, True, False]), 1, 2).tolist() == [-1, 1]
    assert choose_partners(torch.zeros(3, dtype=torch.bool), 0, 3).tolist() == [-1] * 3


class Share(SingleProcess):
    """One of 8 workers in a step of 16 images; `everyone` says which images have no finding."""

    size = 8

    def __init__(self, rank: int, everyone: Tensor) -> None:
        self.rank, self.everyone = rank, everyone

    def all_rows(self, rows: Tensor) -> Tensor:
        assert torch.equal(rows, self.everyone[2 * self.rank :][:2])
        return self.everyone


def test_images_have_partners_on_eight_workers_as_on_one() -> None:
    """Two images on each of 8 workers: on their own, half of them would have no partner without findings."""
    torch.manual_seed(0)
    task, given, found = task_of(), batch(), []
    for _ in range(20):
        without = torch.rand(16) < 0.5
        for rank in range(8):
            task.workers = Share(rank, without.to(torch.uint8))
            share = {name: values[:2].clone() for name, values in given.items()}
            share[schema.LABELS][:] = (~without[2 * rank :][:2, None]).to(torch.int8)
            partner = task.augment(share)[PARTNER]
            assert without[partner[partner >= 0]].all()
            assert not (partner == torch.arange(2 * rank, 2 * rank + 2)).any()
            found.append(partner)
    partner = torch.cat(found)
    assert (partner < 0).float().mean() < 0.01
    assert partner.unique().tolist()[-16:] == list(range(16)), "of all workers"


def test_images_with_unknown_labels_are_never_partners() -> None:
    task, given = task_of(), batch()
    given[schema.LABELS][4:, 1] = schema.UNKNOWN
    terms_of(task, given)
    task.end_epoch(SingleProcess())
    assert task.negatives_seen == 0


def test_the_mean_of_images_without_findings_includes_all_workers() -> None:
    """Two workers' shares, 4 and 1 such images, together give the mean of the five: not the mean of two means."""

    class Pair(SingleProcess):
        size = 2

        def __init__(self, other: AttendTask) -> None:
            self.other = other

        def sum(self, values: Tensor) -> Tensor:
            return values + torch.cat([self.other._sum.flatten(), self.other._count.reshape(1)])

    one, other, few = task_of().eval(), task_of().eval(), batch(1)
    few[schema.LABELS][4:7, 1] = 1
    with torch.no_grad():
        terms_of(one, batch(0))
        terms_of(other, few)
        features = [net_of(one).features(shown[schema.PIXELS][:, None] / 255) for shown in (batch(0), few)]
    one.end_epoch(Pair(other))
    wanted = torch.cat([features[0][4:], features[1][7:]]).mean(0)
    assert int(one.negatives_seen) == 5
    assert torch.allclose(one.negative, wanted, atol=1e-4)
    assert one._sum.eq(0).all()


def test_the_mean_replaces_a_missing_normal_image() -> None:
    task, given = task_of(), batch()
    given[schema.LABELS][4:, 0] = 1
    before = terms_of(task, given)["label"].item()
    task.negative += 3
    assert terms_of(task, given)["label"].item() != before
    with_partners, changed = task_of(), task_of()
    changed.negative += 3
    terms = []
    for one in (with_partners, changed):
        torch.manual_seed(3)
        terms.append(terms_of(one, batch())["label"].item())
    assert terms[0] == terms[1]


def test_box_fraction_selects_the_same_images_each_time() -> None:
    def marked(share: float) -> list[bool]:
        task = task_of(SMALL.replace(box_fraction=share))
        return (~task.augmented_boxes(batch(), identity(8))[..., 0].isnan()).any(1).tolist()

    assert marked(1.0) == [True] * 4 + [False] * 4
    assert marked(0.25) == [True] * 2 + [False] * 6
    assert marked(0.0) == [False] * 8
    task = task_of(SMALL.replace(box_fraction=0.0))
    assert terms_of(task, batch())["box"].item() == 0
    assert terms_of(task_of(), batch())["box"].item() > 0


def test_boxes_mark_the_cells_that_alignment_moves_them_to(aligner: tuple[AttendRecipe, str]) -> None:
    """The bright quarter of an aligned image lies in the cells that its box marks."""
    task = task_of(aligner[0])
    task.begin(some, SingleProcess())
    x, theta = task.recipe.aligned(task.attention, batch())
    assert not torch.allclose(theta, identity(8), atol=0.05)
    marked = cells_inside(task.augmented_boxes(batch(), theta), len(FINDINGS), 4)[:4, 0].float()
    bright = torch.nn.functional.adaptive_avg_pool2d((x[:4] > 0.5).float(), 4)[:, 0]
    for cells, light in zip(marked, bright, strict=True):
        assert cells[light > 0.9].all()
        assert cells.sum() < 12


def test_images_and_boxes_are_aligned_in_float32_under_autocast(aligner: tuple[AttendRecipe, str]) -> None:
    task = task_of(aligner[0].replace(rotation_deg=5.0, max_zoom=1.1, translate=0.05))
    task.begin(some, SingleProcess())
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(task.augment(batch()))
    plain, cast = results
    assert not torch.allclose(plain[schema.BOXES][:4, 0], batch()[schema.BOXES][:4, 0], atol=0.02)
    for name, values in plain.items():
        torch.testing.assert_close(cast[name], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_training_learns_to_locate_and_inference_needs_no_labels() -> None:
    recipe, task = SMALL, task_of()
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=4, device=torch.device("cpu"))
    metrics: dict[str, float] = {}
    for epoch in range(recipe.epochs):
        torch.manual_seed(epoch)
        engine.epoch(iter([batch(4 * epoch + i) for i in range(4)]))
        metrics = engine.finish_epoch(some)
    assert metrics["mean_auroc"] > 0.95
    assert metrics["findings_measured"] == 1
    assert metrics["boxes_measured"] == 8
    assert metrics["localization_accuracy_iou50"] > 0.7
    blind = {schema.PIXELS: batch()[schema.PIXELS]}
    net = net_of(task).eval()
    with torch.inference_mode():
        predicted = recipe.predict(net, blind)
    frame = ResizeTransform(4, 4, 0, 0).as_dict()
    rows = pa.table({schema.RESIZE_TRANSFORM: [frame] * 8, schema.HEIGHT_PX: [256] * 8, schema.WIDTH_PX: [256] * 8})
    scores = recipe.scored(predicted, rows, ScoringContext(FINDINGS, 64))
    assert scores.schema.names == [schema.PROBABILITIES, schema.DECISIONS, schema.PRED_BOXES]
    best = scores[schema.PRED_BOXES][3].as_py()[0]
    assert best["label"] == "Mass"
    assert best["score"] > 0.3
    edges = [best[name] for name in (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)]
    assert edges == pytest.approx([128, 128, 256, 256], abs=48)


def test_the_checkpoint_holds_mean_thresholds_and_aligner(aligner: tuple[AttendRecipe, str], tmp_path: Path) -> None:
    recipe, uri = aligner
    task = task_of(recipe)
    task.begin(some, SingleProcess())
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))
    engine.epoch(some())
    metrics = engine.finish_epoch(some)
    checkpoint.save(tmp_path, recipe, task, engine.shipped().state_dict(), findings=FINDINGS, metrics=metrics)
    moved = Path(uri).rename(tmp_path / "elsewhere")
    try:
        kept = checkpoint.load(str(tmp_path))
    finally:
        moved.rename(uri)
    assert isinstance(kept.network, ContrastAttention)
    assert torch.equal(kept.network.mean_negative, task.negative)
    assert kept.network.mean_negative.abs().sum() > 0
    assert kept.about["learned"]["images_without_findings"] == 8
    with torch.inference_mode():
        theirs = checkpoint.load(uri).network(torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
        ours = kept.network.theta(torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(ours, theirs)
    task.save_pictures(some, tmp_path, list("abcdefgh"))
    assert (tmp_path / "attention.png").stat().st_size > 1000
    located = recipe.render(kept.network, batch())["located"]
    assert located.shape == (8, 64, 128, 3)
    assert (located == 255).all(-1).flatten(1).any(1).all(), "each is titled"


def test_predicted_boxes_are_mapped_back_through_alignment() -> None:
    """A hot square of cells, and another finding that is too improbable for a box."""
    torch.manual_seed(0)
    logits = torch.full((5, 2, 8, 8), -12.0)
    logits[:, 0, 2:5, 1:4] = 3
    theta = bounded_theta(0.5 * torch.randn(5, 5), "anisotropic")
    found = predict_boxes(logits, theta, BoxRule(), min_score=0.05)
    wanted = warp_boxes(torch.tensor([[[1, 2, 4, 5]]]).expand(5, 1, 4) / 8, theta)[:, 0].clamp(0, 1)
    for boxed, box in zip(found, wanted, strict=True):
        assert boxed.index_N.tolist() == [0]
        assert boxed.boxes_N4[0] == pytest.approx(box.numpy(), abs=0.02)
        assert 0.7 < boxed.score_N[0] <= 1
    assert [len(boxed) for boxed in predict_boxes(logits, theta, BoxRule())] == [2] * 5
    back = warp_boxes(torch.from_numpy(found[0].boxes_N4)[None].float(), invert(theta[:1]))
    assert back[0, 0].numpy() == pytest.approx(np.array([1, 2, 4, 5]) / 8, abs=0.1)


def test_heat_maps_are_hot_where_the_boxes_are(aligner: tuple[AttendRecipe, str]) -> None:
    """In the frame of the image, which the aligner rotates and shifts."""
    task, images = task_of(aligner[0]), batch()
    task.begin(some, SingleProcess())
    logits = torch.full((8, 2, 8, 8), -12.0)
    logits[:, 0, 3:5, 2:5] = 3
    with mock.patch.object(ContrastAttention, "forward", return_value=logits), torch.inference_mode():
        maps = task.recipe.heat_maps(task.network, images)
        boxes = task.recipe.predicted_boxes(task.recipe.predict(task.network, images))
    assert maps[:, 1].max() < 0.001
    for map_hw, predicted in zip(maps[:, 0], boxes, strict=True):
        hot_yx = (map_hw > 0.5 * map_hw.max()).nonzero().float() + 0.5
        center_xy = hot_yx.mean(0).flip(0).numpy() / len(map_hw)
        box = predicted.boxes_N4[predicted.index_N == 0][0]
        assert center_xy == pytest.approx((box[:2] + box[2:]) / 2, abs=0.015)
    assert np.abs(center_xy - np.array([3.5, 4]) / 8).max() > 0.03  # alignment has moved it


def test_overlap_compares_the_first_box_with_the_best_true_box() -> None:
    logits = torch.full((8, 2, 4, 4), -12.0)
    for i in range(4):
        logits[i, 0, 2 * (i // 2) : 2 * (i // 2) + 2, 2 * (i % 2) : 2 * (i % 2) + 2] = 9
    given = batch()
    given[schema.BOXES][0, 1] = torch.tensor([1, 0.0, 0.0, 1.0, 1.0])  # a Nodule without a predicted box
    given[HAS_BOXES][3] = False
    overlaps = best_overlaps(predict_boxes(logits, identity(8), BoxRule(), min_score=0.05), given)
    assert overlaps == pytest.approx([1, 0, 1, 1], abs=0.05)


def test_pictures_show_the_boxes_of_the_top_finding() -> None:
    logits = torch.full((2, 2, 4, 4), -12.0)
    logits[0, 1, :2, :2] = 9
    found = predict_boxes(logits, identity(2), BoxRule(), min_score=0.05)
    top = top_boxes(found, 3)
    assert top[0, 0].tolist() == pytest.approx([0, 0, 0.5, 0.5])
    assert [top_title(boxes, FINDINGS) for boxes in found] == ["Nodule 0.89", "no box"]
    assert top.isnan().all(-1).tolist() == [[False, True, True], [True] * 3]
    outline = (outlined_boxes(torch.zeros(2, 1, 32, 32), top) == torch.tensor(PREDICTION_COLOR)).all(-1)
    assert outline[0].sum() == 16 * 16 - 14 * 14
    assert outline[1].sum() == 0


def test_invalid_aligners_are_rejected(aligner: tuple[AttendRecipe, str], tmp_path: Path) -> None:
    recipe, uri = aligner
    out = str(tmp_path / "out")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"does not fit: expected a checkpoint folder of family 'align'"):
        SMALL.replace(aligner=str(tmp_path / "other.pt")).resolve_weights(out)
    with pytest.raises(
        UserError, match="expected an aligner for images of at most size=16 px, got 32 px: raise size"
    ):
        SMALL.replace(aligner=uri, size=16).resolve_weights(out)
    with pytest.raises(UserError, match=r"was trained with lung_crop=none, but lung_crop is somewhere here"):
        SMALL.replace(aligner=uri, lung_crop="somewhere").resolve_weights(out)
    with pytest.raises(UserError, match=r"was trained with equalize=none, but equalize is clahe here"):
        SMALL.replace(aligner=uri, equalize="clahe").resolve_weights(out)
    assert recipe.resolve_weights(str(Path(recipe.aligner).parents[1])) == (recipe, [])
    assert recipe.changes_from(recipe.replace(aligner="moved/there").to_dict()) == []
    assert SMALL.changes_from(recipe.to_dict()) != [], "without alignment it is another network"


@pytest.mark.parametrize(
    "wrong",
    [
        {"backbone": "vgg16"}, {"backbone_stages": 2}, {"grid": -1}, {"box_fraction": 1.5},
        {"positive_fraction": 0.0},
        {"max_zoom": 0.5}, {"box_weight": -1.0}, {"max_boxes": 0}, {"box_threshold": 0.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_rejected(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"expected|settings of boxes"):
        SMALL.replace(**wrong)
