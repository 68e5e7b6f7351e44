"""Fusions equal those of the package ensemble-boxes where it is right, and are what they should be where not."""

from __future__ import annotations

from typing import Any, get_args

import ensemble_boxes
import numpy as np
import pytest

from cxr import boxes
from cxr.boxes import Found
from cxr.boxes.fusion import ConfType
from cxr.errors import UserError
from jobs import benchmark_fusion

WEIGHTS = [None, [1.0, 2.0, 0.5, 3.0, 1.5]]
UNIT = [[0.1, 0.1, 0.5, 0.5]]


def images(seed: int, count: int, boxes: int, labels: int = 14) -> list[list[Found]]:
    """Boxes of five models."""
    options = benchmark_fusion.Options(seed=seed, images=count, boxes=boxes)
    return benchmark_fusion.made_images(options, labels)


def one(*models: tuple[list[list[float]], list[float]], label: int = 3) -> list[list[Found]]:
    """One image, one label."""
    return [[Found(np.array(b).reshape(-1, 4), np.array(s), np.full(len(s), label)) for b, s in models]]


def parts(found: list[Found]) -> list[list[Any]]:
    return [[of[i].copy() for of in found] for i in range(3)]


def sorted_rows(boxes_N4: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows = np.column_stack([labels, scores, boxes_N4])
    return rows[np.lexsort((rows[:, 2], -rows[:, 1], rows[:, 0]))]


@pytest.mark.parametrize("conf_type", get_args(ConfType))
@pytest.mark.parametrize("weights", WEIGHTS)
def test_wbf_is_that_of_the_package(conf_type: ConfType, weights: list[float] | None) -> None:
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
def test_nmw_is_that_of_the_package(weights: list[float] | None) -> None:
    made = images(1, 4, boxes=50, labels=3)
    for image, found in zip(made, boxes.nmw(made, weights, iou_thr=0.5, skip_box_thr=0.1), strict=True):
        theirs = ensemble_boxes.non_maximum_weighted(*parts(image), weights=weights, iou_thr=0.5, skip_box_thr=0.1)
        for mine, other in zip(found, theirs, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nms_is_that_of_the_package(weights: list[float] | None) -> None:
    made = images(2, 4, boxes=50, labels=3)
    for image, found in zip(made, boxes.nms(made, weights, iou_thr=0.5), strict=True):
        theirs = ensemble_boxes.nms(*parts(image), iou_thr=0.5, weights=weights)
        np.testing.assert_allclose(sorted_rows(*found), sorted_rows(*theirs), atol=1e-12)


@pytest.mark.parametrize(("method", "number"), [("linear", 1), ("gaussian", 2)])
def test_soft_nms_keeps_what_the_package_keeps_with_decayed_scores(method: Any, number: int) -> None:
    made = images(3, 4, boxes=30, labels=3)
    ours = boxes.soft_nms(made, method=method, iou_thr=0.3, sigma=0.1, threshold=0.05)
    for image, found in zip(made, ours, strict=True):
        theirs = ensemble_boxes.soft_nms(*parts(image), method=number, iou_thr=0.3, sigma=0.1, thresh=0.05)
        expected = sorted_rows(*(np.concatenate(of) for of in parts(decayed(image, method, 0.3, 0.1, 0.05))))
        np.testing.assert_allclose(sorted_rows(*found), expected, atol=1e-12)
        by_place = (rows[np.lexsort(rows.T)] for rows in (theirs[0], found.boxes))
        np.testing.assert_array_equal(*by_place)


def decayed(image: list[Found], method: str, iou_thr: float, sigma: float, threshold: float) -> list[Found]:
    """Bodla et al. (2017), figure 2, a box at a time."""
    done: list[Found] = []
    merged = Found(*(np.concatenate(of) for of in parts(image)))
    for label in np.unique(merged.labels):
        rows, scores = merged.boxes[merged.labels == label], merged.scores[merged.labels == label].copy()
        left = list(range(len(rows)))
        while left:
            best = left.pop(int(np.argmax(scores[left])))
            if scores[best] > threshold:
                done.append(Found(rows[[best]], scores[[best]], np.array([label])))
            overlap = boxes.iou(rows[[best]], rows[left])[0] if left else np.zeros(0)
            fade = (
                np.where(overlap > iou_thr, 1 - overlap, 1) if method == "linear" else np.exp(-(overlap**2) / sigma)
            )
            scores[left] *= fade
    return done


def test_wbf_by_hand() -> None:
    """Two boxes of two models become one, a third, elsewhere, stays as it is."""
    (found,) = boxes.wbf(one((UNIT, [0.9]), ([[0.1, 0.1, 0.5, 0.54], [0.7, 0.7, 0.9, 0.9]], [0.3, 0.8])))
    np.testing.assert_allclose(found.boxes, [[0.1, 0.1, 0.5, 0.51], [0.7, 0.7, 0.9, 0.9]])
    np.testing.assert_allclose(found.scores, [0.6, 0.4])
    assert found.labels.tolist() == [3, 3]


@pytest.mark.parametrize("conf_type", get_args(ConfType))
def test_a_model_that_weighs_nothing_is_as_good_as_absent(conf_type: ConfType) -> None:
    """The package counts it as a model, and gives NaN where its box stands alone in a cluster of two."""
    twice = [*UNIT, *UNIT]
    for fuse in (boxes.wbf, boxes.nmw, boxes.nms, boxes.soft_nms):
        named = {"conf_type": conf_type} if fuse is boxes.wbf else {}
        both = fuse(one((UNIT, [0.8]), (twice, [0.9, 0.7])), [2.0, 0.0], **named)
        alone = fuse(one((UNIT, [0.8])), [2.0], **named)
        for of, expected in zip(both[0], alone[0], strict=True):
            np.testing.assert_allclose(of, expected)
    only = boxes.wbf(one(([], []), (twice, [0.9, 0.7])), [1.0, 0.0], conf_type=conf_type)
    assert len(only[0].scores) == 0


def test_boxes_with_a_score_of_nothing_give_numbers() -> None:
    (found,) = boxes.wbf(one((UNIT, [0.0]), ([[0.1, 0.1, 0.5, 0.54]], [0.0])))
    np.testing.assert_allclose(found.boxes, [[0.1, 0.1, 0.5, 0.52]])
    assert found.scores.tolist() == [0.0]


def test_boxes_without_an_area_or_outside_are_left_out_and_corners_put_in_order() -> None:
    odd = [[0.3, 0.3, 0.3, 0.8], [0.5, 0.5, 0.1, 0.1], [1.2, 0.2, 1.5, 0.4], [-1, 0.6, 2, 0.7]]
    for fuse in (boxes.wbf, boxes.nmw, boxes.nms, boxes.soft_nms):
        (found,) = fuse(one((odd, [0.9, 0.8, 0.7, 0.6])))
        np.testing.assert_allclose(found.boxes, [[0.1, 0.1, 0.5, 0.5], [0, 0.6, 1, 0.7]])


def test_nothing_in_nothing_out() -> None:
    nothing = Found.nothing()
    for fuse in (boxes.wbf, boxes.nmw, boxes.nms, boxes.soft_nms):
        assert fuse([]) == []
        found = fuse([[nothing, nothing], one((UNIT, [0.5]), ([], []))[0], [nothing, nothing]])
        assert [len(of.scores) for of in found] == [0, 1, 0]
        assert all(of.boxes.shape == (len(of.scores), 4) for of in found)


def test_of_equal_scores_the_earlier_model_goes_first() -> None:
    shifted = [[0.1, 0.1, 0.5, 0.52]]
    for fuse in (boxes.nms, boxes.nmw):
        first, second = (fuse(one((a, [0.5]), (b, [0.5])))[0] for a, b in ((UNIT, shifted), (shifted, UNIT)))
        assert first.boxes[0, 3] < second.boxes[0, 3]


def test_an_image_is_fused_as_it_is_alone() -> None:
    """Images are worked on side by side, in blocks: neither their order nor their company may matter."""
    made = images(4, 40, boxes=30, labels=3)
    made[7] = [Found.nothing()] * 5
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
    ("made", "options", "words"),
    [
        (one((UNIT, [0.5])), {"weights": [1.0, 1.0]}, "1 models, 2 weights"),
        (one((UNIT, [0.5])), {"weights": [0.0]}, "one above 0"),
        (one((UNIT, [0.5])), {"weights": [-1.0]}, "0 or more"),
        (one((UNIT, [-0.5])), {}, "below 0"),
        (one((UNIT, [np.nan])), {}, "not finite"),
        (one((UNIT, [0.5])), {"iou_thr": 1.5}, "iou_thr=1.5"),
        (one((UNIT, [0.5])), {"conf_type": "mean"}, "conf_type 'mean'"),
        ([[Found(np.zeros((2, 4)), np.zeros(1), np.zeros(2))]], {}, "different lengths"),
    ],
)
def test_mistakes_are_named(made: list[list[Found]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        boxes.wbf(made, **options)


def test_the_benchmark_finds_both_equal() -> None:
    options = benchmark_fusion.Options(images=3, boxes=20, labels=(2,), out="memory")
    made = benchmark_fusion.made_images(options, 2)
    ours = boxes.wbf(made)
    assert benchmark_fusion.largest_difference(ours, ours) == 0
    moved = [found._replace(boxes=found.boxes + 0.5) for found in ours]
    assert benchmark_fusion.largest_difference(ours, moved) == pytest.approx(0.5)


@pytest.mark.slow
def test_wbf_takes_a_twentieth_of_the_package_s_time(tmp_path: Any) -> None:
    """1,000 images x 5 models x 100 boxes of 14 labels."""
    result = benchmark_fusion.main(benchmark_fusion.Options(labels=(14,), out=str(tmp_path)))
    assert result["metrics"]["largest_difference_14"] < 1e-6
    assert result["metrics"]["ratio_14"] > 20
