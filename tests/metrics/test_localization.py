"""Localization of hand-made boxes: correct pairs, false positives, unknown boxes, and confidence intervals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.boxes import iobb, iou
from cxr.metrics.bootstrap import resampled_means
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.metrics.localization import (
    THRESHOLDS,
    Boxes,
    Located,
    center_boxes,
    counts,
    known_places,
    locate,
    paired_gain,
    random_boxes,
    summarize,
)

FINDINGS = ("Nodule", "Mass")
NOTHING = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))


def boxes(*rows: tuple[int, int, tuple[float, float, float, float], float]) -> Boxes:
    """(image, finding, corners, score) each."""
    image, finding, corners, scores = zip(*rows, strict=True)
    return Boxes(np.array(image), np.array(finding), np.array(corners, float), np.array(scores))


TRUE = boxes(
    (0, 0, (0, 0, 10, 10), np.nan),
    (0, 0, (50, 50, 60, 60), np.nan),  # a second nodule
    (1, 1, (0, 0, 20, 20), np.nan),
    (2, 0, (0, 0, 10, 10), np.nan),
)
PREDICTED = boxes(
    (0, 0, (50, 50, 60, 65), 0.4),  # IoU 2/3 with the second nodule, IoBB 2/3
    (0, 0, (90, 90, 99, 99), 0.9),  # nowhere, and the best scored
    (0, 1, (0, 0, 10, 10), 0.8),  # no mass there
    (1, 1, (0, 0, 10, 10), 0.7),  # IoU 1/4, IoBB 1
    (3, 1, (0, 0, 5, 5), 0.5),  # unknown whether a mass is there
)
KNOWN = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], bool)


@pytest.fixture
def located() -> Located:
    shuffled = np.array([3, 1, 4, 0, 2])
    return locate(PREDICTED.at(shuffled), TRUE, KNOWN)


def test_a_pair_has_the_best_overlap_of_any_two_boxes(located: Located) -> None:
    np.testing.assert_allclose(located.best["iou"], [[2 / 3, np.nan], [np.nan, 1 / 4], [0, np.nan], [np.nan] * 2])
    np.testing.assert_allclose(located.best["iobb"], [[2 / 3, np.nan], [np.nan, 1], [0, np.nan], [np.nan] * 2])


def test_right_is_above_the_threshold_and_never_equal_to_it(located: Located) -> None:
    assert located.localized("iou", 0.25)[1, 1] == 0
    assert located.localized("iou", 0.24)[1, 1] == 1
    assert located.localized("iobb", 0.9)[1, 1] == 1
    assert np.isnan(located.localized("iou", 0.1)[0, 1])


def test_false_positives_are_counted_where_the_truth_is_known(located: Located) -> None:
    np.testing.assert_allclose(located.false_positives("iou", 0.5), [[1, 1], [0, 1], [0, 0], [0, np.nan]])
    np.testing.assert_allclose(located.false_positives("iobb", 0.5), [[1, 1], [0, 0], [0, 0], [0, np.nan]])
    np.testing.assert_array_equal(counts(located, "iou", 0.5), [[1, 0], [2, 1], [1, 2], [4, 3]])


def test_counts_of_workers_add_up(located: Located) -> None:
    parts = [located.at(np.array(images)) for images in ([0, 3], [1, 2])]
    for measure, at in (("iou", 0.1), ("iobb", 0.7)):
        total = counts(parts[0], measure, at) + counts(parts[1], measure, at)
        np.testing.assert_array_equal(total, counts(located, measure, at))


def test_findings_can_be_chosen(located: Located) -> None:
    swapped = located.of([1, 0])
    np.testing.assert_array_equal(counts(swapped, "iou", 0.5), counts(located, "iou", 0.5)[:, ::-1])
    np.testing.assert_array_equal(counts(located.of([1]), "iou", 0.1), counts(located, "iou", 0.1)[:, 1:])


def test_the_pointing_game_takes_the_best_scored_box(located: Located) -> None:
    np.testing.assert_array_equal(located.pointed, [[0, np.nan], [np.nan, 1], [0, np.nan], [np.nan, np.nan]])
    nearer = locate(PREDICTED.at(np.array([0])), TRUE, KNOWN)
    assert nearer.pointed[0, 0] == 1


def test_no_prediction_is_a_miss_without_false_positives() -> None:
    located = locate(NOTHING, TRUE, KNOWN)
    assert np.nanmax(located.best["iou"]) == 0
    rates = summarize(located, np.arange(4), FINDINGS, resamples=20)
    assert rates.at("iou", 0.1).mean == rates.false_positives["iou"][0].mean == rates.pointing.mean == 0


def test_known_findings_of_an_image() -> None:
    true = boxes((0, 0, (0, 0, 1, 1), np.nan))
    labels = np.array([[1, 1], [0, -1], [-1, 1]])
    np.testing.assert_array_equal(known_places(true, labels), [[1, 0], [1, 0], [0, 0]])


def test_columns_of_rows_and_scores_become_flat() -> None:
    corners = {"x_min": 1, "y_min": 2, "x_max": 3, "y_max": 5}
    predicted = [
        [{"label": "Mass", "score": 0.5, **corners}, {"label": "Hernia", "score": 0.4, **corners}],
        None,
        [],
        [{"label": "Nodule", "score": 0.25, **corners}],
    ]
    column = pa.chunked_array(
        [pa.array(part, pa.list_(schema.PRED_BOX_TYPE)) for part in (predicted[:2], predicted[2:])]
    )
    flat = Boxes.of(column, FINDINGS)
    assert (flat.image.tolist(), flat.finding.tolist(), flat.score.tolist()) == ([0, 3], [1, 0], [0.5, 0.25])
    scaled = flat.scaled(np.array([2, 0, 0, 10]), np.array([3, 0, 0, 100]))
    np.testing.assert_array_equal(scaled.xyxy, [[2, 6, 6, 15], [10, 200, 30, 500]])
    true = Boxes.of(
        pa.array([None, [{"label": "Mass", "reader": None, **corners}]], pa.list_(schema.BOX_TYPE)), FINDINGS
    )
    assert (true.image.tolist(), true.finding.tolist()) == ([1], [1])
    assert np.isnan(true.score).all()


def many(seed: int, images: int = 60) -> tuple[Boxes, Boxes, np.ndarray]:
    """Predicted and ground-truth boxes of images, two images per patient; predicted boxes are shifted ground-truth
    boxes."""
    rng = np.random.default_rng(seed)
    image, finding = np.repeat(np.arange(images), 2), np.tile([0, 1], images)
    low = rng.uniform(0, 60, (2 * images, 2))
    true = Boxes(image, finding, np.hstack([low, low + 20]), np.full(2 * images, np.nan))
    moved = Boxes(image, finding, true.xyxy + rng.normal(0, 5, (2 * images, 1)), rng.random(2 * images))
    return moved, true, np.ones((images, 2), bool)


def test_many_boxes_are_located_as_each_pair_alone() -> None:
    rng = np.random.default_rng(0)

    def some(count: int) -> Boxes:
        low = rng.uniform(0, 30, (count, 2))
        corners = np.hstack([low, low + rng.uniform(5, 30, (count, 2))])
        return Boxes(
            rng.integers(12, size=count), rng.integers(2, size=count), corners, rng.integers(3, size=count) / 2
        )

    predicted, true = some(60), some(25)
    known = known_places(true, rng.integers(-1, 2, (12, 2)).astype(np.int8))
    found = locate(predicted, true, known)
    for image, finding in np.ndindex(known.shape):
        ours, theirs = (b.at((b.image == image) & (b.finding == finding)) for b in (predicted, true))
        if not len(theirs.image):
            assert np.isnan([found.best["iou"][image, finding], found.pointed[image, finding]]).all()
            continue
        for name, measured in (("iou", iou), ("iobb", iobb)):
            best = measured(ours.xyxy, theirs.xyxy).max(initial=0) if known[image, finding] else 0
            assert found.best[name][image, finding] == best
        if len(ours.image) and known[image, finding]:
            x, y = ours.xyxy[np.argmax(ours.score)].reshape(2, 2).sum(0) / 2
            x0, y0, x1, y1 = theirs.xyxy.T
            assert found.pointed[image, finding] == ((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).any()


def test_rates_are_plain_means_and_lie_in_their_intervals() -> None:
    predicted, true, known = many(0)
    located, patients = locate(predicted, true, known), np.arange(60) // 2
    rates = summarize(located, patients, FINDINGS, resamples=300)
    for measure in ("iou", "iobb"):
        for at in THRESHOLDS:
            of = rates.at(measure, at)
            share = (located.best[measure] > at).mean(0)
            np.testing.assert_allclose(of.value, share)
            assert of.mean == pytest.approx(share.mean())
            assert of.mean_low <= of.mean <= of.mean_high
    assert rates.pairs.tolist() == rates.images.tolist() == [60, 60]
    assert rates.patients.tolist() == [30, 30]


def test_intervals_are_wider_where_patients_have_more_images() -> None:
    """Each image three times: the interval shrinks if the copies count as other patients, otherwise it does not."""
    values = (np.random.default_rng(0).random((40, 1)) < 0.5).astype(float).repeat(3, axis=0)
    spread = [np.std(resampled_means(values, p, 2000, 0)) for p in (np.arange(120), np.arange(120) // 3)]
    assert spread[1] == pytest.approx(spread[0] * np.sqrt(3), rel=0.1)


def test_resamples_are_those_of_the_aurocs() -> None:
    """A share that an AUROC can say too: with one negative below all but some positives."""
    rng = np.random.default_rng(0)
    labels, patients = np.array([[0], *[[1]] * 50]), np.arange(51) // 2
    scores = np.concatenate([[[0.5]], rng.integers(0, 2, (50, 1))])
    aurocs = resampled_aurocs(scores, labels, patients, 200, 3)
    means = resampled_means(np.where(labels == 1, scores, np.nan), patients, 200, 3)
    known = np.isfinite(aurocs)
    np.testing.assert_allclose(means[known], aurocs[known])


def test_a_finding_missing_from_a_resample_is_excluded_from_its_mean() -> None:
    values = np.full((30, 2), np.nan)
    values[:, 0], values[0, 1] = 1, 0  # one image alone has the second finding
    drawn = resampled_means(values, np.arange(30), 500, 0)
    lost = np.isnan(drawn[:, 1])
    assert lost.mean() == pytest.approx((29 / 30) ** 30, abs=0.07)
    assert (drawn[~lost, 1] == 0).all()


def test_paired_intervals_are_narrower_than_unpaired_ones() -> None:
    predicted, true, known = many(1)
    shrunk = Boxes(predicted.image, predicted.finding, predicted.xyxy + np.array([2, 2, -2, -2]), predicted.score)
    one, other = locate(predicted, true, known), locate(shrunk, true, known)
    patients = np.arange(60) // 2
    gain = paired_gain(one, other, patients, resamples=300)["iou"][4]
    rates = [summarize(of, patients, FINDINGS, resamples=300).at("iou", 0.5) for of in (one, other)]
    assert gain.mean == pytest.approx(rates[0].mean - rates[1].mean)
    assert gain.mean_high - gain.mean_low < rates[0].mean_high - rates[1].mean_low
    assert paired_gain(one, one, patients, resamples=20)["iou"][4].mean_high == 0


def test_baselines_look_at_no_image() -> None:
    training = boxes((0, 0, (0.1, 0.2, 0.3, 0.6), np.nan), (1, 0, (0.3, 0.2, 0.7, 0.4), np.nan))
    center = center_boxes(training, 3, 2)
    np.testing.assert_allclose(center.xyxy[center.finding == 0], [[0.2, 0.2, 0.5, 0.5]] * 3)
    np.testing.assert_allclose(center.xyxy[center.finding == 1], [[0.25, 0.25, 0.75, 0.75]] * 3)
    chance = random_boxes(training, 500, 2, seed=1)
    assert (chance.image == np.arange(500).repeat(2)).all()
    assert chance.xyxy.min() >= 0
    assert chance.xyxy.max() <= 1
    sides = chance.xyxy[:, 2:] - chance.xyxy[:, :2]
    assert {tuple(side) for side in sides[chance.finding == 0].round(6)} == {(0.2, 0.4), (0.4, 0.2)}
    assert ((sides[chance.finding == 1] > 1 / 17) & (sides[chance.finding == 1] < 0.51)).all()
    np.testing.assert_array_equal(chance.xyxy, random_boxes(training, 500, 2, seed=1).xyxy)
    assert (chance.xyxy != random_boxes(training, 500, 2, seed=2).xyxy).any()
