"""Metrics of classifiers, against scikit-learn, slow definitions and what must not change them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from cxr.metrics import classification as ours
from cxr.metrics.bootstrap import resample
from cxr.metrics.classification.ranking import precision_recall_curve, roc_curve
from cxr.metrics.classification.resampled_auroc import resampled_aurocs

FINDINGS = ("a", "b", "c", "d")


def made(seed: int, images: int = 300, steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties and labels with unknowns, some signal in each finding."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, 4)) < [0.5, 0.2, 0.1, 0.03]).astype(np.int8)
    labels[:2] = [[1] * 4, [0] * 4]
    scores = np.clip(rng.normal(0.35, 0.2, labels.shape) + 0.2 * labels, 0, 1)
    labels[2:][rng.random((images - 2, 4)) < 0.15] = -1
    return np.round(scores * steps) / steps, labels


def each(function, scores: np.ndarray, labels: np.ndarray) -> list[float]:
    """A function of scikit-learn on every finding's known entries."""
    known = labels != -1
    return [function(labels[known[:, f], f], scores[known[:, f], f]) for f in range(labels.shape[1])]


def close(found: np.ndarray, wanted: list[float]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


def sensitivity_at_90(labels: np.ndarray, scores: np.ndarray) -> float:
    false, true, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    return true[false <= 0.1 + 1e-9].max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (ours.auroc, sk.roc_auc_score),
        (ours.average_precision, sk.average_precision_score),
        (ours.brier, sk.brier_score_loss),
        (ours.sensitivity_at, sensitivity_at_90),
    ],
)
def test_figures_are_those_of_scikit_learn(function, wanted, seed: int) -> None:
    for steps in (5, 40, 10**6):
        scores, labels = made(seed, steps=steps)
        close(function(scores, labels), each(wanted, scores, labels))


@pytest.mark.parametrize("thresholds", [(0.3, 0.5, 0.45, 0.7), (0.0, 1.1, 0.5, 0.5)])
def test_decisions_are_those_of_scikit_learn(thresholds: tuple[float, ...]) -> None:
    scores, labels = made(1)
    found = ours.decisions(scores >= np.array(thresholds), labels)
    predicted_positive = (scores >= thresholds).astype(int)
    close(found.accuracy, each(sk.accuracy_score, predicted_positive, labels))
    for name, function in {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}.items():
        close(
            getattr(found, name),
            each(lambda y, c, f=function: f(y, c, zero_division=math.nan), predicted_positive, labels),
        )


def test_curves_are_those_of_scikit_learn() -> None:
    scores, labels = made(2)
    known = labels[:, 1] != -1
    y, s = labels[known, 1], scores[known, 1]
    false, true = roc_curve(scores[:, 1], labels[:, 1])
    wanted = sk.roc_curve(y, s, drop_intermediate=False)
    np.testing.assert_allclose([false, true], wanted[:2])
    precision, recall = precision_recall_curve(scores[:, 1], labels[:, 1])
    wanted = sk.precision_recall_curve(y, s)
    np.testing.assert_allclose([precision[::-1], recall[::-1]], [w[:-1] for w in wanted[:2]])


def test_calibration_error_by_its_definition() -> None:
    scores, labels = made(3, steps=10**6)
    wanted = []
    for f in range(4):
        pairs = [(s, y) for s, y in zip(scores[:, f], labels[:, f], strict=True) if y != -1]
        bins = [
            [pair for pair in pairs if i / 15 <= pair[0] < (i + 1) / 15 or (pair[0], i) == (1, 14)] for i in range(15)
        ]
        wanted.append(sum(abs(sum(s for s, _ in b) - sum(y for _, y in b)) for b in bins) / len(pairs))
    close(ours.calibration_error(scores, labels), wanted)
    assert ours.reliability(np.ones((2, 1)), np.ones((2, 1), int)).counts[0].tolist() == [0] * 14 + [2]


def test_a_single_class_is_not_measured_and_noted() -> None:
    scores, labels = made(4)
    labels[labels[:, 0] == 1, 0] = 0
    labels[:, 1] = -1
    labels[labels[:, 2] == 0, 2] = 1
    for function in (ours.auroc, ours.average_precision, ours.sensitivity_at):
        assert np.isfinite(function(scores, labels)).tolist() == [False, False, False, True]
    assert np.isfinite(ours.brier(scores, labels)).tolist() == [True, False, True, True]
    found = ours.summarize(scores, labels, scores > 0.5, np.arange(300), FINDINGS, resamples=50)
    negatives, positives = (labels[:, 0] == 0).sum(), (labels[:, 2] == 1).sum()
    assert [row.note for row in found.rows[:3]] == [
        f"no positive among {negatives} images",
        "no known label",
        f"no negative among {positives} images",
    ]
    assert (found.rows[1].unknown, found.mean.positives) == (300, positives + found.rows[3].positives)
    assert found.mean.auroc == found.rows[3].auroc
    assert found.mean.note == "AUROC of 1 of 4 findings"
    chosen = ours.choose_thresholds(scores, labels)
    assert chosen.values[:3].tolist() == [0.5] * 3
    assert [bool(note) for note in chosen.notes] == [True, True, True, False]


