"""From probabilities to decisions: thresholds chosen on validation images, and how good the decisions are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cxr.metrics.bootstrap import ratio
from cxr.metrics.classification.ranking import Ranked, ranked, specificity_counts
from cxr.schema import NEGATIVE, POSITIVE

Rule = Literal["youden", "f1", "specificity"]
WITHOUT_CHOICE = 0.5  # the threshold of a finding on which none could be chosen


@dataclass(frozen=True)
class Decisions:
    """Shares per finding, each (F,); NaN where there is nothing to divide by."""

    accuracy: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def decisions(predicted_positive_NF: np.ndarray, labels_NF: np.ndarray) -> Decisions:
    """How good it is to call those entries positive where `predicted_positive_NF` is 1 or True."""
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
class Thresholds:
    """One threshold a finding, and what it was chosen by; `probability >= value` is a positive."""

    values: np.ndarray  # (F,) float64 of float32 values, so that both precisions decide alike
    rule: Rule
    specificity: float  # that the rule "specificity" asks for
    positives: np.ndarray  # (F,) images that each was chosen on
    negatives: np.ndarray  # (F,)

    @property
    def notes(self) -> list[str]:
        """One a finding; empty where a threshold could be chosen."""
        counts = zip(self.positives, self.negatives, strict=True)
        return [f"not chosen: {note}" if (note := missing_class(*pair)) else "" for pair in counts]

    def describe(self) -> dict[str, Any]:
        """For a checkpoint: plain JSON, lists in the order of the findings."""
        return {
            "rule": self.rule,
            "specificity": self.specificity,
            "values": self.values.tolist(),
            "positives": self.positives.tolist(),
            "negatives": self.negatives.tolist(),
            "notes": self.notes,
        }


def missing_class(positives: int, negatives: int) -> str:
    """In words, why a finding cannot be measured; empty if it can."""
    if positives and negatives:
        return ""
    if not positives and not negatives:
        return "no known label"
    missing = "negative" if positives else "positive"
    return f"no {missing} among {positives + negatives} images"


def choose_thresholds(
    scores_NF: np.ndarray, labels_NF: np.ndarray, rule: Rule = "youden", specificity: float = 0.9
) -> Thresholds:
    """Thresholds that are best by `rule` on these images, each finding on its own.

    youden: sensitivity + specificity is highest (Youden 1950). f1: F1 is highest. specificity: sensitivity is
    highest among thresholds with at least `specificity`. Of equals the highest threshold is taken. A threshold lies
    midway between two scores that it parts. A finding without both classes gets 0.5, and a note that says so.

    Raises:
        ValueError: no such rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
    found = ranked(scores_NF, labels_NF)
    none = np.zeros((1, len(found.positives)))
    worth = np.concatenate([none, _worth(found, rule, specificity)])  # row 0: nothing is predicted positive
    values = _between(found.scores, worth.argmax(0))
    values = np.where(found.measurable, values, WITHOUT_CHOICE)
    return Thresholds(values, rule, specificity, found.positives, found.negatives)


def _worth(found: Ranked, rule: Rule, specificity: float) -> np.ndarray:
    """(N, F) what the rule wants to be highest, for a threshold at each image's score; 0 is as good as no call."""
    true, false = found.true, found.false
    if rule == "f1":
        return 2 * true / np.maximum(1, true + false + found.positives)
    if rule == "specificity":
        return np.where(false <= specificity_counts(found.negatives, specificity), true, 0)
    return true / np.maximum(1, found.positives) - false / np.maximum(1, found.negatives)


def _between(falling_NF: np.ndarray, called_F: np.ndarray) -> np.ndarray:
    """(F,) the middle between the last of each column's first `predicted_positive` scores and the next lower one."""
    rows, findings = falling_NF.shape
    last = falling_NF[called_F - 1, np.arange(findings)] if rows else np.ones(findings)
    above = np.where(called_F > 0, last, np.nextafter(np.float32(1), np.float32(2)))
    below = np.where(falling_NF < above, falling_NF, 0.0).max(0, initial=0.0)
    middle = ((above + below) / 2).astype(np.float32).astype(np.float64)
    return np.where((middle > below) & (middle <= above), middle, above)
