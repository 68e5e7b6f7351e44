"""Average precision, image labels and confusions on boxes whose metrics can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cxr.metrics import detection
from cxr.metrics.detection import VOC_IOUS, Curve
from cxr.metrics.localization import Boxes

UNIT = np.array([0.0, 0, 10, 10])


def shifted(by: float) -> list[float]:
    """A box of 10 x 10 at `by` in x: its IoU with that at 0 is (10 − by) / (10 + by)."""
    return [by, 0, 10 + by, 10]


def boxes(rows: list[tuple[int, int, list[float], float]]) -> Boxes:
    """From image, finding, xyxy and score."""
    image, finding, xyxy, score = zip(*rows, strict=True) if rows else ([], [], [], [])
    return Boxes(
        np.array(image, int), np.array(finding, int), np.array(xyxy, float).reshape(-1, 4), np.array(score, float)
    )


def drawn(seed: int, images: int, per_image: int, findings: int, true: int) -> tuple[Boxes, Boxes]:
    """Predicted boxes, a third of them near ground-truth boxes, and the ground-truth boxes."""
    rng = np.random.default_rng(seed)
    image, finding = rng.integers(images, size=true), rng.integers(findings, size=true)
    low = rng.uniform(0, 70, (true, 2))
    there = Boxes(image, finding, np.hstack([low, low + rng.uniform(5, 30, (true, 2))]), np.full(true, np.nan))
    count = images * per_image
    of, near = rng.integers(true, size=count), rng.random(count) < 0.3
    low = rng.uniform(0, 70, (count, 2))
    edges = np.hstack([low, low + rng.uniform(5, 30, (count, 2))])
    close = there.xyxy[of] + rng.uniform(-3, 3, (count, 4))
    close = np.hstack([np.minimum(close[:, :2], close[:, 2:]), np.maximum(close[:, :2], close[:, 2:])])
    predicted = Boxes(
        np.where(near, image[of], rng.integers(images, size=count)),
        np.where(near, finding[of], rng.integers(findings, size=count)),
        np.where(near[:, None], close, edges),
        rng.random(count),
    )
    return predicted, there


def plain_voc(predicted: Boxes, true: Boxes, finding: int, iou: float) -> float:
    """Everingham et al.'s procedure, a box at a time; scores are distinct."""
    own = np.flatnonzero(predicted.finding == finding)
    targets = np.flatnonzero(true.finding == finding)
    taken, right = set(), []
    for row in own[np.argsort(-predicted.score[own])]:
        x0, y0, x1, y1 = predicted.xyxy[row]
        best, overlap = -1, -1.0
        for target in targets[true.image[targets] == predicted.image[row]]:
            a0, b0, a1, b1 = true.xyxy[target]
            shared = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
            measured = shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared)
            if measured > overlap:
                best, overlap = target, measured
        right.append(overlap > iou and best not in taken)
        if right[-1]:
            taken.add(best)
    hits = np.cumsum(right)
    recall, precision = hits / len(targets), hits / np.arange(1, len(hits) + 1)
    recall, precision = np.array([0, *recall, 1]), np.array([0, *precision, 0])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    return float((np.diff(recall) * precision[1:]).sum())


@pytest.mark.parametrize("iou", VOC_IOUS)
def test_voc_is_that_of_the_procedure(iou: float) -> None:
    predicted, true = drawn(0, images=30, per_image=20, findings=3, true=80)
    expected = [plain_voc(predicted, true, finding, iou) for finding in range(3)]
    assert 0.1 < min(expected) < 0.95
    np.testing.assert_allclose(detection.average_precisions(predicted, true, 3, iou), expected)


def test_a_second_match_of_a_true_box_is_a_false_positive() -> None:
    """Right at .9, wrong the second time at .8, right at .7: precision 1, then 2/3."""
    true = boxes([(0, 0, shifted(0), 0), (1, 0, shifted(0), 0)])
    predicted = boxes([(0, 0, shifted(0), 0.9), (0, 0, shifted(1), 0.8), (1, 0, shifted(0), 0.7)])
    np.testing.assert_allclose(detection.average_precisions(predicted, true, 1, 0.4), [(1 + 2 / 3) / 2])


def test_an_iou_at_the_threshold_matches_in_coco_but_not_in_voc() -> None:
    true, predicted = boxes([(0, 0, [0, 0, 10, 10], 0)]), boxes([(0, 0, [0, 0, 10, 5], 0.9)])
    assert detection.average_precisions(predicted, true, 1, 0.5)[0] == 0
    assert detection.average_precisions(predicted, true, 1, 0.499)[0] == 1
    coco = detection.coco_average_precisions(predicted, true, 1)
    assert coco[:, 0].tolist() == [1] + [0] * 9


