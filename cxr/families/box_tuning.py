"""Adjust boxes from heat maps to the ground-truth boxes of a few validation images.

A map that was learned from labels shows where the evidence for a finding is. For an enlarged heart, this may be a
spot at its border. So each finding gets a threshold, and an offset from the box of its map to the box of the finding:
the median offset over the validation images. Of all thresholds, each with and without its offset, the combination
with the highest mean IoU is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cxr.boxes import iou
from cxr.boxes.from_heatmaps import BoxRule, boxes_of
from cxr.boxes.offsets import moved, offsets
from cxr.families.base import Communicator

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(2, 19))  # fractions of a map's maximum, .1 to .9
MIN_IMAGES = 5  # minimum number of images with boxes of a finding for choosing its threshold
MIN_FOR_OFFSET = 10  # the same for its offset, which has four numbers


@dataclass(frozen=True)
class TuningExample:
    """The boxes of a finding in an image, in fractions of the map."""

    finding: int
    true: np.ndarray  # (N, 4)
    predicted: tuple[np.ndarray, ...]  # (M, 4) with each threshold, highest score first

    @classmethod
    def of(
        cls, finding: int, heat_HW: np.ndarray, true_N4: np.ndarray, rule: BoxRule, thresholds: Sequence[float]
    ) -> TuningExample:
        """The boxes of a map, uint8, with each of these thresholds."""
        same_THW = np.repeat(heat_HW[None], len(thresholds), 0)
        found = boxes_of(same_THW, rule, np.array(thresholds, np.float32))
        return cls(finding, true_N4, tuple(found.boxes_N4[found.index_N == t] for t in range(len(thresholds))))

    def offsets(self) -> np.ndarray:
        """(T, 4) from the box with the highest score to the ground-truth box with the nearest center; NaN without a
        box."""
        found_T4 = np.full((len(self.predicted), 4), np.nan)
        for t, boxes_N4 in enumerate(self.predicted):
            if len(boxes_N4):
                apart_N2 = (self.true - boxes_N4[0]).reshape(-1, 2, 2).sum(1)
                nearest = int(np.square(apart_N2).sum(1).argmin())
                found_T4[t] = offsets(boxes_N4[:1], self.true[nearest : nearest + 1])[0]
        return found_T4

    def overlaps(self, offset_C4: np.ndarray) -> np.ndarray:
        """(C,) largest IoU of a moved box and a true one. The offsets are some for each threshold, then more."""
        predicted = self.predicted * (len(offset_C4) // len(self.predicted))
        pairs = zip(predicted, offset_C4, strict=True)
        return np.array([iou(adjusted(boxes, offset), self.true).max(initial=0) for boxes, offset in pairs])


def adjusted(boxes_N4: np.ndarray, offsets_N4: np.ndarray) -> np.ndarray:
    """Boxes at these offsets, or all of them at a single one, clipped to the map; all in fractions of it."""
    return moved(boxes_N4, np.broadcast_to(offsets_N4, boxes_N4.shape)).clip(0, 1)


@dataclass(frozen=True)
class TunedBoxes:
    """Each finding's threshold and offset, and what they give on all workers' examples."""

    thresholds: np.ndarray  # (F,)
    offsets: np.ndarray  # (F, 4)
    overlaps: np.ndarray  # (N,) largest IoU in each example


def tune(
    examples: Sequence[TuningExample],
    findings: int,
    thresholds: Sequence[float],
    workers: Communicator,
    device: torch.device,
) -> TunedBoxes:
    """Choose a threshold for each finding with `MIN_IMAGES` examples or more, and an offset from `MIN_FOR_OFFSET` on.

    Others keep the first threshold, and an offset of 0. With a single threshold, nothing is chosen.

    Args:
        examples: those of this worker; the result is the same on all workers.
    """
    count = len(thresholds)
    known = _gathered([(e.finding, *e.offsets().ravel()) for e in examples], 1 + 4 * count, workers, device)
    offset_FC4 = np.zeros((findings, 2 * count, 4))  # candidates: all thresholds without offsets, then with them
    for f in range(findings) if count > 1 else ():
        offsets_NT4 = known[known[:, 0] == f, 1:].reshape(-1, count, 4)
        enough_T = (~np.isnan(offsets_NT4[:, :, 0])).sum(0) >= MIN_FOR_OFFSET
        offset_FC4[f, count:][enough_T] = np.nanmedian(offsets_NT4[:, enough_T], 0)
    overlaps = [(e.finding, *e.overlaps(offset_FC4[e.finding])) for e in examples]
    rows = _gathered(overlaps, 1 + 2 * count, workers, device)
    choice_F = np.zeros(findings, int)
    for f in range(findings) if count > 1 else ():
        overlap_NC = rows[rows[:, 0] == f, 1:]
        if len(overlap_NC) >= MIN_IMAGES:
            choice_F[f] = overlap_NC.mean(0).argmax()
    return TunedBoxes(
        np.array(thresholds)[choice_F % count],
        offset_FC4[np.arange(findings), choice_F],
        rows[np.arange(len(rows)), 1 + choice_F[rows[:, 0].astype(int)]],
    )


def _gathered(
    rows: Iterable[tuple[float, ...]], width: int, workers: Communicator, device: torch.device
) -> np.ndarray:
    """The rows of all workers, float64 (N, width)."""
    own = torch.tensor([*rows], dtype=torch.float32, device=device).reshape(-1, width)
    return workers.gather(own).cpu().double().numpy()
