"""Boxes that a run has predicted, joined and matched with the archive's ground-truth boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.boxes import areas
from cxr.errors import UserError
from cxr.evaluation.ground_truth_boxes import BoxTruth
from cxr.evaluation.run import NoGroundTruthError, Run, Split, read_scores
from cxr.metrics.localization import Boxes, Located, baselines, locate
from cxr.wording import counted

_SIZES = (schema.WIDTH_PX, schema.HEIGHT_PX)
_COLUMNS = (schema.IMAGE_ID, schema.SOURCE_URI, schema.ERROR, *_SIZES, *schema.BOX_SCORES.names)


@dataclass(frozen=True)
class BoxScores:
    """Predicted boxes of a run; rows correspond."""

    uri: str
    image_ids: pa.Array
    source_uris: pa.ChunkedArray
    boxes: pa.ChunkedArray  # lists of schema.PRED_BOX_TYPE
    sizes_px: np.ndarray  # (N, 2) width and height of the original
    good: np.ndarray  # (N,) bool: scored without an error

    def at(self, kept_N: np.ndarray) -> BoxScores:
        """The scores of some images."""
        selected = pa.array(kept_N)
        columns = {name: getattr(self, name).filter(selected) for name in ("image_ids", "source_uris", "boxes")}
        return replace(self, **columns, sizes_px=self.sizes_px[kept_N], good=self.good[kept_N])


@dataclass(frozen=True)
class LocalizationEvaluation:
    """Scored images with predicted and ground-truth boxes, in pixels of the originals."""

    findings: tuple[str, ...]  # scored, and with a ground-truth box in an image
    left_out: tuple[str, ...]  # scored, but without a ground-truth box
    rows: np.ndarray  # (N,) rows of the ground truth, ascending
    patients: np.ndarray  # (N,)
    sizes_px: np.ndarray  # (N, 2) width and height of the originals
    predicted: Boxes
    true: Boxes
    located: Located
    pairs_not_scored: int  # with a ground-truth box of a finding that the checkpoint does not score
    images_with_error: int
    images_without_score: int

    def at(self, rows: np.ndarray) -> LocalizationEvaluation:
        """Some of these images, without their boxes."""
        selected = np.searchsorted(self.rows, rows)
        named = {name: getattr(self, name)[selected] for name in ("rows", "patients", "sizes_px")}
        nothing = self.predicted.at(np.zeros(len(self.predicted.image), bool))
        return replace(self, **named, predicted=nothing, true=nothing, located=self.located.at(selected))


def load_scores(run: Run, split: Split = "all") -> BoxScores:
    """A run's scores; raises UserError if its family predicts no boxes."""
    table = pa.concat_tables(part.replace_schema_metadata() for part in read_scores(run, _COLUMNS, split))
    good = pc.and_(pc.is_null(table[schema.ERROR]), pc.is_valid(table[schema.PRED_BOXES]))
    sizes = (table[name].fill_null(0).to_numpy() for name in _SIZES)
    return BoxScores(
        uri=run.uri,
        image_ids=table[schema.IMAGE_ID].combine_chunks(),
        source_uris=table[schema.SOURCE_URI],
        boxes=table[schema.PRED_BOXES],
        sizes_px=np.stack(list(sizes), 1),
        good=good.to_numpy(),
    )


def evaluate(scores: BoxScores, scored: Sequence[str], truth: BoxTruth) -> LocalizationEvaluation:
    """Match predicted boxes with true ones, in all scored images.

    Args:
        scored: the checkpoint's findings.

    Raises:
        UserError: no scored image has a ground-truth box of these findings; NoGroundTruthError if the archive lists
        no boxes.
    """
    places = pc.index_in(truth.table[schema.IMAGE_ID], value_set=scores.image_ids).fill_null(-1).to_numpy()
    present = places >= 0
    good = present & scores.good[places]
    rows = np.flatnonzero(good)
    sizes = scores.sizes_px[places[rows]]
    every = truth.boxes(scored, rows, sizes)
    boxed = np.unique(every.finding)
    if not boxed.size:
        error = UserError if truth.listed else NoGroundTruthError
        raise error(_nothing_in_common(scores, truth, int(present.sum()), len(rows)))
    findings = tuple(finding for number, finding in enumerate(scored) if number in boxed)
    true = replace(every, finding=np.searchsorted(boxed, every.finding))
    predicted = Boxes.of(scores.boxes.take(pa.array(places[rows])), findings)
    return LocalizationEvaluation(
        findings=findings,
        left_out=tuple(finding for finding in scored if finding not in findings),
        rows=rows,
        patients=truth.labels.patients[rows],
        sizes_px=sizes,
        predicted=predicted,
        true=true,
        located=locate(predicted, true, truth.known(findings, rows, true)),
        pairs_not_scored=_pairs_of_others(truth, rows, scored),
        images_with_error=int((present & ~good).sum()),
        images_without_score=int((~present).sum()),
    )


def _pairs_of_others(truth: BoxTruth, rows: np.ndarray, scored: Sequence[str]) -> int:
    lists = truth.table[schema.BOXES].take(pa.array(rows)).combine_chunks()
    labels = pc.struct_field(pc.list_flatten(lists), schema.LABEL).to_pylist()
    pairs = set(zip(pc.list_parent_indices(lists).to_pylist(), labels, strict=True))
    return sum(label not in scored for _, label in pairs)


def _nothing_in_common(scores: BoxScores, truth: BoxTruth, present: int, good: int) -> str:
    boxed = pc.greater(pc.list_value_length(truth.table[schema.BOXES]).fill_null(0), 0).to_numpy()
    return (
        f"there is nothing to evaluate: {int(boxed.sum()):,} of {counted(len(boxed), 'image')} of the archive have "
        f"boxes, {present:,} are in {scores.uri}, {good:,} were scored without an error, and none of these has a box "
        "of a scored finding. Use the archive that was scored, one that has boxes, or another --split"
    )


def baseline_boxes(evaluation: LocalizationEvaluation, training: Boxes, seed: int) -> dict[str, Located]:
    """Baselines that ignore the images, see `metrics.localization.baselines`.

    Args:
        training: boxes of `evaluation.findings`, as fractions of their images.
    """
    boxes = baselines(training, len(evaluation.rows), len(evaluation.findings), seed)
    known = evaluation.located.known
    return {name: locate(of.scaled(*evaluation.sizes_px.T), evaluation.true, known) for name, of in boxes.items()}


def box_shares(boxes: Boxes, sizes_px: np.ndarray, findings: int) -> list[np.ndarray]:
    """Areas of the boxes of each finding, as fractions of their images; `sizes_px` (N, 2) are those of the images."""
    shares = areas(boxes.xyxy) / np.maximum(1, sizes_px.prod(1))[boxes.image]
    return [shares[(boxes.finding == f) & (shares > 0)] for f in range(findings)]