def test_voc_matches_the_best_true_box_and_coco_the_best_unmatched_one() -> None:
    true = boxes([(0, 0, shifted(0), 0), (0, 0, shifted(3), 0)])
    predicted = boxes([(0, 0, shifted(0), 0.9), (0, 0, shifted(1), 0.8)])
    assert detection.average_precisions(predicted, true, 1, 0.5)[0] == 0.5
    assert detection.coco_average_precisions(predicted, true, 1)[0, 0] == pytest.approx(1)


def test_coco_reads_101_recalls_off_the_curve() -> None:
    """Two of three predicted, the second after a wrong one: 34 recalls at 1, 33 at 2/3, the rest at 0."""
    true = boxes([(image, 0, shifted(0), 0) for image in range(3)])
    predicted = boxes([(0, 0, shifted(0), 0.9), (0, 0, shifted(90), 0.8), (1, 0, shifted(0), 0.7)])
    assert detection.coco_average_precisions(predicted, true, 1)[0, 0] == pytest.approx((34 + 33 * 2 / 3) / 101)


def test_coco_looks_at_a_hundred_boxes_of_an_image_and_finding() -> None:
    true = boxes([(0, 0, shifted(0), 0)])
    wrong = [(0, 0, shifted(90), 1 - 0.001 * number) for number in range(100)]
    predicted = boxes([*wrong, (0, 0, shifted(0), 0.1), (0, 1, shifted(0), 0.2)])
    assert detection.coco_average_precisions(predicted, true, 1)[0, 0] == 0
    assert detection.average_precisions(predicted, true, 1, 0.4)[0] == pytest.approx(1 / 101)


def test_boxes_with_equal_scores_count_together_in_any_order() -> None:
    true = boxes([(0, 0, shifted(0), 0)])
    predicted = boxes([(0, 0, shifted(0), 0.5), (0, 0, shifted(90), 0.5)])
    for order in ([0, 1], [1, 0]):
        assert detection.average_precisions(predicted.at(np.array(order)), true, 1, 0.4)[0] == 0.5


def test_the_highest_f1_is_that_of_the_best_score_to_count_from() -> None:
    predicted, true = drawn(3, 12, 6, 2, 20)
    rounded = Boxes(predicted.image, predicted.finding, predicted.xyxy, predicted.score.round(1))
    for finding, curve in enumerate(
        detection.summarize(rounded, true, np.arange(12), ["a", "b"], resamples=2).curves
    ):
        tried = {}
        for score in np.unique(rounded.score[rounded.finding == finding]):
            some = rounded.at((rounded.score >= score) & (rounded.finding == finding))
            right = detection.true_positives(some, true, VOC_IOUS[0]).sum()
            tried[score] = 2 * right / (len(some.score) + (true.finding == finding).sum())
        f1, score = curve.best_f1()
        assert f1 == pytest.approx(max(tried.values())) == tried[score]
        assert 0 < f1 < 1


def test_findings_without_truth_are_left_out_and_named_and_those_without_predicted_boxes_are_nought() -> None:
    true, predicted = boxes([(0, 0, shifted(0), 0), (0, 2, shifted(0), 0)]), boxes([(0, 0, shifted(0), 0.9)])
    predicted = boxes([(0, 0, shifted(0), 0.9), (0, 1, shifted(0), 0.9)])
    summary = detection.summarize(predicted, true, np.arange(1), ["a", "b", "c"], resamples=10)
    assert summary.without_truth == ["b"]
    assert summary.voc[0.4].value.tolist() == pytest.approx([1, np.nan, 0], nan_ok=True)
    assert (summary.voc[0.4].mean, summary.map_50_95) == (0.5, pytest.approx(0.5))
    assert (summary.true.tolist(), summary.predicted.tolist()) == ([1, 0, 1], [1, 1, 0])
    best = [curve.best_f1() for curve in summary.curves]
    assert best == [(1, 0.9), pytest.approx((np.nan, np.nan), nan_ok=True), pytest.approx((0, np.nan), nan_ok=True)]