def test_empty_input_does_not_crash() -> None:
    scores, labels = np.zeros((0, 4)), np.zeros((0, 4), np.int8)
    found = ours.summarize(scores, labels, scores > 0.5, np.array([], str), FINDINGS, resamples=20)
    assert math.isnan(found.mean.auroc)
    assert ours.choose_thresholds(scores, labels).values.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([[np.nan]], [[1]]), ([[1.5]], [[0]]), ([[0.5]], [[2]]), ([[0.5, 0.5]], [[1]]), ([0.5], [1])],
)
def test_invalid_probabilities_and_labels_are_rejected(scores: list, labels: list) -> None:
    with pytest.raises(ValueError, match="expected"):
        ours.auroc(np.array(scores), np.array(labels))


def test_scores_of_unknown_labels_are_ignored() -> None:
    scores, labels = made(5)
    wanted = ours.auroc(scores, labels)
    scores[labels == -1] = np.nan
    np.testing.assert_array_equal(ours.auroc(scores, labels), wanted)
    assert np.isfinite(ours.calibration_error(scores, labels)).all()


@pytest.mark.parametrize("rule", ["youden", "f1", "specificity"])
@pytest.mark.parametrize("steps", [7, 10**6])
def test_no_threshold_is_better_than_the_chosen(rule: ours.thresholds.Rule, steps: int) -> None:  # type: ignore[name-defined]
    scores, labels = made(6, steps=steps)
    chosen = ours.choose_thresholds(scores, labels, rule)

    def worth(thresholds: np.ndarray) -> np.ndarray:
        made_ = ours.decisions(scores >= thresholds, labels)
        specificity = ((scores < thresholds) & (labels == 0)).sum(0) / (labels == 0).sum(0)
        if rule == "f1":
            return made_.f1
        return made_.recall + specificity if rule == "youden" else np.where(specificity >= 0.9, made_.recall, 0)

    best = np.max([worth(np.full(4, t)) for t in [*np.unique(scores), 1.01]], axis=0)
    close(worth(chosen.values), best)


def test_thresholds_mean_the_same_in_both_precisions_and_after_json() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((200, 4), np.float32)
    scores[:100] = np.nextafter(scores[100:], np.float32(1))  # neighbors
    labels = (rng.random((200, 4)) < 0.3).astype(np.int8)
    chosen = ours.choose_thresholds(scores, labels, "f1")
    stored = np.array(json.loads(json.dumps(chosen.describe()))["values"])
    np.testing.assert_array_equal(scores >= chosen.values, scores >= stored.astype(np.float32))
    assert chosen.describe()["positives"] == (labels == 1).sum(0).tolist()


def test_a_threshold_above_all_scores() -> None:
    scores, labels = np.array([[1.0], [1.0], [0.2]]), np.array([[0], [0], [1]])
    chosen = ours.choose_thresholds(scores, labels, "specificity")
    assert (scores >= chosen.values).sum() == 0
    with pytest.raises(ValueError, match="youden, f1, specificity"):
        ours.choose_thresholds(scores, labels, "best")  # type: ignore[arg-type]


def resampled_slowly(
    scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, times: dict[int, int]
) -> list[float]:
    rows = np.array([i for i, patient in enumerate(patients) for _ in range(times[patient])])
    return each(sk.roc_auc_score, scores[rows], labels[rows])


def test_a_resample_equals_recounting_its_images() -> None:
    scores, labels = made(7)
    patients = np.random.default_rng(0).integers(80, size=300)
    ids = np.unique(patients)
    times = resample(len(ids), 5, 3, np.transpose).T
    found = resampled_aurocs(scores, labels, patients, 5, 3)
    wanted = [resampled_slowly(scores, labels, patients, dict(zip(ids, column, strict=True))) for column in times.T]
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    assert times.sum(0).tolist() == [len(ids)] * 5


def test_a_patients_images_are_no_more_evidence_when_doubled() -> None:
    scores, labels = made(8)
    patients = np.array([f"patient {i // 2}" for i in range(300)])
    once = ours.auroc_intervals(scores, labels, patients, resamples=200)
    twice = ours.auroc_intervals(*(np.concatenate([x, x]) for x in (scores, labels, patients)), resamples=200)
    for name in ("value", "low", "high"):
        close(getattr(twice, name), getattr(once, name))
    assert (twice.mean_low, twice.mean_high) == pytest.approx((once.mean_low, once.mean_high))
    strangers = ours.auroc_intervals(
        *(np.concatenate([x, x]) for x in (scores, labels)), np.arange(600), resamples=200
    )
    assert strangers.mean_high - strangers.mean_low < 0.85 * (once.mean_high - once.mean_low)


