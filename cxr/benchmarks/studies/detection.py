"""An ensemble of detectors compared with its members on one split of shards: average precision, and the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cxr import schema
from cxr.benchmarks.studies import boxed_xrays
from cxr.benchmarks.studies.boxed_xrays import BoxedXRays
from cxr.benchmarks.studies.xrays import patients_of
from cxr.data import shards
from cxr.errors import UserError
from cxr.families.checkpoint import Checkpoint
from cxr.metrics.bootstrap import Intervals
from cxr.metrics.detection import VOC_IOUS, average_precisions, paired_gain
from cxr.metrics.localization import Boxes
from cxr.reporting.tables import interval, markdown, number

IOU = VOC_IOUS[0]
_LEGEND = (
    "AP of PASCAL VOC 2010 at IoU > {iou:g}. The best member is selected on these same images, so the gain is rather "
    "too small. The interval comes from resampling patients; the networks are fixed.\n"
)


@dataclass(frozen=True)
class Compared:
    """AP at IoU > `IOU` of the ensemble and of each of its members on the same images, F findings with true boxes."""

    findings: tuple[str, ...]
    images: int
    patients: int
    true: np.ndarray  # (F,) boxes
    ensemble: np.ndarray  # (F,)
    members: Mapping[str, np.ndarray]  # name -> (F,)
    best: str  # the member with the highest mean AP
    gain: Intervals  # of the ensemble over it


def held_out(data: str, limit: int = 0) -> tuple[str, BoxedXRays] | None:
    """The split to evaluate, test or else val, and its images; None if neither has boxes or `data` is not shards.

    Args:
        limit: take at most so many, spread evenly; 0 for all.
    """
    for split in ("test", "val") if shards.is_shards(data) else ():
        try:
            return split, boxed_xrays.read(data, split, limit)
        except UserError:
            continue
    return None


def compare(
    members: Mapping[str, Checkpoint], ensemble: Checkpoint, xrays: BoxedXRays, device: torch.device, seed: int = 0
) -> Compared:
    """Score the images with each network, as scoring does.

    Raises:
        UserError: images stored smaller than a network wants them.
    """
    patients, findings, true = patients_of(xrays.rows), len(xrays.findings), xrays.true
    boxed = xrays.boxed()
    told = {name: found(kept, xrays, device) for name, kept in members.items()}
    together = found(ensemble, xrays, device)
    aps = {name: average_precisions(of, true, findings, IOU)[boxed] for name, of in told.items()}
    best = max(aps, key=lambda name: aps[name].mean())
    return Compared(
        findings=tuple(xrays.findings[f] for f in boxed),
        images=xrays.rows.num_rows,
        patients=len(np.unique(patients)),
        true=np.bincount(true.finding, minlength=findings)[boxed],
        ensemble=average_precisions(together, true, findings, IOU)[boxed],
        members=aps,
        best=best,
        gain=paired_gain(together, told[best], true, patients, findings, iou=IOU, seed=seed),
    )


def found(kept: Checkpoint, xrays: BoxedXRays, device: torch.device) -> Boxes:
    """A detector's boxes, in pixels of the originals, in images whose boxes are known."""
    boxes = Boxes.of(xrays.scored(kept, device)[schema.PRED_BOXES], xrays.findings)
    return boxes.at(xrays.known[boxes.image, boxes.finding])


def table(of: Compared) -> str:
    """Markdown: one row per network, one column per finding; then the gain."""
    head = [f"AP at IoU > {IOU:g}", *of.findings, "mean"]
    named: Sequence[tuple[str, np.ndarray]] = [*of.members.items(), ("ensemble", of.ensemble)]
    rows = [[name, *map(number, aps), number(aps.mean())] for name, aps in named]
    rows.append(["true boxes", *(f"{count:,}" for count in of.true), f"{of.true.sum():,}"])
    gain = interval(of.gain.mean, of.gain.mean_low, of.gain.mean_high)
    return f"{markdown(head, rows)}\nThe ensemble gains {gain} over {of.best}.\n{_LEGEND.format(iou=IOU)}"


def metrics(of: Compared) -> dict[str, float]:
    """Metrics by name: means over the findings with true boxes, and one of each finding."""
    named = {"ensemble_map40": of.ensemble, "best_member_map40": of.members[of.best]}
    named |= {f"{name}/map40": aps for name, aps in of.members.items()}
    told = {"images": float(of.images), "ensemble_gain_map40": of.gain.mean}
    told |= {"ensemble_gain_map40_low": of.gain.mean_low, "ensemble_gain_map40_high": of.gain.mean_high}
    told |= {name: float(aps.mean()) for name, aps in named.items()}
    each = zip(of.findings, of.ensemble.tolist(), of.members[of.best].tolist(), strict=True)
    for finding, ours, theirs in each:
        told |= {f"ensemble_ap40/{finding}": ours, f"best_member_ap40/{finding}": theirs}
    return told