def test_false_positives_count_per_image_in_which_the_finding_is_known() -> None:
    """Images in which a finding is unknown allow no more false positives, as they can have none."""
    images = 10
    true = boxes([(image, 0, shifted(0), 0) for image in range(images)])
    predicted = boxes(
        [(image, 0, shifted(step), 0.6 + step / 100) for image in range(images) for step in (30, 20, 10)]
        + [(image, 0, shifted(0), 0.3) for image in range(images)]
    )
    alone = detection.summarize(predicted, true, np.arange(images), ["a"], resamples=2)
    known = np.arange(10 * images)[:, None] < images
    among_others = detection.summarize(predicted, true, np.arange(10 * images), ["a"], known_NF=known, resamples=2)
    assert among_others.known_images.tolist() == [images]
    np.testing.assert_array_equal(among_others.froc, alone.froc)
    assert alone.froc[0].tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_no_boxes_at_all() -> None:
    summary = detection.summarize(boxes([]), boxes([]), np.arange(3), ["a"], resamples=10)
    assert np.isnan([summary.voc[0.4].mean, summary.map_50_95]).all()


def test_a_resample_equals_recomputing_on_its_images() -> None:
    """Reference for the bootstrap's weights: images that are sampled twice are repeated."""
    predicted, true = drawn(1, images=12, per_image=10, findings=2, true=30)
    predicted = Boxes(predicted.image, predicted.finding, predicted.xyxy, np.round(predicted.score, 1))
    patients = np.arange(12) // 2
    sure = detection.summarize(predicted, true, patients, ["a", "b"], resamples=1, seed=3).voc[0.4]
    drawn_patients = np.random.default_rng(3).integers(6, size=(1, 6))[0]
    images = [image for patient in drawn_patients for image in (2 * patient, 2 * patient + 1)]
    copies = [_renamed(of, images) for of in (predicted, true)]
    expected = detection.average_precisions(*copies, 2, 0.4)
    np.testing.assert_allclose(sure.low, expected)
    np.testing.assert_allclose(sure.high, expected)


def _renamed(of: Boxes, images: list[int]) -> Boxes:
    """The boxes of these images, one after the other, the n-th being image n."""
    rows = [np.flatnonzero(of.image == image) for image in images]
    image = np.repeat(np.arange(len(images)), [len(part) for part in rows])
    kept = of.at(np.concatenate(rows))
    return Boxes(image, kept.finding, kept.xyxy, kept.score)


def test_intervals_contain_the_value() -> None:
    predicted, true = drawn(2, images=60, per_image=20, findings=2, true=150)
    sure = detection.summarize(predicted, true, np.arange(60), ["a", "b"], resamples=200).voc[0.4]
    assert (sure.low < sure.value).all()
    assert (sure.value < sure.high).all()
    assert sure.mean_low < sure.mean < sure.mean_high


def test_labels_and_probabilities_of_images() -> None:
    predicted = boxes([(0, 0, shifted(0), 0.3), (0, 0, shifted(9), 0.8), (0, 1, shifted(0), 0.4)])
    np.testing.assert_allclose(detection.image_probabilities(predicted, 2, 2), [[0.8, 0.4, 0.2], [0, 0, 1]])
    known = np.array([[True, True], [True, True], [True, False]])
    labels = detection.image_labels(boxes([(0, 1, shifted(0), 0)]), known)
    assert labels.tolist() == [[0, 1, 0], [0, 0, 1], [0, -1, -1]]


def test_confusion_matrix_with_background() -> None:
    """Finding 0 predicted as 1; a box far from all others; a missed ground-truth box; a box below the minimum
    score."""
    true = boxes([(0, 0, shifted(0), 0), (0, 1, shifted(50), 0), (1, 1, shifted(0), 0)])
    predicted = boxes(
        [
            (0, 1, shifted(1), 0.9),
            (0, 0, shifted(3), 0.95),
            (0, 1, shifted(50), 0.5),
            (0, 0, shifted(80), 0.5),
            (1, 1, shifted(0), 0.1),
        ]
    )
    counts = detection.confusion(predicted, true, 2, iou=0.4, score=0.25)
    assert counts.tolist() == [[0, 0, 2], [1, 1, 0], [0, 1, 0]]


def test_froc_counts_the_true_boxes_found_within_so_many_false_ones() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    curve = Curve.of(scores, np.array([True, False, True, False, True]), true=4)
    assert [curve.sensitivity_at(most) for most in (0, 0.9, 1, 2)] == [0.25, 0.25, 0.5, 0.75]
    assert math.isnan(Curve.of(scores, np.zeros(5, bool), true=0).sensitivity_at(1))
    assert Curve.of(scores[:0], np.zeros(0, bool), true=3).sensitivity_at(1) == 0