def test_the_interval_covers_the_true_value_at_its_nominal_rate() -> None:
    """Normal scores one deviation apart have an AUROC of Φ(1/√2) = .7602; patients of three like images."""
    truth = 0.5 * (1 + math.erf(0.5))
    labels = np.repeat((np.arange(120) % 3 == 0).astype(np.int8), 3)[:, None]
    patients = np.repeat(np.arange(120), 3)
    hits = 0
    for seed in range(120):
        logits = np.repeat(np.random.default_rng(seed).normal(size=120), 3)[:, None] + labels
        found = ours.auroc_intervals(1 / (1 + np.exp(-logits)), labels, patients, resamples=200, seed=seed)
        hits += found.low[0] <= truth <= found.high[0]
    assert 0.86 <= hits / 120 <= 0.99


def test_resamples_without_a_class_are_left_out_and_counted() -> None:
    scores, labels = np.linspace(0, 1, 20)[:, None].repeat(2, 1), np.zeros((20, 2), np.int8)
    labels[::2, 0] = labels[15, 1] = 1
    found = ours.auroc_intervals(scores, labels, np.arange(20), resamples=2000)
    assert found.left_out[0] == 0
    assert found.left_out[1] / 2000 == pytest.approx((1 - 1 / 20) ** 20, abs=0.03)
    assert found.mean_incomplete == found.left_out[1]
    assert np.isfinite([found.low, found.high]).all()


