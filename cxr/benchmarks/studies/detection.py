"""An ensemble of detectors compared with its members on one split of shards, by average precision."""

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
    "AP of PASCAL VOC 2010 at IoU > {iou:g}. The best member is selected on these same images, so the gain is "
    "underestimated. The interval comes from resampling patients; the networks are fixed.\n"
)


@dataclass(frozen=True)
class EnsembleComparison:
    """AP at IoU > `IOU` of the ensemble and of each of its members on the same images, F findings with true boxes."""

    findings: tuple[str, ...]
    images: int
    patients: int
    true_boxes: np.ndarray  # (F,) counts
    ensemble: np.ndarray  # (F,)
    members: Mapping[str, np.ndarray]  # name -> (F,)
    best: str  # the member with the highest mean AP
    gain: Intervals  # of the ensemble over the best member


def held_out(data: str, limit: int = 0) -> tuple[str, BoxedXRays] | None:
    """The split to evaluate, test or else val, and its images; None if neither has boxes or `data` is not shards.

    Args:
        limit: maximum number of images, spread evenly; 0 for all.
    """
    for split in ("test", "val") if shards.is_shards(data) else ():
        try:
            return split, boxed_xrays.read(data, split, limit)
        except UserError:
            continue
    return None


def compare(
    members: Mapping[str, Checkpoint], ensemble: Checkpoint, xrays: BoxedXRays, device: torch.device, seed: int = 0
) -> EnsembleComparison:
    """Score the images with each network, as scoring does.

    Raises:
        UserError: the images are smaller than a network needs.
    """
    patients, findings, true = patients_of(xrays.rows), len(xrays.findings), xrays.true
    boxed = xrays.boxed()
    member_boxes = {name: predict(member, xrays, device) for name, member in members.items()}
    ensemble_boxes = predict(ensemble, xrays, device)
    aps = {name: average_precisions(boxes, true, findings, IOU)[boxed] for name, boxes in member_boxes.items()}
    best = max(aps, key=lambda name: aps[name].mean())
    return EnsembleComparison(
        findings=tuple(xrays.findings[f] for f in boxed),
        images=xrays.rows.num_rows,
        patients=len(np.unique(patients)),
        true_boxes=np.bincount(true.finding, minlength=findings)[boxed],
        ensemble=average_precisions(ensemble_boxes, true, findings, IOU)[boxed],
        members=aps,
        best=best,
        gain=paired_gain(ensemble_boxes, member_boxes[best], true, patients, findings, iou=IOU, seed=seed),
    )


def predict(network: Checkpoint, xrays: BoxedXRays, device: torch.device) -> Boxes:
    """A detector's boxes, in pixels of the originals, in images whose boxes are known."""
    boxes = Boxes.of(xrays.scored(network, device)[schema.PRED_BOXES], xrays.findings)
    return boxes.at(xrays.known[boxes.image, boxes.finding])


def table(comparison: EnsembleComparison) -> str:
    """Markdown: one row per network, one column per finding; then the gain."""
    head = [f"AP at IoU > {IOU:g}", *comparison.findings, "mean"]
    networks: Sequence[tuple[str, np.ndarray]] = [*comparison.members.items(), ("ensemble", comparison.ensemble)]
    rows = [[name, *map(number, aps), number(aps.mean())] for name, aps in networks]
    true = comparison.true_boxes
    rows.append(["true boxes", *(f"{count:,}" for count in true), f"{true.sum():,}"])
    gain = interval(comparison.gain.mean, comparison.gain.mean_low, comparison.gain.mean_high)
    return f"{markdown(head, rows)}\nThe ensemble gains {gain} over {comparison.best}.\n{_LEGEND.format(iou=IOU)}"


def metrics(comparison: EnsembleComparison) -> dict[str, float]:
    """Metrics by name: means over the findings with true boxes, and one of each finding."""
    best, gain = comparison.members[comparison.best], comparison.gain
    values = {
        "images": float(comparison.images),
        "ensemble_gain_map_40": gain.mean,
        "ensemble_gain_map_40_low": gain.mean_low,
        "ensemble_gain_map_40_high": gain.mean_high,
        "ensemble_map_40": float(comparison.ensemble.mean()),
        "best_member_map_40": float(best.mean()),
    }
    values |= {f"{name}/map_40": float(aps.mean()) for name, aps in comparison.members.items()}
    for finding, ours, theirs in zip(comparison.findings, comparison.ensemble.tolist(), best.tolist(), strict=True):
        values |= {f"ensemble_ap_40/{finding}": ours, f"best_member_ap_40/{finding}": theirs}
    return values
