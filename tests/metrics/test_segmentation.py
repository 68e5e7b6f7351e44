"""Overlap, boundary distances and intervals of masks made by hand, against counts made by hand and by brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, roc_auc_score
from torch import Tensor

from cxr.metrics.bootstrap import mean_interval
from cxr.metrics.segmentation import dice, hd95, hd95_rows, image_level, iou, overlap_rows, summary
from cxr.metrics.segmentation.boundary import PERCENTILE, boundary


def blocks(*boxes: tuple[int, int, int, int], size: int = 10) -> Tensor:
    """Bool masks (B, size, size), true in [y0, y1) x [x0, x1)."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, (y0, y1, x0, x1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


NONE = (0, 0, 0, 0)
PREDICTED = blocks((0, 4, 0, 4), NONE, NONE, (0, 2, 0, 2))
TRUE = blocks((2, 4, 0, 8), NONE, (0, 3, 0, 3), NONE)  # half, both empty, missed, false alarm


def test_rows_count_pixels() -> None:
    assert overlap_rows(PREDICTED, TRUE).tolist() == [
        [8, 16, 16, 100],
        [0, 0, 0, 100],
        [0, 0, 9, 100],
        [0, 4, 0, 100],
    ]


def test_dice_and_iou_by_image() -> None:
    rows = overlap_rows(PREDICTED, TRUE)
    assert dice(rows).tolist() == [0.5, 1, 0, 0]
    assert iou(rows).tolist() == pytest.approx([8 / 24, 1, 0, 0])


def test_summary_of_images_that_were_counted_by_hand() -> None:
    results = summary(overlap_rows(PREDICTED, TRUE))
    wanted = {
        "dice": 1.5 / 4,
        "positive_dice": 0.25,
        "empty_prediction_dice": 0.5,
        "iou": (8 / 24 + 1) / 4,
        "mean_iou": (8 / 37 + (400 - 37) / (400 - 8)) / 2,
        "pixel_accuracy": 1 - 29 / 400,
        "images": 4,
        "positives": 2,
    }
    assert results == pytest.approx(wanted)


def test_pooled_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    predicted, true = (torch.from_numpy(rng.random((5, 9, 9)) < share) for share in (0.4, 0.3))
    pooled = summary(overlap_rows(predicted, true))
    labels = true.flatten().numpy(), predicted.flatten().numpy()
    assert pooled["mean_iou"] == pytest.approx(jaccard_score(*labels, average="macro"))
    assert pooled["pixel_accuracy"] == pytest.approx((labels[0] == labels[1]).mean())


def test_empty_predictions_score_empty_prediction_dice() -> None:
    nothing = torch.zeros_like(TRUE)
    results = summary(overlap_rows(nothing, TRUE))
    assert (
        results["dice"]
        == results["empty_prediction_dice"]
        == summary(overlap_rows(PREDICTED, TRUE))["empty_prediction_dice"]
    )
    alone = summary(overlap_rows(nothing, nothing))
    assert (alone["mean_iou"], alone["dice"]) == (1, 1)
    assert math.isnan(alone["positive_dice"])
    assert math.isnan(summary(torch.zeros(0, 4, dtype=torch.long))["dice"])


def test_empty_predictions_on_all_of_siim(real_data: Path) -> None:
    lines = (real_data / "siim" / "train-rle.csv").read_text().splitlines()[1:]
    areas: dict[str, int] = {}
    for image, _, code in (line.partition(",") for line in lines):
        areas[image] = areas.get(image, 0) + sum(map(int, code.split()[1::2]))
    true = torch.tensor(list(areas.values()))
    nothing = torch.zeros_like(true)
    results = summary(torch.stack([nothing, nothing, true, torch.full_like(true, 1024**2)], 1))
    assert (results["images"], results["positives"]) == (12_047, 2_669)
    assert round(results["dice"], 4) == 0.7785
    assert results["positive_dice"] == 0


def test_images_of_different_sizes_and_workers_are_combined() -> None:
    small, large = overlap_rows(PREDICTED, TRUE), overlap_rows(blocks((0, 20, 0, 20), size=40), blocks(NONE, size=40))
    results = summary(torch.cat([small, large]))
    assert results["dice"] == pytest.approx(1.5 / 5)
    assert results["pixel_accuracy"] == pytest.approx(1 - (29 + 400) / 2000)


