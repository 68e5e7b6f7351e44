"""Networks that localize findings, compared on one test split: several seeds, resampled patients and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cxr import schema
from cxr.benchmarks.studies.boxed_xrays import BoxedXRays
from cxr.benchmarks.studies.xrays import patients_of
from cxr.errors import UserError
from cxr.families.checkpoint import Checkpoint
from cxr.metrics.bootstrap import ENDS, RESAMPLES, column_means, resampled_means
from cxr.metrics.classification.ranking import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.metrics.localization import MEASURES, THRESHOLDS, Boxes, Located, baselines

SMALL, LARGE = ("Nodule", "Mass"), ("Cardiomegaly",)


@dataclass(frozen=True)
class Judged:
    """Results of the networks of one recipe, one per seed, on the test images; F findings with boxes."""

    name: str
    findings: tuple[str, ...]
    accuracy: dict[str, np.ndarray]  # measure -> (S, F, thresholds)
    drawn: dict[str, np.ndarray]  # measure -> (S, R, F, thresholds), in each resample of patients
    wrong: dict[str, np.ndarray]  # measure -> (S, F, thresholds) found boxes that do not pass, an image
    pointing: np.ndarray  # (S, F)
    aurocs: np.ndarray  # (S,) mean AUROC over all findings; NaN of what gives no probabilities
    drawn_aurocs: np.ndarray  # (S, R)

    def at(self, measure: str, threshold: float, findings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Mean accuracy over findings: (S,), and (S, R) in the resamples."""
        f, t = [self.findings.index(finding) for finding in findings], THRESHOLDS.index(threshold)
        return self.accuracy[measure][:, f, t].mean(1), self.drawn[measure][:, :, f, t].mean(2)


@dataclass(frozen=True)
class Sure:
    """A mean over seeds with its 95 % interval, for other patients and other seeds, and the seeds' SD."""

    value: float
    low: float
    high: float
    spread: float


def judge(
    name: str, networks: Sequence[Checkpoint], xrays: BoxedXRays, device: torch.device, seed: int = 0
) -> Judged:
    """Score the images with each network, as scoring does. Recipes can be compared only with the same `seed`.

    Raises:
        UserError: images stored smaller than the networks want them, or networks that give no boxes.
    """
    told = [_found(kept, xrays, device) for kept in networks]
    located = [xrays.located(boxes) for boxes, _ in told]
    probabilities = [p for _, p in told]
    patients = patients_of(xrays.rows)
    labels = xrays.labels
    areas = [_mean(auroc(p, labels)[None])[0] for p in probabilities]
    drawn = [_mean(resampled_aurocs(p, labels, patients, RESAMPLES, seed)) for p in probabilities]
    return _judged(name, located, xrays, patients, np.array(areas), np.stack(drawn), seed)


def guesses(xrays: BoxedXRays, seed: int = 0) -> list[Judged]:
    """Results of random boxes and of the mean box of the training images."""
    patients = patients_of(xrays.rows)
    guessed = baselines(xrays.training, xrays.rows.num_rows, len(xrays.findings), seed)
    nothing = np.full((1, RESAMPLES), math.nan)
    return [
        _judged(name, [xrays.located(boxes.scaled(*xrays.sizes_px))], xrays, patients, nothing[:, 0], nothing, seed)
        for name, boxes in guessed.items()
    ]


def _judged(
    name: str,
    located: Sequence[Located],
    xrays: BoxedXRays,
    patients: np.ndarray,
    aurocs: np.ndarray,
    drawn_aurocs: np.ndarray,
    seed: int,
) -> Judged:
    boxed = xrays.boxed()
    kept = [one.of(boxed) for one in located]
    shape = len(boxed), len(THRESHOLDS)

    def told(of: Located, kind: str, measure: str) -> np.ndarray:
        """(N, F · thresholds)."""
        return np.stack([getattr(of, kind)(measure, at) for at in THRESHOLDS], 2).reshape(len(of.known), -1)

    def means(kind: str) -> dict[str, np.ndarray]:
        return {m: np.stack([column_means(told(of, kind, m)).reshape(shape) for of in kept]) for m in MEASURES}

    drawn = {
        m: np.stack(
            [resampled_means(told(of, "right", m), patients, RESAMPLES, seed).reshape(-1, *shape) for of in kept]
        )
        for m in MEASURES
    }
    return Judged(
        name=name,
        findings=tuple(xrays.findings[f] for f in boxed),
        accuracy=means("right"),
        drawn=drawn,
        wrong=means("wrong"),
        pointing=np.stack([column_means(of.pointed) for of in kept]),
        aurocs=aurocs,
        drawn_aurocs=drawn_aurocs,
    )


