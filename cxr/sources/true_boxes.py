"""True boxes as training and evaluation use them: real boxes only, in pixels of each image's file, within the image.

A source gives boxes as its tables have them, in pixels of some frame: the file itself, or an original of another size
that the tables name. `with_usable_boxes` drops what is no box (`open_manifest` calls it for every source), and
`place_boxes` brings the rest to the file once its size is known. Both ingest and the reports on raw archives call
these two, so that a network that finds exactly what it was taught finds exactly what it is evaluated by.
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

CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
BOXES_TYPE = schema.MANIFEST.field(schema.BOXES).type

FEW, FEW_SHARE = 3, 0.001  # boxes outside their images that are taken for slips; more mean a wrong frame
PART_SHARE = 0.1  # the same share for a part of an archive, in which slips may stand together
_BEYOND_PX = 0.5  # by which a box may reach beyond its image before it counts as clipped


@dataclass(frozen=True)
class BoxCounts:
    """How the boxes of some images lie, for notes and checks."""

    boxes: int = 0
    clipped: int = 0  # reach beyond their image, by more than rounding
    dropped: int = 0  # of these, those entirely outside
    outside_frame: int = 0  # have their middle outside, in a frame that a table or the layout gives
    outside_file: int = 0  # have their middle outside, and were read as pixels of the file

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def notes(self) -> list[str]:
        """What a user should know; nothing where all boxes lie inside."""
        if not self.clipped:
            return []
        lost = f"; dropped, as entirely outside: {self.dropped:,}" if self.dropped else ""
        return [f"{self.clipped:,} of {self.boxes:,} boxes reached beyond their images and were clipped{lost}"]

    def check(self, share: float = FEW_SHARE, *, whole: bool = False) -> None:
        """Raise UserError where so many boxes lie outside that the frame must be another one.

        Args:
            share: of the boxes, which may lie outside; `FEW` always may.
            whole: these are all boxes of the archive, of which some must lie inside.
        """
        for outside, frame in ((self.outside_frame, _BY_TABLE), (self.outside_file, _BY_FILE)):
            if outside > max(FEW, share * self.boxes) or (whole and outside and self.dropped == self.boxes):
                raise UserError(f"{outside:,} of {self.boxes:,} boxes lie outside their images. {frame}")


_BY_TABLE = (
    "They were read as pixels of the images' size that the archive's tables, or its published layout, give. Correct "
    "the boxes or these sizes; for boxes of another frame, give --annotations with the columns width and height"
)
_BY_FILE = (
    "They were read as pixels of the image files, since no table gives another size. If they refer to originals of "
    "another size, give it: columns width and height in the table of boxes, or train_meta.csv (image_id, dim0, dim1)"
)


@dataclass(frozen=True)
class PlacedBoxes:
    """Boxes in pixels of the files, null where the file's size or the boxes are unknown, and how they lay."""

    boxes: pa.ListArray  # of schema.BOX_TYPE
    counts: BoxCounts


@dataclass(frozen=True)
class _Flat:
    """The boxes of N images, M in all, as arrays."""

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

    def rebuilt(self, corners_M4: np.ndarray, kept_M: np.ndarray, known_N: np.ndarray) -> pa.ListArray:
        """Lists of the boxes that are kept, with these corners; null where they were, or nothing is known."""
        kept = pa.array(kept_M)
        known_N = known_N & self.lists.is_valid().to_numpy(zero_copy_only=False)
        named = [pc.struct_field(self.values, name).filter(kept) for name in (schema.LABEL, schema.READER)]
        moved = [pa.array(column[kept_M], pa.float32()) for column in corners_M4.T]
        boxes = pa.StructArray.from_arrays([*named, *moved], fields=list(schema.BOX_TYPE))
        ends = np.cumsum(np.bincount(self.image[kept_M], minlength=len(self.lists)))
        offsets = pa.array([0, *ends.tolist()], pa.int32())
        return pa.ListArray.from_arrays(offsets, boxes, type=BOXES_TYPE, mask=pa.array(~known_N))