def test_image_level_detection() -> None:
    rows, probability = overlap_rows(PREDICTED, TRUE)[[0, 1, 2, 3, 1]], torch.tensor([0.9, 0.2, 0.4, 0.6, 0.3])
    assert image_level(rows, probability) == {
        "image_sensitivity": 0.5,
        "image_specificity": 2 / 3,
        "image_auroc": roc_auc_score([1, 0, 1, 0, 0], probability),
    }
    assert "image_auroc" not in image_level(rows, torch.tensor([0.9, math.nan, 0.4, 0.6, 0.3]))
    assert "image_auroc" not in image_level(rows)
    only_positive = image_level(rows[[0, 2]], probability[[0, 2]])
    assert math.isnan(only_positive["image_specificity"])
    assert math.isnan(only_positive["image_auroc"])


def brute_hd95(predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, float]) -> float:
    """Computed from the distances of all pairs of boundary pixels."""
    edges = [np.array(edge_pixels(mask)) * spacing for mask in (predicted, true)]
    apart = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=2)
    return max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95))


def edge_pixels(mask: np.ndarray) -> list[tuple[int, int]]:
    height, width = mask.shape
    return [
        (y, x)
        for y, x in np.argwhere(mask).tolist()
        if any(
            not (0 <= y + dy < height and 0 <= x + dx < width) or not mask[y + dy, x + dx]
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
        )
    ]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    spacing=st.sampled_from([(1.0, 1.0), (0.2, 0.2), (0.5, 2.0)]),
    share=st.floats(0.02, 0.9),
)
def test_hd95_is_that_of_all_pairs(
    seed: int, height: int, width: int, spacing: tuple[float, float], share: float
) -> None:
    predicted, true = np.random.default_rng(seed).random((2, height, width)) < share
    predicted[height // 2, width // 2] = true[0, 0] = True
    assert hd95(predicted, true, spacing) == pytest.approx(brute_hd95(predicted, true, spacing))


def test_hd95_in_pixels_and_mm() -> None:
    near, far = blocks((2, 6, 2, 6), (2, 6, 5, 9), size=12).numpy()
    assert hd95(near, far) == 3
    assert hd95(near, far, (0.1, 0.2)) == pytest.approx(0.6)
    assert hd95(near, near) == 0
    assert PERCENTILE == 95


def test_hd95_forgives_a_speck_and_not_a_miss() -> None:
    mask = blocks((0, 60, 0, 60), size=100).numpy()[0]
    speck = mask.copy()
    speck[99, 99] = True
    assert hd95(speck, mask) == hd95(mask, speck) == 0
    assert hd95(blocks((0, 60, 0, 30), size=100).numpy()[0], mask) > 25


def test_an_empty_mask_has_no_distance() -> None:
    rows = hd95_rows(PREDICTED, TRUE)
    assert rows[0] == hd95(PREDICTED[0].numpy(), TRUE[0].numpy()) == 4
    assert rows[1:].isnan().all()


def test_a_mask_at_the_edge_has_a_boundary_there() -> None:
    assert boundary(np.ones((3, 4), bool)).tolist() == [[True] * 4, [True, False, False, True], [True] * 4]


def test_intervals_of_means_shrink_with_the_number_of_patients() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.7, 0.1, 400)
    alone = mean_interval(values, np.arange(400), resamples=500)
    assert alone.value == pytest.approx(values.mean())
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)
    of_patients = np.repeat(values[:100], 4)
    together = mean_interval(of_patients, np.repeat(np.arange(100), 4), resamples=500)
    assert together.high - together.low == pytest.approx(2 * 1.96 * 0.1 / 10, rel=0.25)


def test_images_without_a_figure_are_left_out_of_means() -> None:
    values, patients = np.array([0.5, math.nan, 1.0, math.nan]), np.array(["a", "a", "b", "c"])
    results = mean_interval(values, patients, resamples=200)
    assert (results.value, results.low, results.high) == (0.75, 0.5, 1)
    nothing = mean_interval(np.full(2, math.nan), np.arange(2))
    assert all(math.isnan(value) for value in (nothing.value, nothing.low, nothing.high))
