"""Networks that localize findings, compared on one test split: several seeds, resampled patients and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cxr.benchmarks.studies.seed_results import SeedMean, finite, mean_over_seeds
from cxr.evaluation import classification_data, localization_data
from cxr.evaluation.classification_data import LabeledScores, join
from cxr.evaluation.ground_truth_boxes import BoxTruth
from cxr.evaluation.localization_data import LocalizationEvaluation
from cxr.evaluation.run import Run, findings_of
from cxr.metrics.bootstrap import RESAMPLES, column_means, resampled_means
from cxr.metrics.classification.ranking import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.metrics.localization import MEASURES, THRESHOLDS, Located

SMALL, LARGE = ("Nodule", "Mass"), ("Cardiomegaly",)


@dataclass(frozen=True)
class LocalizationResult:
    """Results of the networks of one recipe, one per seed, on the test images; F findings with boxes."""

    name: str
    findings: tuple[str, ...]
    accuracy: dict[str, np.ndarray]  # measure -> (S, F, thresholds)
    accuracy_resamples: dict[str, np.ndarray]  # measure -> (S, R, F, thresholds), over R resamples of patients
    false_positives: dict[str, np.ndarray]  # measure -> (S, F, thresholds), predicted boxes per image
    pointing: np.ndarray  # (S, F)
    aurocs: np.ndarray  # (S,) mean AUROC over all findings; NaN without probabilities
    auroc_resamples: np.ndarray  # (S, R)
    is_baseline: bool = False  # boxes that do not depend on the image

    def at(self, measure: str, threshold: float, findings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Mean accuracy over these findings: (S,), and (S, R) in the resamples."""
        f, t = [self.findings.index(finding) for finding in findings], THRESHOLDS.index(threshold)
        return self.accuracy[measure][:, f, t].mean(1), self.accuracy_resamples[measure][:, :, f, t].mean(2)


@dataclass(frozen=True)
class Evaluated:
    """The scores of a network, compared with the truth."""

    boxes: LocalizationEvaluation
    labels: LabeledScores

    @classmethod
    def of(cls, run: Run, truth: BoxTruth) -> Evaluated:
        """Compare a run with the truth.

        Raises:
            UserError: its scores have no boxes or no probabilities, or no image has both scores and truth.
        """
        boxes = localization_data.evaluate(localization_data.load_scores(run), findings_of(run), truth)
        return cls(boxes, join(classification_data.load_scores(run), truth.labels))

    def pairs(self) -> dict[str, int]:
        """Number of images with a ground-truth box, per finding."""
        true = self.boxes.true
        found = np.unique(np.stack([true.image, true.finding]), axis=1)[1]
        return {name: int((found == number).sum()) for number, name in enumerate(self.boxes.findings)}


def summarize(name: str, networks: Sequence[Evaluated], seed: int = 0) -> LocalizationResult:
    """The results of the networks of one recipe, one per seed. Recipes can be compared only with the same `seed`."""
    labels = [network.labels for network in networks]
    aurocs = [_mean(auroc(of.probabilities, of.labels)[None])[0] for of in labels]
    resamples = [_mean(resampled_aurocs(of.probabilities, of.labels, of.patients, RESAMPLES, seed)) for of in labels]
    located = [network.boxes.located for network in networks]
    return _result(name, located, networks[0].boxes, np.array(aurocs), np.stack(resamples), seed)


def baseline_results(network: Evaluated, truth: BoxTruth, seed: int = 0) -> list[LocalizationResult]:
    """Results of random boxes and of the mean box of the training images, on the images of a network."""
    boxes, no_auroc = network.boxes, np.full((1, RESAMPLES), math.nan)
    predictions = localization_data.baseline_boxes(boxes, truth.training_boxes(boxes.findings), seed)
    results = [_result(name, [of], boxes, no_auroc[:, 0], no_auroc, seed) for name, of in predictions.items()]
    return [replace(result, is_baseline=True) for result in results]


