"""Probabilities of a classifier's run, matched with the archive's labels by image and finding."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation.ground_truth import patient_numbers
from cxr.evaluation.run import NoGroundTruthError, Run, read_scores
from cxr.sources.manifest import Manifest
from cxr.wording import counted


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of a run; rows correspond."""

    uri: str
    findings: tuple[str, ...]
    image_ids: pa.Array
    probabilities: np.ndarray  # (N, F) float64, NaN for images with an error
    predicted_positive: np.ndarray  # (N, F) int8: 1 if the checkpoint's threshold is reached

    @property
    def good(self) -> np.ndarray:
        """(N,) bool: scored without an error, with probabilities."""
        return np.logical_and.reduce(np.isfinite(self.probabilities), axis=1)


@dataclass(frozen=True)
class LabelTruth:
    """Labels of an archive's images; rows correspond."""

    findings: tuple[str, ...]
    image_ids: pa.ChunkedArray
    patients: np.ndarray  # (N,) one number per patient
    labels: np.ndarray  # (N, F) int8
    labeled: np.ndarray  # (N,) bool


@dataclass(frozen=True)
class LabeledScores:
    """Images with both labels and scores, and counts of the others."""

    findings: tuple[str, ...]  # both scored and labeled, in the run's order
    rows: np.ndarray  # (N,) rows of the ground truth, ascending
    patients: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N, F)
    predicted_positive: np.ndarray  # (N, F)
    labels: np.ndarray  # (N, F) int8
    images_with_error: int
    images_without_score: int
    images_without_labels: int  # scored, but without labels in the archive

    def at(self, rows: np.ndarray, findings: Sequence[str]) -> LabeledScores:
        """Some of these images and findings."""
        images = np.searchsorted(self.rows, rows)
        columns = [self.findings.index(finding) for finding in findings]
        parts = {
            name: getattr(self, name)[images][:, columns]
            for name in ("probabilities", "predicted_positive", "labels")
        }
        return replace(self, findings=tuple(findings), rows=rows, patients=self.patients[images], **parts)


def load_scores(run: Run) -> ClassificationScores:
    """A run's scores; raises UserError if they are not those of a classifier."""
    parts = read_scores(run, [schema.IMAGE_ID, schema.ERROR, schema.PROBABILITIES, schema.DECISIONS])
    named = {(part.schema.metadata or {}).get(schema.FINDINGS_KEY) for part in parts}
    if len(named) != 1 or None in named:
        raise UserError(
            f"expected one list of findings in all files of {run.uri}, got several or none: score the archive again"
        )
    findings = tuple(json.loads(named.pop() or b"[]"))
    table = pa.concat_tables(part.replace_schema_metadata() for part in parts)
    good = pc.and_(pc.is_null(table[schema.ERROR]), pc.is_valid(table[schema.PROBABILITIES]))
    return ClassificationScores(
        uri=run.uri,
        findings=findings,
        image_ids=table[schema.IMAGE_ID].combine_chunks(),
        probabilities=_matrix(table[schema.PROBABILITIES], good, len(findings), math.nan).astype(np.float64),
        predicted_positive=_matrix(table[schema.DECISIONS], good, len(findings), 0),
    )


def known_labels(manifest: Manifest) -> LabelTruth:
    """The labels of a manifest."""
    table = manifest.table
    labeled = table[schema.LABELS].is_valid()
    return LabelTruth(
        findings=manifest.findings,
        image_ids=table[schema.IMAGE_ID],
        patients=patient_numbers(table),
        labels=_matrix(table[schema.LABELS], labeled, len(manifest.findings), schema.UNKNOWN),
        labeled=labeled.to_numpy(),
    )


def _matrix(lists: pa.ChunkedArray, good: pa.ChunkedArray, width: int, fill: float) -> np.ndarray:
    """(N, width) from a column of lists, with `fill` in the rows that are not good.

    Raises:
        UserError: a list has another length.
    """
    values = lists.filter(good).combine_chunks()
    lengths = set(pc.unique(pc.list_value_length(values)).to_pylist())
    if lengths - {width}:
        raise UserError(
            f"expected {width} values per image, one for each finding, got {sorted(lengths)}: score the archive again"
        )
    flat = values.flatten().to_numpy(zero_copy_only=False)
    matrix = np.full((len(lists), width), fill, flat.dtype)
    matrix[good.to_numpy()] = flat.reshape(len(values), width)
    return matrix


def join(scores: ClassificationScores, truth: LabelTruth) -> LabeledScores:
    """Join the images of the ground truth with their scores.

    Raises:
        UserError: they have no image or no finding in common; NoGroundTruthError if the archive has no labels.
    """
    findings = tuple(finding for finding in scores.findings if finding in truth.findings)
    score_row = pc.index_in(truth.image_ids, value_set=scores.image_ids).fill_null(-1).to_numpy()
    present = score_row >= 0
    good = present & scores.good[score_row]
    rows = np.flatnonzero(good & truth.labeled)
    if not findings or not len(rows):
        error = UserError if truth.findings and truth.labeled.any() else NoGroundTruthError
        raise error(_nothing_in_common(scores, truth, int(present.sum()), int(good.sum())))
    scored = [scores.findings.index(finding) for finding in findings]
    return LabeledScores(
        findings=findings,
        rows=rows,
        patients=truth.patients[rows],
        probabilities=scores.probabilities[score_row[rows]][:, scored],
        predicted_positive=scores.predicted_positive[score_row[rows]][:, scored],
        labels=truth.labels[rows][:, [truth.findings.index(finding) for finding in findings]],
        images_with_error=int((present & ~good).sum()),
        images_without_score=int((~present).sum()),
        images_without_labels=int((good & ~truth.labeled).sum()),
    )


def _nothing_in_common(scores: ClassificationScores, truth: LabelTruth, present: int, good: int) -> str:
    return (
        f"there is nothing to evaluate: {truth.labeled.sum():,} of {counted(len(truth.labeled), 'image')} of the "
        f"archive have labels, {present:,} are in {scores.uri}, and {good:,} were scored without an error; the "
        f"scored findings are {', '.join(scores.findings)}, the labeled ones {', '.join(truth.findings) or 'none'}. "
        "Use the archive that was scored, one that has labels, or another --split"
    )