def delong_slowly(scores: np.ndarray, others: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Difference, standard error and p by the definition: kernels of all pairs, covariance of their means."""
    areas, wins, losses = [], [], []
    for values in (scores, others):
        positive, negative = values[labels == 1], values[labels == 0]
        kernel = np.array([[1.0 if p > n else 0.5 if p == n else 0.0 for n in negative] for p in positive])
        areas.append(kernel.mean())
        wins.append(kernel.mean(1))
        losses.append(kernel.mean(0))
    covariance = np.cov(wins) / len(wins[0]) + np.cov(losses) / len(losses[0])
    error = math.sqrt(np.array([1, -1]) @ covariance @ np.array([1, -1]))
    difference = areas[0] - areas[1]
    return difference, error, 2 * (1 - 0.5 * (1 + math.erf(abs(difference) / error / math.sqrt(2))))


def rival(scores: np.ndarray, seed: int) -> np.ndarray:
    return np.clip(np.round((scores + np.random.default_rng(seed).normal(0, 0.15, scores.shape)) * 30) / 30, 0, 1)


def test_delong_equals_its_definition() -> None:
    scores, labels = made(9)
    others = rival(scores, 1)
    found = ours.delong(scores, others, labels)
    for f in range(4):
        difference, error, p = delong_slowly(scores[:, f], others[:, f], labels[:, f])
        assert found.difference[f] == pytest.approx(difference)
        assert found.high[f] - found.low[f] == pytest.approx(2 * 1.959963985 * error)
        assert found.p[f] == pytest.approx(p, abs=1e-9)
    close(found.auroc, each(sk.roc_auc_score, scores, labels))
    close(found.other, each(sk.roc_auc_score, others, labels))


def test_delong_and_the_bootstrap_agree_where_each_image_is_a_patient() -> None:
    scores, labels = made(10, images=1500)
    others = rival(scores, 2)
    found = ours.delong(scores, others, labels)
    gain = ours.paired_gain(scores, others, labels, np.arange(1500), resamples=600)
    close(found.difference, gain.value.tolist())
    np.testing.assert_allclose(gain.high - gain.low, found.high - found.low, rtol=0.15)
    assert gain.mean == pytest.approx(found.difference.mean())
    assert gain.mean_low < gain.mean < gain.mean_high


def test_delong_does_not_claim_significance_without_evidence() -> None:
    scores, labels = made(11)
    same = ours.delong(scores, scores**2, labels)
    assert same.difference.tolist() == [0] * 4
    assert same.p.tolist() == [1] * 4
    few = ours.delong(scores[:2], 1 - scores[:2], labels[:2])
    assert np.isnan(few.p).all()
    perfect = np.array([[0.1], [0.2], [0.8], [0.9]])
    assert np.isnan(ours.delong(perfect, 1 - perfect, np.array([[0], [0], [1], [1]])).p).all()
    assert np.isnan(ours.delong(scores, scores, np.zeros_like(labels)).auroc).all()


def test_the_summary_has_each_metric_in_its_row() -> None:
    scores, labels = made(12)
    labels[np.flatnonzero(labels[:, 3] == 1)[5:], 3] = -1
    patients = np.arange(300) // 2
    found = ours.summarize(scores, labels, scores >= 0.5, patients, FINDINGS, resamples=100, specificity=0.8)
    assert [row.finding for row in found.rows] == list(FINDINGS)
    close(np.array([row.sensitivity for row in found.rows]), ours.sensitivity_at(scores, labels, 0.8).tolist())
    close(
        np.array([row.recall for row in found.rows]),
        ours.decisions(scores >= 0.5, labels).recall.tolist(),
    )
    close(np.array([row.calibration_error for row in found.rows]), ours.calibration_error(scores, labels).tolist())
    assert found.mean.auroc == pytest.approx(ours.auroc(scores, labels).mean())
    assert found.mean.auroc_low < found.mean.auroc < found.mean.auroc_high
    assert (found.images, found.patients, found.resamples) == (300, 150, 100)
    assert found.rows[3].note == "5 patients with it: too few to trust the interval"
    assert found.rows[0].note == ""


@pytest.mark.parametrize("rule", ["sensitivity", "ppv"])
@pytest.mark.parametrize("steps", [7, 10**6])
def test_no_threshold_with_the_minimum_is_better_than_the_chosen(rule: ours.thresholds.Rule, steps: int) -> None:  # type: ignore[name-defined]
    scores, labels = made(6, steps=steps)
    chosen = ours.choose_thresholds(scores, labels, rule, 0.5)

    def worth(thresholds: np.ndarray) -> np.ndarray:
        made_ = ours.decisions(scores >= thresholds, labels)
        specificity = ((scores < thresholds) & (labels == 0)).sum(0) / (labels == 0).sum(0)
        if rule == "ppv":
            return np.where(made_.precision >= 0.5, made_.recall, 0)
        return np.where(made_.recall >= 0.5, specificity, -1)

    best = np.max([worth(np.full(4, t)) for t in [*np.unique(scores), 1.01]], axis=0)
    close(worth(chosen.values)[chosen.reached], best[chosen.reached])
    assert (best[~chosen.reached] <= 0).all()


def test_a_minimum_that_no_threshold_reaches_is_noted() -> None:
    scores, labels = np.array([[0.9], [0.8], [0.1]]), np.array([[0], [1], [0]])
    chosen = ours.choose_thresholds(scores, labels, "ppv", 0.6)
    assert chosen.notes == ["not chosen: no threshold has a ppv of at least 0.6"]
    assert chosen.values.tolist() == [0.5]


def test_criteria_are_written_as_they_are_read() -> None:
    for text in ("youden", "f1", "specificity:0.9", "sensitivity:0.95", "ppv:1"):
        assert str(ours.Criterion.parse(text)) == text


def test_resampled_thresholds_are_those_of_the_resampled_images() -> None:
    scores, labels = made(7, steps=9)
    patients = np.arange(len(scores)) // 3
    criterion = ours.Criterion("sensitivity", 0.8)
    fast = ours.resampled_thresholds(scores[:, 0], labels[:, 0], patients, criterion, resamples=70, seed=3)
    times = resample(patients.max() + 1, 70, 3, np.transpose).T
    for number in (0, 5, 69):
        rows = np.repeat(np.arange(len(scores)), times[patients, number])
        slow = ours.choose_thresholds(scores[rows, :1], labels[rows, :1], "sensitivity", 0.8).values[0]
        same = (scores[:, 0] >= fast[number]) == (scores[:, 0] >= slow)
        assert same[times[patients, number] > 0].all()


def test_operating_points_are_shares_of_counts_with_intervals_by_patient() -> None:
    scores, labels = made(8)
    patients = np.arange(len(scores)) // 2
    points = ours.operating_points(scores >= 0.5, labels, patients, resamples=200)
    for f, point in enumerate(points):
        called, known = scores[:, f] >= 0.5, labels[:, f] >= 0
        positive = labels[:, f] == 1
        assert point.true_positives == (called & positive).sum()
        assert point.false_positives == (called & known & ~positive).sum()
        assert point.true_positives + point.false_negatives == positive.sum()
        assert point.true_negatives + point.false_positives == (labels[:, f] == 0).sum()
        close(point.ppv.value, point.true_positives / (point.true_positives + point.false_positives))
        close(point.npv.value, point.true_negatives / (point.true_negatives + point.false_negatives))
        close(point.sensitivity.value, ours.decisions(scores >= 0.5, labels).recall[f])
        for share in (point.sensitivity, point.specificity, point.ppv, point.npv):
            assert share.low <= share.value <= share.high
    nothing = ours.operating_points(np.zeros_like(labels), labels, patients, resamples=20)[0]
    assert math.isnan(nothing.ppv.value)
    assert (nothing.sensitivity.value, nothing.specificity.high) == (0, 1)
