"""A detector's boxes matched with one set of ground-truth boxes, which one or several readers drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation.ground_truth_boxes import BoxTruth
from cxr.evaluation.localization_data import BoxScores
from cxr.evaluation.run import NoGroundTruthError
from cxr.metrics.localization import Boxes
from cxr.sources import rater_agreement
from cxr.wording import counted


@dataclass(frozen=True)
class DetectionEvaluation:
    """Scored images for which the boxes of at least one finding are known; boxes are in pixels of the originals."""

    findings: tuple[str, ...]
    rows: np.ndarray  # (N,) rows of the ground truth, ascending
    patients: np.ndarray  # (N,)
    sizes_px: np.ndarray  # (N, 2) width and height of the originals
    known: np.ndarray  # (N, F) bool: all boxes of the finding are known
    predicted: Boxes  # of known findings
    true: Boxes
    images_with_error: int
    images_without_score: int
    images_without_boxes: int  # scored, but nothing is known about their boxes
    predictions_of_unknown_findings: int  # left out

    def at(self, rows: np.ndarray) -> DetectionEvaluation:
        """Some of these images."""
        selected = np.searchsorted(self.rows, rows)
        named = {name: getattr(self, name)[selected] for name in ("rows", "patients", "sizes_px", "known")}
        return replace(
            self, **named, predicted=_of_images(self.predicted, selected), true=_of_images(self.true, selected)
        )


def _of_images(boxes: Boxes, images: np.ndarray) -> Boxes:
    """The boxes of some images, given by ascending rows and renumbered."""
    some = boxes.at(np.isin(boxes.image, images))
    return replace(some, image=np.searchsorted(images, some.image))


def one_truth(truth: BoxTruth, how: rater_agreement.ReaderBoxes) -> BoxTruth:
    """The truth with one set of boxes where several readers drew theirs, by a name of `readers.FUSIONS`."""
    extras = truth.table[schema.EXTRA].to_pylist()
    made = rater_agreement.one_set(truth.table[schema.BOXES].to_pylist(), extras, how)
    column = truth.table.schema.get_field_index(schema.BOXES)
    field = truth.table.schema.field(column)
    table = truth.table.set_column(column, field, pa.array(made, field.type))
    return replace(truth, table=table)


def evaluate(scores: BoxScores, scored: Sequence[str], truth: BoxTruth) -> DetectionEvaluation:
    """Join a run's boxes with the truth.

    Args:
        scored: findings of the checkpoint; findings that only the archive has count as never predicted.

    Raises:
        UserError: no scored image has known boxes; a NoGroundTruthError if the archive has none at all.
    """
    findings = tuple(dict.fromkeys([*(truth.labels.findings or scored), *(f for f in scored if f in named(truth))]))
    places = pc.index_in(truth.table[schema.IMAGE_ID], value_set=scores.image_ids).fill_null(-1).to_numpy()
    present = places >= 0
    good = present & scores.good[places]
    rows = np.flatnonzero(good)
    sizes = scores.sizes_px[places[rows]]
    true = truth.boxes(findings, rows, sizes)
    known = truth.known(findings, rows, true)
    predicted = Boxes.of(scores.boxes.take(pa.array(places[rows])), findings)
    evaluated = known.any(1)
    if not evaluated.any():
        error = UserError if truth.listed or truth.labels.findings else NoGroundTruthError
        raise error(_nothing_in_common(scores, truth, int(present.sum()), len(rows)))
    known_boxes = known[predicted.image, predicted.finding]
    every = DetectionEvaluation(
        findings=findings,
        rows=rows,
        patients=truth.labels.patients[rows],
        sizes_px=sizes,
        known=known,
        predicted=predicted.at(known_boxes),
        true=true,
        images_with_error=int((present & ~good).sum()),
        images_without_score=int((~present).sum()),
        images_without_boxes=int((~evaluated).sum()),
        predictions_of_unknown_findings=int((~known_boxes).sum()),
    )
    return every.at(rows[evaluated])


def named(truth: BoxTruth) -> set[str]:
    """The labels of all ground-truth boxes."""
    flat = pc.list_flatten(truth.table[schema.BOXES].combine_chunks())
    return set(pc.unique(pc.struct_field(flat, schema.LABEL)).to_pylist())


def _nothing_in_common(scores: BoxScores, truth: BoxTruth, present: int, good: int) -> str:
    listed = int(pc.is_valid(truth.table[schema.BOXES]).to_numpy().sum())
    return (
        f"there is nothing to evaluate: {listed:,} of {counted(truth.table.num_rows, 'image')} of the archive have a "
        f"list of boxes, {present:,} are in {scores.uri}, and {good:,} were scored without an error. Use the "
        "archive that was scored, one that has boxes, or another --split"
    )
