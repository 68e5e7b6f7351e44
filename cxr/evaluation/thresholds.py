"""Decision thresholds that are re-chosen on the labels of a hospital's own images, with intervals by patient."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from cxr import storage
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores
from cxr.evaluation.labeled_scores import CLASSIFIERS, MASK_LABELS, labeled_scores
from cxr.evaluation.run import ReportOptions, Run
from cxr.metrics import classification
from cxr.metrics.bootstrap import ENDS
from cxr.metrics.classification import Criterion, OperatingPoint
from cxr.reporting.thresholds import ChosenThreshold

WHAT = {"detect": "score of a box", **dict.fromkeys(MASK_LABELS, "area of the mask, share of the image")}
"""What a threshold is compared with; a probability in families that are not listed."""


def choose(run: Run, options: ReportOptions, criterion: Criterion) -> list[ChosenThreshold]:
    """Choose a threshold for each finding of a run that has labels in `options.archive`.

    Raises:
        UserError: the family decides nothing, no scored image has labels, or no finding has both classes.
    """
    if run.family in MASK_LABELS and run.thresholds:
        raise UserError(
            f"{run.uri} was scored with --thresholds, so small masks have already been removed: score the archive "
            f"without --thresholds, and choose from that run"
        )
    archive = storage.normalize(options.archive or run.archive)
    joined = labeled_scores(run, archive, options)
    bootstrap = {"resamples": options.resamples, "seed": options.seed}
    chosen = classification.choose_thresholds(joined.probabilities, joined.labels, criterion.rule, criterion.at_least)
    notes = [note.removeprefix("not chosen: ") for note in chosen.notes]
    if run.family not in CLASSIFIERS:  # without a box or mask, no threshold makes an image positive
        notes = [
            note or ("the best threshold would be 0" if value <= 0 else "")
            for note, value in zip(notes, chosen.values, strict=True)
        ]
    before = classification.operating_points(joined.predicted_positive, joined.labels, joined.patients, **bootstrap)
    after = classification.operating_points(
        joined.probabilities >= chosen.values, joined.labels, joined.patients, **bootstrap
    )
    notes = [note or _useless(point) for note, point in zip(notes, after, strict=True)]
    if all(notes):
        reasons = "; ".join(f"{finding}: {note}" for finding, note in zip(joined.findings, notes, strict=True))
        raise UserError(f"no threshold can be chosen ({reasons}): use an archive with positive and negative labels")
    return [
        _chosen(joined, f, criterion, float(chosen.values[f]), notes[f], after[f], before[f], bootstrap)
        for f in range(len(joined.findings))
    ]


def _useless(point: OperatingPoint) -> str:
    """Why a threshold is not worth having; empty if it is."""
    return (
        ""
        if point.true_positives
        else f"the best threshold would detect none of {point.false_negatives:,} positive images"
    )


def _chosen(
    joined: LabeledScores,
    f: int,
    criterion: Criterion,
    value: float,
    note: str,
    point: OperatingPoint,
    before: OperatingPoint,
    bootstrap: dict[str, int],
) -> ChosenThreshold:
    known = joined.labels[:, f] >= 0
    patients = len(np.unique(joined.patients[known]))
    if note:
        return ChosenThreshold(joined.findings[f], math.nan, math.nan, math.nan, point, before, patients, note)
    sampled = classification.resampled_thresholds(
        joined.probabilities[:, f], joined.labels[:, f], joined.patients, criterion, **bootstrap
    )
    sampled = sampled[np.isfinite(sampled)]
    low, high = np.quantile(sampled, ENDS).tolist() if len(sampled) else (math.nan, math.nan)
    return ChosenThreshold(joined.findings[f], value, low, high, point, before, patients, "")


def thresholds_file(run: Run, criterion: Criterion, chosen: list[ChosenThreshold], split: str) -> dict[str, Any]:
    """The contents of the file, see `families.thresholds_file`, without its version. Contains no ids and no paths."""
    counts = {each.finding: _described(each) for each in chosen if not each.note}
    left_out = {each.finding: each.note for each in chosen if each.note}
    return {
        "family": run.family,
        "checkpoint_sha256": run.checkpoint_sha256,
        "criterion": str(criterion),
        "thresholds": {each.finding: each.value for each in chosen if not each.note},
        "made_from": {"split": split, "findings": counts, **({"left_out": left_out} if left_out else {})},
    }


def _described(chosen: ChosenThreshold) -> dict[str, Any]:
    point = asdict(chosen.point)
    shares = {name: values for name, values in point.items() if isinstance(values, dict)}
    return {
        "positives": chosen.point.true_positives + chosen.point.false_negatives,
        "negatives": chosen.point.true_negatives + chosen.point.false_positives,
        "patients": chosen.patients,
        "threshold_low": _known(chosen.low),
        "threshold_high": _known(chosen.high),
        **{name: point[name] for name in point if name not in shares},
        **{name: {end: _known(value) for end, value in values.items()} for name, values in shares.items()},
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
