"""Masks that a run has predicted, compared with the archive's masks image by image."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation.ground_truth_masks import MaskTruth
from cxr.evaluation.mask_comparison import ImageMasks, compare_all
from cxr.evaluation.run import NoGroundTruthError, Run, Split, read_scores
from cxr.metrics.segmentation import dice
from cxr.metrics.segmentation.overlap_metrics import PREDICTED, TRUE
from cxr.wording import counted

_COLUMNS = (schema.IMAGE_ID, schema.ERROR, schema.HEIGHT_PX, schema.WIDTH_PX, *schema.MASK_SCORES.names)


@dataclass(frozen=True)
class MaskScores:
    """Predicted masks of a run; rows correspond."""

    uri: str
    image_ids: pa.Array
    codes: pa.ChunkedArray  # relative RLE at the original size, null for images with an error
    sizes: np.ndarray  # (N, 2) height and width of the original
    areas_px: np.ndarray  # (N,) of the masks, at the original size
    probabilities: np.ndarray  # (N,) NaN if there is none
    good: np.ndarray  # (N,) bool: scored without an error


@dataclass(frozen=True)
class SegmentationEvaluation:
    """Images with both a predicted and a ground-truth mask, and counts of the others."""

    rows: np.ndarray  # (N,) rows of the ground truth, ascending
    places: np.ndarray  # (N,) rows of the scores
    patients: np.ndarray  # (N,)
    probabilities: np.ndarray  # (N,) NaN if there is none
    overlap: Tensor  # (N, 4) as metrics.segmentation.overlap counts
    hd95_px: np.ndarray  # (N,) NaN if a mask is empty
    hd95_mm: np.ndarray  # (N,) NaN also if the spacing is unknown
    rejected: dict[str, int]  # counts of images that were left out, by reason
    images_with_error: int
    images_without_score: int
    images_without_truth: int  # scored, but without a known ground-truth mask

    def at(self, rows: np.ndarray) -> SegmentationEvaluation:
        """Some of these images."""
        readable = np.searchsorted(self.rows, rows)
        names = ("rows", "places", "patients", "probabilities", "overlap", "hd95_px", "hd95_mm")
        return replace(self, **{name: getattr(self, name)[readable] for name in names})

    @property
    def one_empty(self) -> int:
        """Number of images in which exactly one mask is empty."""
        return int(((self.overlap[:, PREDICTED] > 0) != (self.overlap[:, TRUE] > 0)).sum())

    def worst_first(self) -> np.ndarray:
        """(N,) order by ascending Dice; ties by the share of wrong pixels, the largest first."""
        both, predicted, true, pixels = self.overlap.double().numpy().T
        return np.lexsort((-(predicted + true - 2 * both) / pixels, dice(self.overlap).numpy()))


def load_scores(run: Run, split: Split = "all") -> MaskScores:
    """A run's scores; raises UserError if its family predicts no masks."""
    table = pa.concat_tables(part.replace_schema_metadata() for part in read_scores(run, _COLUMNS, split))
    good = pc.and_(pc.is_null(table[schema.ERROR]), pc.is_valid(table[schema.PRED_MASK_RLE]))
    sizes = (table[name].fill_null(0).to_numpy() for name in (schema.HEIGHT_PX, schema.WIDTH_PX))
    return MaskScores(
        uri=run.uri,
        image_ids=table[schema.IMAGE_ID].combine_chunks(),
        codes=table[schema.PRED_MASK_RLE],
        sizes=np.stack(list(sizes), 1),
        areas_px=table[schema.PRED_MASK_AREA_PX].fill_null(0).to_numpy(),
        probabilities=table[schema.PRED_MASK_PROBABILITY].fill_null(math.nan).to_numpy(),
        good=good.to_numpy(),
    )


def evaluate(scores: MaskScores, truth: MaskTruth) -> SegmentationEvaluation:
    """Compare the masks of all images that have both. Images with an unreadable mask are left out.

    Raises:
        UserError: there is no such image, or none with readable masks; NoGroundTruthError if the archive has no mask.
    """
    places = pc.index_in(truth.image_ids, value_set=scores.image_ids).fill_null(-1).to_numpy()
    present = places >= 0
    good = present & scores.good[places]
    rows = np.flatnonzero(good & truth.known)
    if not len(rows):
        raise nothing_in_common(scores, truth, int(present.sum()), int(good.sum()))
    pairs = (_masks_of(scores, truth, row, int(places[row])) for row in rows.tolist())
    compared = list(compare_all(pairs, len(rows)))
    rejected = Counter(result for result in compared if isinstance(result, str))
    readable = np.array([not isinstance(result, str) for result in compared])
    figures = [result for result in compared if not isinstance(result, str)]
    if not figures:
        raise UserError(f"none of {counted(len(rows), 'image')} can be evaluated: {', '.join(rejected)}")
    return SegmentationEvaluation(
        rows=rows[readable],
        places=places[rows[readable]],
        patients=truth.patients[rows[readable]],
        probabilities=scores.probabilities[places[rows[readable]]],
        overlap=torch.tensor([figure.counts for figure in figures]),
        hd95_px=np.array([figure.hd95_px for figure in figures]),
        hd95_mm=np.array([figure.hd95_mm for figure in figures]),
        rejected=dict(rejected.most_common()),
        images_with_error=int((present & ~good).sum()),
        images_without_score=int((~present).sum()),
        images_without_truth=int((good & ~truth.known).sum()),
    )


def both_masks(scores: MaskScores, truth: MaskTruth, row: int, place: int) -> tuple[np.ndarray, np.ndarray]:
    """The predicted and the ground-truth mask of one image; raises ImageRejectedError if one cannot be read."""
    return truth.source(row).pair(scores.codes[place].as_py(), *scores.sizes[place].tolist())


def _masks_of(scores: MaskScores, truth: MaskTruth, row: int, place: int) -> ImageMasks:
    height, width = scores.sizes[place].tolist()
    spacing = truth.spacing_mm(row, height, width)
    return ImageMasks(truth.source(row), scores.codes[place].as_py(), height, width, spacing)


def nothing_in_common(scores: MaskScores, truth: MaskTruth, present: int, good: int) -> UserError:
    """The error if no image has both masks: a NoGroundTruthError if the archive has none."""
    error = UserError if truth.known.any() else NoGroundTruthError
    return error(
        f"there is nothing to evaluate: {int(truth.known.sum()):,} of {counted(len(truth.known), 'image')} of the "
        f"archive have a mask of {truth.label}, {present:,} are in {scores.uri}, and {good:,} were scored without an "
        "error. Use the archive that was scored, one that has such masks, or another --split"
    )