def frames_px(own: pa.Array | pa.ChunkedArray, side_px: int | None) -> np.ndarray:
    """(N, 2) width and height of the frame that each image's boxes refer to, NaN where it is the file itself.

    Args:
        own: `schema.BOXES_FRAME`, [height, width] or null.
        side_px: `boxes_frame_px` of the manifest.
    """
    common = [side_px or np.nan] * 2
    return np.array([frame[::-1] if frame else common for frame in own.to_pylist()], np.float64).reshape(-1, 2)


def with_usable_boxes(manifest: Manifest) -> Manifest:
    """The manifest without boxes that are none, and with the others inside their frames where these are known.

    A box without area, inverted, or with a coordinate that is no number is dropped, and a note counts them. Labels
    stay: an image can show a finding whose box cannot be used.

    Raises:
        UserError: too many boxes lie outside their frames; see `BoxCounts.check`.
    """
    table = manifest.table
    flat = _Flat.of(table[schema.BOXES])
    if not len(flat.values):
        return manifest
    numbers = np.isfinite(flat.corners).all(1)
    usable = numbers & _has_area(flat.corners)
    frames = frames_px(table[schema.BOXES_FRAME], manifest.boxes_frame_px)
    corners, inside, counts = _clipped(flat, usable, np.ones_like(frames), frames, framed=np.isfinite(frames[:, 0]))
    counts.check(whole=True)
    reasons = {"without area": numbers & ~usable, "with a coordinate that is no number": ~numbers}
    dropped = [f"{chosen.sum():,} {reason}" for reason, chosen in reasons.items() if chosen.any()]
    notes = [f"boxes dropped: {', '.join(dropped)}"] if dropped else []
    if not dropped and not counts.clipped:
        return manifest
    boxes = flat.rebuilt(corners, usable & inside, np.ones(len(flat.lists), bool))
    place = table.schema.get_field_index(schema.BOXES)
    table = table.set_column(place, table.schema.field(place), boxes)
    return Manifest(table, manifest.findings, [*manifest.notes, *notes, *counts.notes()])


def place_boxes(boxes: pa.Array | pa.ChunkedArray, frames_N2: np.ndarray, sizes_N2: np.ndarray) -> PlacedBoxes:
    """Boxes of a manifest in pixels of their files, clipped to the image; those that lie outside are dropped.

    Args:
        frames_N2: as `frames_px` gives them.
        sizes_N2: width and height of the files in pixels; NaN for images without.
    """
    flat = _Flat.of(boxes)
    framed, sized = np.isfinite(frames_N2[:, 0]), np.isfinite(sizes_N2[:, 0])
    scales = np.where(framed[:, None], sizes_N2 / np.where(framed[:, None], frames_N2, 1), 1)
    corners, inside, counts = _clipped(flat, sized[flat.image], scales, sizes_N2, framed)
    return PlacedBoxes(flat.rebuilt(corners, inside, sized), counts)


def _clipped(
    flat: _Flat, chosen_M: np.ndarray, scale_N2: np.ndarray, limit_N2: np.ndarray, framed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, BoxCounts]:
    """Scaled and clipped corners (M, 4); (M,) bool, chosen and not entirely outside; counts of those chosen.

    An image whose limit is NaN has boxes that are not clipped and do not count.
    """
    image, limit = flat.image, np.tile(limit_N2, 2)[flat.image]
    known = chosen_M & np.isfinite(limit).all(1)
    corners = flat.corners * np.tile(scale_N2, 2)[image]
    clipped = np.where(known[:, None], np.clip(corners, 0, limit), corners)
    inside = chosen_M & (~known | _has_area(clipped))
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    outside = known & ((middle < 0) | (middle > limit[:, :2])).any(1)
    counts = BoxCounts(
        boxes=int(known.sum()),
        clipped=int((np.abs(clipped[known] - corners[known]) > _BEYOND_PX).any(1).sum()),
        dropped=int((known & ~inside).sum()),
        outside_frame=int((outside & framed[image]).sum()),
        outside_file=int((outside & ~framed[image]).sum()),
    )
    return clipped, inside, counts


def _has_area(corners_M4: np.ndarray) -> np.ndarray:
    """(M,) bool; false where a coordinate is NaN. As float32, in which rows hold boxes."""
    low_M2, high_M2 = np.split(corners_M4.astype(np.float32), 2, axis=1)
    return np.logical_and.reduce(high_M2 > low_M2, axis=1)
