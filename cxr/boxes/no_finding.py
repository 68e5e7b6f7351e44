"""What a classifier that tells normal images from others adds to the boxes that a detector found."""

from __future__ import annotations

import numpy as np

from cxr.boxes.predictions import Found
from cxr.errors import UserError

NO_FINDING = 14  # VinBigData's class
_BOX = np.array([[0.0, 0.0, 1.0, 1.0]])  # of one pixel: what VinBigData wants for a normal image


def filtered(
    found: Found, p_normal: float, low: float = 0.08, high: float = 0.95, *, no_finding: int = NO_FINDING
) -> Found:
    """Boxes in pixels of an image that is normal with probability `p_normal`, as VinBigData's metric likes them.

    Below `low` they stay as they are. From `low` on "no finding" is added to them with score `p_normal`. From `high`
    on it takes their place with score 1.

    Raises:
        UserError: not 0 <= low <= high, or a probability outside [0, 1].
    """
    if not 0 <= low <= high:
        raise UserError(f"low={low}, high={high}: wanted 0 <= low <= high")
    if not 0 <= p_normal <= 1:
        raise UserError(f"p_normal={p_normal}: wanted a probability")
    if p_normal < low:
        return found
    if p_normal >= high:
        return Found(_BOX.copy(), np.ones(1), np.array([no_finding]))
    added = (_BOX, np.array([p_normal]), np.array([no_finding]))
    return Found(*(np.concatenate(pair) for pair in zip(found, added, strict=True)))
