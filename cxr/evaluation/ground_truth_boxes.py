"""Ground-truth boxes of the images that are evaluated, and of the training images, from an archive or shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.data import shards
from cxr.evaluation.classification_data import LabelTruth, known_labels
from cxr.evaluation.ground_truth import of_split, read_all_truth
from cxr.evaluation.images import read_pictures
from cxr.evaluation.run import ReportOptions
from cxr.imaging.geometry import ResizeTransform
from cxr.metrics.localization import Boxes, known_places
from cxr.sources.true_boxes import frames_px, place_boxes


@dataclass(frozen=True)
class BoxTruth:
    """Ground truth of an archive's images in a split, ordered by id; rows correspond."""

    table: pa.Table
    labels: LabelTruth
    training: pa.Table  # of the images in the train split
    side_px: int | None  # of the square frame that boxes refer to, see `sources.base.boxes_frame_px`
    info: shards.ShardInfo | None  # None: of a raw archive

    def boxes(self, findings: Sequence[str], rows: np.ndarray, sizes_px: np.ndarray) -> Boxes:
        """Ground-truth boxes of the images in `rows`, by their places there, in pixels of the files that were scored.

        Prints how many had to be clipped.

        Args:
            sizes_px: (N, 2) width and height of those files.

        Raises:
            UserError: too many boxes lie outside their images; see `sources.true_boxes`.
        """
        placed = place_boxes(self.table[schema.BOXES].take(pa.array(rows)), self._frames(self.table)[rows], sizes_px)
        placed.counts.check()
        for note in placed.counts.notes():
            print(f"note: {note}", flush=True)
        return Boxes.of(placed.boxes, findings)

    def _frames(self, table: pa.Table) -> np.ndarray:
        """(N, 2) width and height of the image that each row's boxes refer to; NaN if unknown."""
        if self.info is None:
            return frames_px(table[schema.BOXES_FRAME], self.side_px)
        sides = (table[name].to_numpy() for name in (schema.WIDTH_PX, schema.HEIGHT_PX))
        return np.stack([*sides], 1).astype(np.float64)

    @property
    def listed(self) -> bool:
        """Whether the boxes of any image are known, even if there are none."""
        return self.table[schema.BOXES].null_count < self.table.num_rows

    def known(self, findings: Sequence[str], rows: np.ndarray, true: Boxes) -> np.ndarray:
        """(N, F) bool, see `metrics.localization.known_places`."""
        labels = np.full((len(rows), len(findings)), schema.UNKNOWN, np.int8)
        for column, finding in enumerate(findings):
            if finding in self.labels.findings:
                labels[:, column] = self.labels.labels[rows, self.labels.findings.index(finding)]
        return known_places(true, labels)

    def training_boxes(self, findings: Sequence[str]) -> Boxes:
        """Ground-truth boxes of the training images, as fractions of the image; empty if the images' sizes are
        unknown."""
        frames = self._frames(self.training)
        placed = place_boxes(self.training[schema.BOXES], frames, frames).boxes
        return Boxes.of(placed, findings).scaled(*(1 / frames).T)

    def pictures(self, rows: Sequence[int]) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
        """See `images.read_pictures`."""
        return read_pictures(self.table, rows, [self.info] if self.info else [])


def known_boxes(archive: str, options: ReportOptions) -> BoxTruth:
    """The boxes of an archive or of shards, in the split that the options name; prints its notes.

    Raises:
        UserError: no such archive, or no image in that split.
    """
    info = shards.read_info(archive) if shards.is_shards(archive) else None
    columns = [schema.PATIENT_ID, schema.SOURCE_URI, schema.LABELS, schema.BOXES, schema.EXTRA]
    columns += [schema.HEIGHT_PX, schema.WIDTH_PX] if info else [schema.BOXES_FRAME]
    everything = read_all_truth(archive, options.reading, columns, options.labeling)
    everything.print_notes()
    everything.table = everything.table.sort_by(
        schema.IMAGE_ID
    )  # makes baselines independent of the order in storage
    manifest = of_split(everything, archive, options.split)
    training = everything.table.filter(pc.equal(everything.table[schema.SPLIT], "train"))
    return BoxTruth(manifest.table, known_labels(manifest), training, manifest.boxes_frame_px, info)
