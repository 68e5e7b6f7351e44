"""Fusion equals that of the package ensemble-boxes except for that package's known defects."""

from __future__ import annotations

from typing import Any, get_args

import ensemble_boxes
import numpy as np
import pytest

from cxr import boxes
from cxr.boxes import ScoredBoxes
from cxr.boxes.fusion import ConfType
from cxr.cli.commands import benchmark_fusion
from cxr.errors import UserError

WEIGHTS = [None, [1.0, 2.0, 0.5, 3.0, 1.5]]
UNIT = [[0.1, 0.1, 0.5, 0.5]]


def images(seed: int, count: int, boxes: int, labels: int = 14) -> list[list[ScoredBoxes]]:
    """Boxes of five models."""
    options = benchmark_fusion.Options(seed=seed, images=count, boxes=boxes)
    return benchmark_fusion.made_images(options, labels)


def one(*models: tuple[list[list[float]], list[float]], label: int = 3) -> list[list[ScoredBoxes]]:
    """One image, one label."""
    return [[ScoredBoxes(np.array(b).reshape(-1, 4), np.array(s), np.full(len(s), label)) for b, s in models]]


def parts(found: list[ScoredBoxes]) -> list[list[Any]]:
    return [[of[i].copy() for of in found] for i in range(3)]


