"""From probabilities to decisions: thresholds selected on labeled images, and metrics of the decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cxr.metrics.bootstrap import RESAMPLES, ratio, resample
from cxr.metrics.classification.ranking import Ranked, ranked, ranked_resamples, specificity_counts
from cxr.schema import NEGATIVE, POSITIVE

Rule = Literal["youden", "f1", "specificity", "sensitivity", "ppv"]
BOUNDED = ("specificity", "sensitivity", "ppv")  # rules that need a minimum
WITHOUT_CHOICE = 0.5  # threshold of a finding for which none could be selected


@dataclass(frozen=True)
class Decisions:
    """Shares per finding, each (F,); NaN if the denominator is 0."""

    accuracy: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def decisions(predicted_positive_NF: np.ndarray, labels_NF: np.ndarray) -> Decisions:
    """Metrics of the decisions `predicted_positive_NF` (1 or True: positive)."""
    predicted_positive, labels = np.asarray(predicted_positive_NF, bool), np.asarray(labels_NF)
    if predicted_positive.shape != labels.shape:
        raise ValueError(
            f"expected decisions and labels (images, findings), got {predicted_positive.shape} and {labels.shape}"
        )
    positive, negative = labels == POSITIVE, labels == NEGATIVE
    true, false = (predicted_positive & positive).sum(0), (predicted_positive & negative).sum(0)
    positives, negatives = positive.sum(0), negative.sum(0)
    return Decisions(
        accuracy=ratio(true + negatives - false, positives + negatives),
        precision=ratio(true, true + false),
        recall=ratio(true, positives),
        f1=ratio(2 * true, true + false + positives),
    )


@dataclass(frozen=True)
class Criterion:
    """What makes a threshold the best one.

    youden: maximizes sensitivity + specificity (Youden 1950). f1: maximizes F1. specificity: maximizes sensitivity
    among thresholds with a specificity of at least `at_least`. sensitivity: maximizes specificity among those with
    such a sensitivity. ppv: maximizes sensitivity among those with such a positive predictive value.

    Raises:
        ValueError: there is no such rule, or `at_least` is not in (0, 1] where the rule needs it.
    """

    rule: Rule = "youden"
    at_least: float = 0.9

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if not 0 < self.at_least <= 1:
            raise ValueError(f"{self.rule}: expected a minimum above 0 and up to 1, got {self.at_least:g}")

    @classmethod
    def parse(cls, text: str) -> Criterion:
        """From "youden", "f1", or a rule with its minimum, such as "sensitivity:0.95".

        Raises:
            ValueError: it is none of these.
        """
        name, _, minimum = text.partition(":")
        rule: Any = name
        form = f"expected youden, f1, or a rule with a minimum ({', '.join(f'{name}:0.95' for name in BOUNDED)})"
        if rule not in get_args(Rule) or bool(minimum) != (rule in BOUNDED):
            raise ValueError(f"{form}, got {text!r}")
        try:
            return cls(rule, float(minimum)) if minimum else cls(rule)
        except ValueError as error:
            raise ValueError(f"{form}, got {text!r}") from error

    def __str__(self) -> str:
        return f"{self.rule}:{self.at_least:g}" if self.rule in BOUNDED else self.rule


@dataclass(frozen=True)
class Thresholds:
    """One threshold per finding, and how it was selected; `probability >= value` is a positive."""

    values: np.ndarray  # (F,) float64 of float32 values, so that both precisions give the same decisions
    criterion: Criterion
    positives: np.ndarray  # (F,) number of images on which each was selected
    negatives: np.ndarray  # (F,)
    reached: np.ndarray  # (F,) bool: some threshold meets the criterion's minimum

    @property
    def notes(self) -> list[str]:
        """A note per finding; empty if a threshold could be selected."""
        notes = []
        for positives, negatives, reached in zip(self.positives, self.negatives, self.reached, strict=True):
            reason = missing_class(positives, negatives)
            if not reason and not reached:
                reason = f"no threshold has a {self.criterion.rule} of at least {self.criterion.at_least:g}"
            notes.append(f"not chosen: {reason}" if reason else "")
        return notes

    def describe(self) -> dict[str, Any]:
        """For a checkpoint: plain JSON, lists in the order of the findings."""
        return {
            "rule": self.criterion.rule,
            "at_least": self.criterion.at_least,
            "values": self.values.tolist(),
            "positives": self.positives.tolist(),
            "negatives": self.negatives.tolist(),
            "notes": self.notes,
        }


def missing_class(positives: int, negatives: int) -> str:
    """Why a finding cannot be measured; empty if it can."""
    if positives and negatives:
        return ""
    if not positives and not negatives:
        return "no known label"
    missing = "negative" if positives else "positive"
    return f"no {missing} among {positives + negatives} images"


def choose_thresholds(
    scores_NF: np.ndarray, labels_NF: np.ndarray, rule: Rule = "youden", at_least: float = 0.9
) -> Thresholds:
    """Thresholds that are best by a `Criterion` on these images, separately for each finding.

    Among equally good thresholds the highest is selected. A threshold lies midway between two neighboring scores. A
    finding for which none can be selected gets 0.5 and a note that says so.

    Raises:
        ValueError: there is no such rule.
    """
    criterion = Criterion(rule, at_least)
    ranking = ranked(scores_NF, labels_NF)
    values, reached = _best(ranking, criterion)
    values = np.where(ranking.measurable & reached, values, WITHOUT_CHOICE)
    return Thresholds(values, criterion, ranking.positives, ranking.negatives, reached)


def resampled_thresholds(
    scores_N: np.ndarray,
    labels_N: np.ndarray,
    patients_N: np.ndarray,
    criterion: Criterion,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """(R,) the threshold of one finding that is selected in each resample of patients; NaN where none can be."""
    ids, patients = np.unique(np.asarray(patients_N), return_inverse=True)

    def measure(times_PR: np.ndarray) -> np.ndarray:
        ranking = ranked_resamples(scores_N, labels_N, times_PR[patients])
        values, reached = _best(ranking, criterion)
        return np.where(ranking.measurable & reached, values, np.nan)

    if not len(ids):
        return np.full(resamples, np.nan)
    return resample(len(ids), resamples, seed, measure, rows=len(patients))


def _best(ranking: Ranked, criterion: Criterion) -> tuple[np.ndarray, np.ndarray]:
    """(F,) the best thresholds, and whether there is one that meets the criterion's minimum."""
    nothing = np.zeros((1, len(ranking.positives)))
    worth = np.concatenate([nothing, _worth(ranking, criterion)])  # row 0: nothing is predicted positive
    reached = worth.any(0) if criterion.rule in ("sensitivity", "ppv") else np.ones(worth.shape[1], bool)
    return _between(ranking.scores, worth.argmax(0)), np.asarray(reached)


