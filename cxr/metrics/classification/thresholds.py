"""From probabilities to decisions: thresholds selected on validation images, and metrics of the decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cxr.metrics.bootstrap import ratio
from cxr.metrics.classification.ranking import Ranked, ranked, specificity_counts
from cxr.schema import NEGATIVE, POSITIVE

Rule = Literal["youden", "f1", "specificity"]
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
class Thresholds:
    """One threshold per finding, and how it was selected; `probability >= value` is a positive."""

    values: np.ndarray  # (F,) float64 of float32 values, so that both precisions give the same decisions
    rule: Rule
    specificity: float  # minimum of the rule "specificity"
    positives: np.ndarray  # (F,) number of images on which each was selected
    negatives: np.ndarray  # (F,)

    @property
    def notes(self) -> list[str]:
        """A note per finding; empty if a threshold could be selected."""
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
    """Why a finding cannot be measured; empty if it can."""
    if positives and negatives:
        return ""
    if not positives and not negatives:
        return "no known label"
    missing = "negative" if positives else "positive"
    return f"no {missing} among {positives + negatives} images"


def choose_thresholds(
    scores_NF: np.ndarray, labels_NF: np.ndarray, rule: Rule = "youden", specificity: float = 0.9
) -> Thresholds:
    """Thresholds that are best by `rule` on these images, separately for each finding.

    youden: maximizes sensitivity + specificity (Youden 1950). f1: maximizes F1. specificity: maximizes sensitivity
    among thresholds with at least `specificity`. Among equally good thresholds the highest is selected. A threshold
    lies midway between two neighboring scores. A finding without both classes gets 0.5 and a note that says so.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
    ranking = ranked(scores_NF, labels_NF)
    none = np.zeros((1, len(ranking.positives)))
    worth = np.concatenate([none, _worth(ranking, rule, specificity)])  # row 0: nothing is predicted positive
    values = _between(ranking.scores, worth.argmax(0))
    values = np.where(ranking.measurable, values, WITHOUT_CHOICE)
    return Thresholds(values, rule, specificity, ranking.positives, ranking.negatives)


def _worth(ranked: Ranked, rule: Rule, specificity: float) -> np.ndarray:
    """(N, F) the quantity that the rule maximizes, for a threshold at each image's score; 0 if it is no better than
    no positives."""
    true, false = ranked.true, ranked.false
    if rule == "f1":
        return 2 * true / np.maximum(1, true + false + ranked.positives)
    if rule == "specificity":
        return np.where(false <= specificity_counts(ranked.negatives, specificity), true, 0)
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
