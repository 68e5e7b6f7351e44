"""Ground-truth boxes as training and evaluation use them: valid, in pixels of an image's file, and clipped to it.

A source returns boxes as published, in pixels either of the file or of an original of another size given in its
tables. `with_usable_boxes` drops invalid boxes (`open_manifest` calls it for every source), and `place_boxes`
converts the others to pixels of the file once its size is known. Ingest and the reports on raw archives both call
these two functions, so that training and evaluation use identical boxes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.errors import UserError
from cxr.sources.manifest import Manifest
from cxr.wording import counted

CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
BOXES_TYPE = schema.MANIFEST.field(schema.BOXES).type

FEW, FEW_SHARE = 3, 0.001  # tolerated boxes outside their images; more mean that they refer to another image size
PART_SHARE = 0.1  # the same fraction within a part of an archive, where errors may cluster
_BEYOND_PX = 0.5  # a box may extend this far beyond its image without counting as clipped


@dataclass(frozen=True)
class BoxCounts:
    """Counts of boxes inside and outside their images, for notes and checks."""

    boxes: int = 0
    clipped: int = 0  # extend beyond their image by more than rounding errors
    dropped: int = 0  # of these, boxes entirely outside
    outside_frame: int = 0  # centers outside the image size given by a table or the layout
    outside_file: int = 0  # centers outside the file's image, for boxes in pixels of the file

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def notes(self) -> list[str]:
        """Notes for the user; none if all boxes are inside."""
        if not self.clipped:
            return []
        lost = f"; {self.dropped:,} of these were entirely outside and are dropped" if self.dropped else ""
        return [f"boxes clipped to their images: {self.clipped:,} of {self.boxes:,}{lost}"]

    def check(self, share: float = FEW_SHARE, *, whole: bool = False) -> None:
        """Raise UserError if so many boxes are outside their images that they must refer to another image size.

        Args:
            share: tolerated fraction of boxes outside; `FEW` boxes are always tolerated.
            whole: these are all boxes of the archive, so at least one must be inside.
        """
        for outside, frame in ((self.outside_frame, _BY_TABLE), (self.outside_file, _BY_FILE)):
            if outside > max(FEW, share * self.boxes) or (whole and outside and self.dropped == self.boxes):
                raise UserError(
                    f"expected boxes inside their images, got {outside:,} of {counted(self.boxes, 'box', 'boxes')} "
                    f"outside. {frame}"
                )


_BY_TABLE = (
    "They were read as pixels of the image size in the archive's tables or published layout. Correct the boxes or "
    "the sizes; for boxes that refer to another image size, use --boxes with columns width and height"
)
_BY_FILE = (
    "They were read as pixels of the image files, because no table gives another size. If they refer to originals of "
    "another size, add it: columns width and height in the table of boxes, or train_meta.csv (image_id, dim0, dim1)"
)


@dataclass(frozen=True)
class PlacedBoxes:
    """Boxes in pixels of the files, null if the file's size or the boxes are unknown; and their counts."""

    boxes: pa.ListArray  # of schema.BOX_TYPE
    counts: BoxCounts


@dataclass(frozen=True)
class _Flat:
    """The boxes of N images, M in total, as arrays."""

    lists: pa.ListArray
    values: pa.StructArray
    image: np.ndarray  # (M,)
    corners: np.ndarray  # (M, 4) float64

    @classmethod
    def of(cls, lists: pa.Array | pa.ChunkedArray) -> Self:
        chunk = (lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists).cast(BOXES_TYPE)
        values = chunk.flatten()
        columns = [pc.struct_field(values, name).to_numpy(zero_copy_only=False) for name in CORNERS]
        image = pc.list_parent_indices(chunk).to_numpy(zero_copy_only=False)
        return cls(chunk, values, image, np.stack(columns, 1).astype(np.float64))

    def rebuilt(self, corners_M4: np.ndarray, keep_M: np.ndarray, known_N: np.ndarray) -> pa.ListArray:
        """Lists of the boxes to keep, with new corners; null where they were null or `known_N` is false."""
        keep = pa.array(keep_M)
        known_N = known_N & self.lists.is_valid().to_numpy(zero_copy_only=False)
        named = [pc.struct_field(self.values, name).filter(keep) for name in (schema.LABEL, schema.READER)]
        moved = [pa.array(column[keep_M], pa.float32()) for column in corners_M4.T]
        boxes = pa.StructArray.from_arrays([*named, *moved], fields=list(schema.BOX_TYPE))
        ends = np.cumsum(np.bincount(self.image[keep_M], minlength=len(self.lists)))
        offsets = pa.array(np.insert(ends, 0, 0), pa.int32())
        return pa.ListArray.from_arrays(offsets, boxes, type=BOXES_TYPE, mask=pa.array(~known_N))