def _mean(values_RF: np.ndarray) -> np.ndarray:
    """(R,) mean over the findings that can be measured; NaN where none can."""
    return column_means(values_RF.T)


def _found(kept: Checkpoint, xrays: BoxedXRays, device: torch.device) -> tuple[Boxes, np.ndarray]:
    """Predicted boxes in pixels of the originals, and probabilities (N, F)."""
    if not {schema.PRED_BOXES, schema.PROBABILITIES} <= set(kept.recipe.score_columns.names):
        raise UserError(
            f"{kept.uri} is of family {kept.recipe.family!r}, which does not give boxes and probabilities"
        )
    told = xrays.scored(kept, device)
    probabilities = np.array(told[schema.PROBABILITIES].to_pylist(), np.float64)
    return Boxes.of(told[schema.PRED_BOXES], xrays.findings), probabilities


def sure(values_S: np.ndarray, drawn_SR: np.ndarray, seed: int = 0) -> Sure:
    """The mean over seeds; the interval resamples both seeds and patients."""
    seeds, resamples = drawn_SR.shape
    chosen = np.random.default_rng(seed).integers(seeds, size=drawn_SR.shape)
    means = drawn_SR[chosen, np.arange(resamples)].mean(0)
    known = means[np.isfinite(means)]
    low, high = np.quantile(known, ENDS) if len(known) else (math.nan, math.nan)
    spread = float(values_S.std(ddof=1)) if seeds > 1 else math.nan
    return Sure(float(values_S.mean()), float(low), float(high), spread)


def accuracy(one: Judged, measure: str, threshold: float, findings: Sequence[str]) -> Sure:
    """Mean accuracy over some findings."""
    return sure(*one.at(measure, threshold, findings))


def gained(one: Judged, other: Judged, measure: str, threshold: float, findings: Sequence[str]) -> Sure:
    """How much higher the mean accuracy over some findings is: both use the same resampled patients and seeds."""
    (ours, drawn), (theirs, others) = (of.at(measure, threshold, findings) for of in (one, other))
    return sure(ours - theirs, drawn - others)


def auroc_gained(one: Judged, other: Judged) -> Sure:
    """How much higher the mean AUROC is."""
    return sure(one.aurocs - other.aurocs, one.drawn_aurocs - other.drawn_aurocs)


def gains(one: Judged, other: Judged, threshold: float = 0.3) -> dict[str, Sure]:
    """What `one` gains over `other` in small and in large findings, those that have boxes, and in mean AUROC."""
    key = f"iou_{100 * threshold:.0f}"
    groups = {"small": SMALL, "large": LARGE}
    present = {name: [f for f in group if f in one.findings] for name, group in groups.items()}
    found = {f"{name}_gain_{key}": gained(one, other, "iou", threshold, of) for name, of in present.items() if of}
    return found | {"auroc_gain": auroc_gained(one, other)}


def metrics(judged: Sequence[Judged], gained: Mapping[str, Sure]) -> dict[str, float]:
    """Figures by name: NAME_accuracy_iou_30, of all findings and /FINDING, NAME_auroc, and the gains; no NaN."""
    named = dict(gained)
    for one in judged:
        for at in (0.1, 0.3, 0.5):
            key = f"{one.name}_accuracy_iou_{100 * at:.0f}"
            named[key] = accuracy(one, "iou", at, one.findings)
            named |= {f"{key}/{finding}": accuracy(one, "iou", at, [finding]) for finding in one.findings}
        named[f"{one.name}_auroc"] = sure(one.aurocs, one.drawn_aurocs)
    found = {f"{name}{end}": value for name, of in named.items() for end, value in _ends(of).items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _ends(of: Sure) -> dict[str, float]:
    return {"": of.value, "_low": of.low, "_high": of.high, "_sd": of.spread}
