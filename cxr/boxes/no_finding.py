"""Combine a detector's boxes with a classifier's probability that the image is normal."""

from __future__ import annotations

import numpy as np

from cxr.boxes.predictions import ScoredBoxes
from cxr.errors import UserError
from cxr.schema import NO_FINDING_CLASS

_BOX = np.array([[0.0, 0.0, 1.0, 1.0]])  # one pixel, as VinBigData requires for a normal image


def add_no_finding(
    predicted: ScoredBoxes,
    p_normal: float,
    low: float = 0.08,
    high: float = 0.95,
    *,
    no_finding: int = NO_FINDING_CLASS,
) -> ScoredBoxes:
    """Add "no finding" to the boxes (in pixels) of an image that is normal with probability `p_normal`.

    This suits VinBigData's metric. Below `low` the boxes are unchanged. From `low` on, a "no finding" box with score
    `p_normal` is added. From `high` on, a "no finding" box with score 1 replaces them.

    Raises:
        UserError: 0 <= low <= high does not hold, or `p_normal` is outside [0, 1].
    """
    if not 0 <= low <= high:
        raise UserError(f"expected 0 <= low <= high, got low={low} and high={high}: make low the smaller one")
    if not 0 <= p_normal <= 1:
        raise UserError(f"expected p_normal from 0 to 1, got {p_normal}: use probabilities, not logits")
    if p_normal < low:
        return predicted
    if p_normal >= high:
        return ScoredBoxes(_BOX.copy(), np.ones(1), np.array([no_finding]))
    added = (_BOX, np.array([p_normal]), np.array([no_finding]))
    return ScoredBoxes(*(np.concatenate(pair) for pair in zip(predicted, added, strict=True)))