def frames_px(own: pa.Array | pa.ChunkedArray, side_px: int | None) -> np.ndarray:
    """(N, 2) width and height that each image's boxes refer to; NaN if these are the file's own.

    Args:
        own: `schema.BOXES_FRAME`, [height, width] or null.
        side_px: `boxes_frame_px` of the manifest.
    """
    frames = np.full((len(own), 2), side_px or np.nan, np.float64)
    column = own.combine_chunks() if isinstance(own, pa.ChunkedArray) else own
    frames[column.is_valid().to_numpy(zero_copy_only=False)] = column.flatten().to_numpy().reshape(-1, 2)[:, ::-1]
    return frames


def with_usable_boxes(manifest: Manifest) -> Manifest:
    """Drop invalid boxes, and clip the others to their image size where it is known.

    Boxes without area, inverted boxes and boxes with NaN coordinates are dropped, and a note counts them. Labels are
    unchanged: an image can show a finding whose box is unusable.

    Raises:
        UserError: too many boxes are outside their images; see `BoxCounts.check`.
    """
    table = manifest.table
    flat = _Flat.of(table[schema.BOXES])
    if not len(flat.values):
        return manifest
    numbers = np.isfinite(flat.corners).all(1)
    usable = numbers & _has_area(flat.corners)
    frames = frames_px(table[schema.BOXES_FRAME], manifest.boxes_frame_px)
    corners, inside, counts = _clip(flat, usable, np.ones_like(frames), frames, framed=np.isfinite(frames[:, 0]))
    counts.check(whole=True)
    reasons = {"without area": numbers & ~usable, "with an invalid coordinate": ~numbers}
    dropped = [f"{chosen.sum():,} {reason}" for reason, chosen in reasons.items() if chosen.any()]
    notes = [f"boxes dropped: {', '.join(dropped)}"] if dropped else []
    if not dropped and not counts.clipped:
        return manifest
    boxes = flat.rebuilt(corners, usable & inside, np.ones(len(flat.lists), bool))
    index = table.schema.get_field_index(schema.BOXES)
    table = table.set_column(index, table.schema.field(index), boxes)
    return Manifest(table, manifest.findings, [*manifest.notes, *notes, *counts.notes()])


def place_boxes(boxes: pa.Array | pa.ChunkedArray, frames_N2: np.ndarray, sizes_N2: np.ndarray) -> PlacedBoxes:
    """Convert a manifest's boxes to pixels of their files and clip them to the image; drop boxes outside.

    Args:
        frames_N2: as returned by `frames_px`.
        sizes_N2: width and height of the files in pixels; NaN if unknown.
    """
    flat = _Flat.of(boxes)
    framed, sized = np.isfinite(frames_N2[:, 0]), np.isfinite(sizes_N2[:, 0])
    scales = np.where(framed[:, None], sizes_N2 / np.where(framed[:, None], frames_N2, 1), 1)
    corners, inside, counts = _clip(flat, sized[flat.image], scales, sizes_N2, framed)
    return PlacedBoxes(flat.rebuilt(corners, inside, sized), counts)


def _clip(
    flat: _Flat, selected_M: np.ndarray, scale_N2: np.ndarray, limit_N2: np.ndarray, framed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, BoxCounts]:
    """Scaled and clipped corners (M, 4); (M,) bool, selected and not entirely outside; counts of the selected boxes.

    Boxes of images whose limit is NaN are neither clipped nor counted.
    """
    image, limit = flat.image, np.tile(limit_N2, 2)[flat.image]
    known = selected_M & np.isfinite(limit).all(1)
    corners = flat.corners * np.tile(scale_N2, 2)[image]
    clipped = np.where(known[:, None], np.clip(corners, 0, limit), corners)
    inside = selected_M & (~known | _has_area(clipped))
    center = (corners[:, :2] + corners[:, 2:]) / 2
    outside = known & ((center < 0) | (center > limit[:, :2])).any(1)
    counts = BoxCounts(
        boxes=int(known.sum()),
        clipped=int((np.abs(clipped[known] - corners[known]) > _BEYOND_PX).any(1).sum()),
        dropped=int((known & ~inside).sum()),
        outside_frame=int((outside & framed[image]).sum()),
        outside_file=int((outside & ~framed[image]).sum()),
    )
    return clipped, inside, counts


def _has_area(corners_M4: np.ndarray) -> np.ndarray:
    """(M,) bool; false if a coordinate is NaN. Evaluated in float32, the type of boxes in rows."""
    low_M2, high_M2 = np.split(corners_M4.astype(np.float32), 2, axis=1)
    return np.logical_and.reduce(high_M2 > low_M2, axis=1)