def sorted_rows(boxes_N4: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows = np.column_stack([labels, scores, boxes_N4])
    return rows[np.lexsort((rows[:, 2], -rows[:, 1], rows[:, 0]))]


@pytest.mark.parametrize("conf_type", get_args(ConfType))
@pytest.mark.parametrize("weights", WEIGHTS)
def test_wbf_equals_the_package(conf_type: ConfType, weights: list[float] | None) -> None:
    made = images(0, 6, boxes=60, labels=4)
    for skip, thr in ((0.0, 0.55), (0.3, 0.4)):
        ours = boxes.wbf(made, weights, iou_thr=thr, skip_box_thr=skip, conf_type=conf_type)
        for image, found in zip(made, ours, strict=True):
            theirs = ensemble_boxes.weighted_boxes_fusion(
                *parts(image), weights=weights, iou_thr=thr, skip_box_thr=skip, conf_type=conf_type
            )
            for mine, other in zip(found, theirs, strict=True):
                np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nmw_equals_the_package(weights: list[float] | None) -> None:
    made = images(1, 4, boxes=50, labels=3)
    for image, found in zip(made, boxes.nmw(made, weights, iou_thr=0.5, skip_box_thr=0.1), strict=True):
        theirs = ensemble_boxes.non_maximum_weighted(*parts(image), weights=weights, iou_thr=0.5, skip_box_thr=0.1)
        for mine, other in zip(found, theirs, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nms_equals_the_package(weights: list[float] | None) -> None:
    made = images(2, 4, boxes=50, labels=3)
    for image, found in zip(made, boxes.nms(made, weights, iou_thr=0.5), strict=True):
        theirs = ensemble_boxes.nms(*parts(image), iou_thr=0.5, weights=weights)
        np.testing.assert_allclose(sorted_rows(*found), sorted_rows(*theirs), atol=1e-12)


@pytest.mark.parametrize(("method", "number"), [("linear", 1), ("gaussian", 2)])
def test_soft_nms_keeps_the_same_boxes_as_the_package_with_decayed_scores(method: Any, number: int) -> None:
    made = images(3, 4, boxes=30, labels=3)
    ours = boxes.soft_nms(made, method=method, iou_thr=0.3, sigma=0.1, threshold=0.05)
    for image, found in zip(made, ours, strict=True):
        theirs = ensemble_boxes.soft_nms(*parts(image), method=number, iou_thr=0.3, sigma=0.1, thresh=0.05)
        expected = sorted_rows(*(np.concatenate(of) for of in parts(decayed(image, method, 0.3, 0.1, 0.05))))
        np.testing.assert_allclose(sorted_rows(*found), expected, atol=1e-12)
        by_place = (rows[np.lexsort(rows.T)] for rows in (theirs[0], found.boxes))
        np.testing.assert_array_equal(*by_place)


def decayed(
    image: list[ScoredBoxes], method: str, iou_thr: float, sigma: float, threshold: float
) -> list[ScoredBoxes]:
    """Bodla et al. (2017), figure 2, one box at a time."""
    done: list[ScoredBoxes] = []
    merged = ScoredBoxes(*(np.concatenate(of) for of in parts(image)))
    for label in np.unique(merged.labels):
        rows, scores = merged.boxes[merged.labels == label], merged.scores[merged.labels == label].copy()
        left = list(range(len(rows)))
        while left:
            best = left.pop(int(np.argmax(scores[left])))
            if scores[best] > threshold:
                done.append(ScoredBoxes(rows[[best]], scores[[best]], np.array([label])))
            overlap = boxes.iou(rows[[best]], rows[left])[0] if left else np.zeros(0)
            fade = (
                np.where(overlap > iou_thr, 1 - overlap, 1) if method == "linear" else np.exp(-(overlap**2) / sigma)
            )
            scores[left] *= fade
    return done


def test_wbf_by_hand() -> None:
    """Two boxes of two models are fused; a third one elsewhere is unchanged."""
    (found,) = boxes.wbf(one((UNIT, [0.9]), ([[0.1, 0.1, 0.5, 0.54], [0.7, 0.7, 0.9, 0.9]], [0.3, 0.8])))
    np.testing.assert_allclose(found.boxes, [[0.1, 0.1, 0.5, 0.51], [0.7, 0.7, 0.9, 0.9]])
    np.testing.assert_allclose(found.scores, [0.6, 0.4])
    assert found.labels.tolist() == [3, 3]


@pytest.mark.parametrize("conf_type", get_args(ConfType))
def test_a_model_with_weight_0_is_ignored(conf_type: ConfType) -> None:
    """The package counts it as a model, and gives NaN for a cluster that consists only of its box."""
    twice = [*UNIT, *UNIT]
    for fuse in (boxes.wbf, boxes.nmw, boxes.nms, boxes.soft_nms):
        named = {"conf_type": conf_type} if fuse is boxes.wbf else {}
        both = fuse(one((UNIT, [0.8]), (twice, [0.9, 0.7])), [2.0, 0.0], **named)
        alone = fuse(one((UNIT, [0.8])), [2.0], **named)
        for of, expected in zip(both[0], alone[0], strict=True):
            np.testing.assert_allclose(of, expected)
    only = boxes.wbf(one(([], []), (twice, [0.9, 0.7])), [1.0, 0.0], conf_type=conf_type)
    assert len(only[0].scores) == 0


def test_boxes_with_score_0_give_finite_numbers() -> None:
    (found,) = boxes.wbf(one((UNIT, [0.0]), ([[0.1, 0.1, 0.5, 0.54]], [0.0])))
    np.testing.assert_allclose(found.boxes, [[0.1, 0.1, 0.5, 0.52]])
    assert found.scores.tolist() == [0.0]


def test_boxes_without_area_are_dropped_and_corners_are_sorted() -> None:
    odd = [[0.3, 0.3, 0.3, 0.8], [0.5, 0.5, 0.1, 0.1], [1.2, 0.2, 1.5, 0.4], [-1, 0.6, 2, 0.7]]
    for fuse in (boxes.wbf, boxes.nmw, boxes.nms, boxes.soft_nms):
        (found,) = fuse(one((odd, [0.9, 0.8, 0.7, 0.6])))
        np.testing.assert_allclose(found.boxes, [[0.1, 0.1, 0.5, 0.5], [0, 0.6, 1, 0.7]])


def test_no_boxes() -> None:
    nothing = ScoredBoxes.empty()
    for fuse in (boxes.wbf, boxes.nmw, boxes.nms, boxes.soft_nms):
        assert fuse([]) == []
        found = fuse([[nothing, nothing], one((UNIT, [0.5]), ([], []))[0], [nothing, nothing]])
        assert [len(of.scores) for of in found] == [0, 1, 0]
        assert all(of.boxes.shape == (len(of.scores), 4) for of in found)


def test_among_equal_scores_the_earlier_model_comes_first() -> None:
    shifted = [[0.1, 0.1, 0.5, 0.52]]
    for fuse in (boxes.nms, boxes.nmw):
        first, second = (fuse(one((a, [0.5]), (b, [0.5])))[0] for a, b in ((UNIT, shifted), (shifted, UNIT)))
        assert first.boxes[0, 3] < second.boxes[0, 3]


def test_images_are_fused_independently() -> None:
    """Images are processed side by side in blocks: neither their order nor their neighbors may matter."""
    made = images(4, 40, boxes=30, labels=3)
    made[7] = [ScoredBoxes.empty()] * 5
    together = boxes.wbf(made[::-1])[::-1]
    for image, found in zip(made, together, strict=True):
        for mine, other in zip(boxes.wbf([image])[0], found, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_inputs_are_not_changed() -> None:
    made = images(5, 1, boxes=10)
    before = [parts(image) for image in made]
    for fuse in (boxes.wbf, boxes.nmw, boxes.nms, boxes.soft_nms):
        fuse(made, [1.0, 2.0, 3.0, 4.0, 5.0])
    np.testing.assert_equal([parts(image) for image in made], before)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (one((UNIT, [0.5])), {"weights": [1.0, 1.0]}, "got 2 weights and an image with the boxes of 1 model:"),
        (one((UNIT, [0.5])), {"weights": [0.0]}, "at least one above 0"),
        (one((UNIT, [0.5])), {"weights": [-1.0]}, "weights of 0 or more"),
        (one((UNIT, [-0.5])), {}, "finite scores of at least 0"),
        (one((UNIT, [np.nan])), {}, "expected finite boxes"),
        (one((UNIT, [0.5])), {"iou_thr": 1.5}, "expected iou_thr from 0 to 1, got 1.5"),
        (one((UNIT, [0.5])), {"conf_type": "mean"}, "expected conf_type to be one of .*, got 'mean'"),
        ([[ScoredBoxes(np.zeros((2, 4)), np.zeros(1), np.zeros(2))]], {}, "different lengths"),
    ],
)
def test_invalid_input(images: list[list[ScoredBoxes]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        boxes.wbf(images, **options)


def test_benchmark_difference_is_zero() -> None:
    options = benchmark_fusion.Options(images=3, boxes=20, labels=(2,), out="memory")
    made = benchmark_fusion.made_images(options, 2)
    ours = boxes.wbf(made)
    assert benchmark_fusion.largest_difference(ours, ours) == 0
    moved = [found._replace(boxes=found.boxes + 0.5) for found in ours]
    assert benchmark_fusion.largest_difference(ours, moved) == pytest.approx(0.5)


@pytest.mark.slow
def test_wbf_takes_a_twentieth_of_the_package_time(tmp_path: Any) -> None:
    """1,000 images x 5 models x 100 boxes with 14 labels."""
    result = benchmark_fusion.main(benchmark_fusion.Options(labels=(14,), out=str(tmp_path)))
    assert result["metrics"]["largest_difference_14"] < 1e-6
    assert result["metrics"]["ratio_14"] > 20