def _worth(ranked: Ranked, criterion: Criterion) -> np.ndarray:
    """(N, F) the quantity that the rule maximizes, for a threshold at each image's score; 0 if it is no better than
    no positives."""
    true, false, at_least = ranked.true, ranked.false, criterion.at_least
    if criterion.rule == "f1":
        return 2 * true / np.maximum(1, true + false + ranked.positives)
    if criterion.rule == "specificity":
        return np.where(false <= specificity_counts(ranked.negatives, at_least), true, 0)
    if criterion.rule == "sensitivity":
        missed = specificity_counts(ranked.positives, at_least)  # positives that may be missed
        return np.where(ranked.positives - true <= missed, ranked.negatives - false + 1, 0)
    if criterion.rule == "ppv":
        return np.where(true >= at_least * (true + false) - 1e-9, true, 0)
    return true / np.maximum(1, ranked.positives) - false / np.maximum(1, ranked.negatives)


def _between(falling_NF: np.ndarray, called_F: np.ndarray) -> np.ndarray:
    """(F,) the midpoint between the lowest of each column's first `predicted_positive` scores and the next lower
    one."""
    rows, findings = falling_NF.shape
    last = falling_NF[called_F - 1, np.arange(findings)] if rows else np.ones(findings)
    above = np.where(called_F > 0, last, np.nextafter(np.float32(1), np.float32(2)))
    below = np.where(falling_NF < above, falling_NF, 0.0).max(0, initial=0.0)
    middle = ((above + below) / 2).astype(np.float32).astype(np.float64)
    return np.where((middle > below) & (middle <= above), middle, above)
