"""The ground-truth masks of one label, image by image, from a raw archive or from shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data import shards
from cxr.evaluation.ground_truth import PLACES, patient_numbers, read_truth
from cxr.evaluation.images import read_pictures
from cxr.evaluation.mask_comparison import MaskSource, PublishedMask, StoredMask
from cxr.evaluation.run import ReportOptions
from cxr.imaging.geometry import ResizeTransform
from cxr.sources.manifest import Manifest

_THREADS = 8


class MaskTruth(ABC):
    """The ground-truth masks of an archive's images; a mask is read when it is needed.

    Attributes:
        image_ids: of the archive's images in the split.
        patients: (N,) one number per patient.
        known: (N,) bool: the archive has a mask of that label, which may be empty.
        resolution: resolution at which masks are compared, in words.
    """

    resolution = ""

    def __init__(self, manifest: Manifest, label: str, known: np.ndarray) -> None:
        self.table, self.label, self.boxes_frame_px = manifest.table, label, manifest.boxes_frame_px
        self.image_ids: pa.ChunkedArray = manifest.table[schema.IMAGE_ID]
        self.patients = patient_numbers(manifest.table)
        self.known = known

    @abstractmethod
    def source(self, row: int) -> MaskSource:
        """Where the mask of a known row is."""

    def true_mask(self, row: int, height: int, width: int) -> tuple[np.ndarray, ResizeTransform]:
        """See `MaskSource.true_mask`."""
        return self.source(row).true_mask(height, width)

    @abstractmethod
    def spacing_mm(self, row: int, height: int, width: int) -> tuple[float, float] | None:
        """Distance of the compared pixels' centers, between rows and between columns; None if unknown."""

    @abstractmethod
    def pictures(self, rows: Sequence[int]) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
        """Images to show, by row: (S, S) in [0, 1], and the transform to the compared pixels. Rows without an
        available image are left out."""


class RawTruth(MaskTruth):
    """Masks of a raw archive, at the images' own size."""

    resolution = "the images' own resolution"

    def __init__(self, manifest: Manifest, label: str) -> None:
        super().__init__(manifest, label, _labeled(manifest.table[schema.MASKS], label))

    def source(self, row: int) -> PublishedMask:
        masks = self.table[schema.MASKS][row].as_py()
        return PublishedMask([mask for mask in masks if mask[schema.LABEL] == self.label])

    def spacing_mm(self, row: int, height: int, width: int) -> tuple[float, float] | None:
        spacing = self.table[schema.SPACING_MM][row].as_py()
        if spacing is None or not self.boxes_frame_px:
            return spacing and tuple(spacing)
        return spacing[0] * self.boxes_frame_px / height, spacing[1] * self.boxes_frame_px / width

    def pictures(self, rows: Sequence[int]) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
        return read_pictures(self.table, rows, [])


class ShardTruth(MaskTruth):
    """Masks of shards, at the size of the stored pixels."""

    def __init__(self, manifest: Manifest, label: str, info: shards.ShardInfo) -> None:
        super().__init__(manifest, label, _stored_labels(manifest.table, label, info))
        self.info, self.size = info, info.pixels.size
        self.resolution = f"{self.size} x {self.size} px, the shards' resolution"

    def source(self, row: int) -> StoredMask:
        file, stored_row = (self.table[name][row].as_py() for name in PLACES.names)
        group, inside = divmod(stored_row, self.info.row_group_rows)
        return StoredMask(self.info.files[file].uri, group, inside, self.label, self.size, self._frame(row))

    def spacing_mm(self, row: int, height: int, width: int) -> tuple[float, float] | None:
        spacing = self.table[schema.SPACING_MM][row].as_py()
        if spacing is None:
            return None
        x_step, y_step = self._frame(row).then(ResizeTransform(spacing[1], spacing[0])).steps
        return y_step, x_step

    def pictures(self, rows: Sequence[int]) -> dict[int, tuple[np.ndarray, ResizeTransform]]:
        shown = read_pictures(self.table, rows, [self.info])
        return {row: (picture, frame.then(self._frame(row).inverse())) for row, (picture, frame) in shown.items()}

    def _frame(self, row: int) -> ResizeTransform:
        return ResizeTransform.from_dict(self.table[schema.RESIZE_TRANSFORM][row].as_py())


def known_masks(archive: str, options: ReportOptions, label: str, columns: Sequence[str] = ()) -> MaskTruth:
    """The masks of `label` of an archive or of shards, in the split that the options name; prints its notes.

    Args:
        columns: further columns of its table.

    Raises:
        UserError: there is no such archive, or no image in that split.
    """
    columns = [schema.PATIENT_ID, schema.SOURCE_URI, schema.SPACING_MM, *columns]
    if not shards.is_shards(archive):
        manifest = read_truth(archive, options.reading, options.split, [*columns, schema.MASKS], options.labeling)
        manifest.print_notes()
        return RawTruth(manifest, label)
    info = shards.read_info(archive)
    manifest = read_truth(
        archive, options.reading, options.split, [*columns, schema.RESIZE_TRANSFORM], options.labeling
    )
    return ShardTruth(manifest, label, info)


def _labeled(masks: pa.ChunkedArray, label: str) -> np.ndarray:
    """(N,) bool: whether each list of masks contains one of that label."""
    known, start = np.zeros(len(masks), bool), 0
    for chunk in masks.chunks:
        labels = pc.struct_field(pc.list_flatten(chunk), schema.LABEL)
        known[start + np.asarray(pc.list_parent_indices(chunk).filter(pc.equal(labels, label)))] = True
        start += len(chunk)
    return known


def _stored_labels(table: pa.Table, label: str, info: shards.ShardInfo) -> np.ndarray:
    """(N,) bool: whether shards have a mask of that label for each image of a table with PLACES; reads no mask."""
    files, rows = (table[name].to_numpy() for name in PLACES.names)  # NaN for rejected images
    known = np.zeros(table.num_rows, bool)
    numbers = np.unique(files[~np.isnan(files)]).astype(int).tolist()
    with ThreadPoolExecutor(_THREADS) as pool:
        read = partial(storage.read_parquet, columns=[f"{schema.MASKS}.list.element.{schema.LABEL}"])
        parts = pool.map(read, [info.files[number].uri for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            own = files == number
            known[own] = _labeled(part[schema.MASKS], label)[rows[own].astype(int)]
    return known