def _result(
    name: str,
    located: Sequence[Located],
    of_images: LocalizationEvaluation,
    aurocs: np.ndarray,
    auroc_resamples: np.ndarray,
    seed: int,
) -> LocalizationResult:
    shape = len(of_images.findings), len(THRESHOLDS)

    def values(of: Located, kind: str, measure: str) -> np.ndarray:
        """(N, F · thresholds)."""
        return np.stack([getattr(of, kind)(measure, at) for at in THRESHOLDS], 2).reshape(len(of.known), -1)

    def means(kind: str) -> dict[str, np.ndarray]:
        return {m: np.stack([column_means(values(of, kind, m)).reshape(shape) for of in located]) for m in MEASURES}

    accuracy_resamples = {
        m: np.stack(
            [
                resampled_means(values(of, "localized", m), of_images.patients, RESAMPLES, seed).reshape(-1, *shape)
                for of in located
            ]
        )
        for m in MEASURES
    }
    return LocalizationResult(
        name=name,
        findings=of_images.findings,
        accuracy=means("localized"),
        accuracy_resamples=accuracy_resamples,
        false_positives=means("false_positives"),
        pointing=np.stack([column_means(of.pointed) for of in located]),
        aurocs=aurocs,
        auroc_resamples=auroc_resamples,
    )


def _mean(values_RF: np.ndarray) -> np.ndarray:
    """(R,) mean over the findings with a value; NaN if there are none."""
    return column_means(values_RF.T)


def accuracy(result: LocalizationResult, measure: str, threshold: float, findings: Sequence[str]) -> SeedMean:
    """Mean accuracy over some findings."""
    return mean_over_seeds(*result.at(measure, threshold, findings))


def accuracy_gain(
    result: LocalizationResult, baseline: LocalizationResult, measure: str, threshold: float, findings: Sequence[str]
) -> SeedMean:
    """Mean accuracy over some findings minus that of the baseline, on the same resampled patients and seeds."""
    values, resamples = result.at(measure, threshold, findings)
    baseline_values, baseline_resamples = baseline.at(measure, threshold, findings)
    return mean_over_seeds(values - baseline_values, resamples - baseline_resamples)


def auroc_gain(result: LocalizationResult, baseline: LocalizationResult) -> SeedMean:
    """Mean AUROC minus that of the baseline."""
    return mean_over_seeds(result.aurocs - baseline.aurocs, result.auroc_resamples - baseline.auroc_resamples)


def gains(result: LocalizationResult, baseline: LocalizationResult, threshold: float = 0.3) -> dict[str, SeedMean]:
    """Gains over the baseline: accuracy for small and for large findings, if any have boxes, and mean AUROC."""
    key = f"iou_{100 * threshold:.0f}"
    groups = {"small": SMALL, "large": LARGE}
    present = {name: [f for f in group if f in result.findings] for name, group in groups.items()}
    accuracies = {
        f"{name}_gain_{key}": accuracy_gain(result, baseline, "iou", threshold, findings)
        for name, findings in present.items()
        if findings
    }
    return accuracies | {"auroc_gain": auroc_gain(result, baseline)}


def metrics(results: Sequence[LocalizationResult], gains: Mapping[str, SeedMean]) -> dict[str, float]:
    """Finite metrics by name: NAME_accuracy_iou_30 of all findings and /FINDING, NAME_auroc, and the gains."""
    means = dict(gains)
    for result in results:
        for at in (0.1, 0.3, 0.5):
            key = f"{result.name}_accuracy_iou_{100 * at:.0f}"
            means[key] = accuracy(result, "iou", at, result.findings)
            means |= {f"{key}/{finding}": accuracy(result, "iou", at, [finding]) for finding in result.findings}
        means[f"{result.name}_auroc"] = mean_over_seeds(result.aurocs, result.auroc_resamples)
    return finite(means)
