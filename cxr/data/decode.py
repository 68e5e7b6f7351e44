"""Manifest rows -> decoded rows: fetch, decode, resize, masks. An unusable image is a row with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import repeat
from threading import Semaphore
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data import gate
from cxr.data.decode_pool import Decoded, decode_image, decode_mask
from cxr.data.memory_budget import MemoryBudget
from cxr.errors import ImageRejectedError, UserError, raised_at
from cxr.imaging import dicom_terms, geometry
from cxr.imaging.decode import check_head
from cxr.imaging.enhance import Enhancement
from cxr.imaging.geometry import ResizeTransform
from cxr.imaging.image import MAX_PIXELS, Image, check_not_blank, check_size, to_bits
from cxr.runtime.step_times import DECODING, STORAGE, StepTimes
from cxr.schema import PixelFormat
from cxr.sources import rle
from cxr.sources.manifest import boxes_frame_px, frame_scales
from cxr.sources.options import GateMode
from cxr.sources.true_boxes import BoxCounts, PlacedBoxes, frames_px, place_boxes

_ASPECT_TOLERANCE = 0.01  # relative difference of aspect ratios allowed between a mask file and its image

_FETCHED = 16  # images per call that are fetched, wait to be decoded, or are decoded; a distant store answers slowly
_FILES = MemoryBudget(512 << 20)  # for files in memory, shared by the threads of a process
_COPIES = 3  # copies of a file: here, in shared memory, and in the decoder

_DECODED_COLUMNS = (
    schema.STUDY_ID,
    schema.SERIES_ID,
    schema.SEX,
    schema.AGE_YEARS,
    schema.VIEW,
    schema.BODY_PART,
    schema.MODALITY,
    schema.HEIGHT_PX,
    schema.WIDTH_PX,
    schema.SPACING_MM,
    schema.GATE,
    schema.GATE_SCORE,
)
_FORMAT_COLUMNS = (schema.RESIZE_TRANSFORM, schema.CROP_STATUS, schema.TRUE_THETA, schema.MASKS)
"""Besides the pixels, what depends on the format in which an image is stored."""

_FROM_HEADER = (  # fields of `Image`, which fill what the manifest does not know
    schema.STUDY_ID,
    schema.SERIES_ID,
    schema.SEX,
    schema.AGE_YEARS,
    schema.BODY_PART,
    schema.MODALITY,
)

_KEPT_WITH_ERRORS = (schema.VIEW, schema.BODY_PART, schema.MODALITY, schema.GATE, schema.GATE_SCORE)  # of the gate
WHOLE = "whole image"  # beginning of `crop_status` where the crop failed
_THUMBNAIL = "thumbnail"  # key of the gate's input, until the gate has run

_NOT_READABLE = "file not readable"  # beginning of an error

Values = dict[str, Any]  # column name -> value of one row


class Region(Protocol):
    """The part of an image to store: a square, or a parallelogram that becomes one."""

    @property
    def reason(self) -> str:
        """Why the whole image is to be stored instead; empty if it was cropped."""
        ...

    @property
    def status(self) -> str:
        """Value in column `crop_status` if it was cropped."""
        ...

    def crop(self, pixels_HW: np.ndarray, size: int) -> np.ndarray:
        """The region resampled to (size, size), uint8, uint16, or float32 in [0, 1]."""
        ...

    def transform(self, size: int) -> ResizeTransform:
        """Map from the pixels of `crop(…, size)` to the image that was cropped."""
        ...


Crop = Callable[[np.ndarray], Region]  # an original's pixels (H, W) -> the region to store
Content = Callable[[], bytes | Image]
"""An image in memory: returns its encoded file or its pixels, or raises ImageRejectedError."""


class CropSettings(Protocol):
    """Settings of a crop that can be recorded, and from which each process makes its own `Crop`."""

    def describe(self) -> dict[str, Any]:
        """What shards record, and recipes must ask for; empty if images are to count as whole."""
        ...

    def loaded(self) -> Crop: ...


@dataclass(frozen=True)
class ImageFormat:
    """A format in which images are stored."""

    pixels: PixelFormat
    crop: Crop | None = None
    """Finds the region of each image to store; None stores the whole image. If no region is found, the whole image is
    stored, and column `crop_status` says why. Boxes remain in pixels of the original."""
    enhance: Enhancement | None = None
    """Applied to each decoded image; `crop` sees the image before enhancement."""

    @property
    def is_fit(self) -> bool:
        """Whether images are only resized."""
        return not (self.crop or self.enhance)


def format_column(column: str, number: int) -> str:
    """Name of a column that depends on the format, in rows of several formats: "pixels", "pixels/1", "pixels/2"."""
    return f"{column}/{number}" if number else column


def rows_in_format(rows: pa.Table, number: int, pixels: PixelFormat) -> pa.Table:
    """Rows of several formats as `schema.row_schema(pixels)` of one of them."""
    own = (schema.PIXELS, *_FORMAT_COLUMNS)
    expected = schema.row_schema(pixels)
    columns = [rows[format_column(name, number) if name in own else name] for name in expected.names]
    return pa.table(columns, schema=expected)


def make_rows(
    manifest: pa.Table,
    pixels: PixelFormat,
    threads: int = 4,
    *,
    contents: Sequence[Content | None] | None = None,
    crop: Crop | None = None,
    enhance: Enhancement | None = None,
    check: GateMode = "off",
) -> pa.Table:
    """Fetch and decode the images of a manifest; one row of `schema.row_schema(pixels)` each, in its order.

    Threads fetch, resize and store while child processes decode (`cxr.data.decode_pool`): OpenCV and file reads
    release the GIL. More files are fetched than decoded at a time, so that decoders do not wait for a distant store;
    `_FILES` limits their memory.

    An image that is missing, unreadable, rejected, damaged or crashes its decoder becomes a row with `error` set and
    without pixels, boxes, masks and pose; its labels remain.

    Args:
        threads: number of images that are decoded, resized and stored at a time.
        contents: the images that are in memory; the others, which are None, are read from `source_uri`.
        crop: see `ImageFormat`.
        enhance: see `ImageFormat`.
        check: "warn" fills the columns `gate` and `gate_score`, see `cxr.data.gate`; "exclude" also makes images that
            are not upright frontal chest X-rays rows with an error.

    Raises:
        StorageError: storage failed in a way that concerns more than one image (credentials, unreachable server,
            unmounted share); recorded as errors of rows, such failures would outlive their cause.
        UserError: decoder processes cannot run on this machine.
        MemoryError: there is not enough memory at the moment.
    """
    return _make(manifest, [ImageFormat(pixels, crop, enhance)], threads, contents, check, StepTimes())[0]


def make_counted_rows(
    manifest: pa.Table,
    pixels: PixelFormat,
    threads: int = 4,
    *,
    crop: Crop | None = None,
    enhance: Enhancement | None = None,
    check: GateMode = "off",
    times: StepTimes | None = None,
) -> tuple[pa.Table, BoxCounts]:
    """`make_rows`, and what became of the manifest's boxes; `times` gets the time that it takes."""
    return _make(manifest, [ImageFormat(pixels, crop, enhance)], threads, None, check, times or StepTimes())


def make_rows_in_formats(
    manifest: pa.Table,
    formats: Sequence[ImageFormat],
    threads: int = 4,
    *,
    contents: Sequence[Content | None] | None = None,
    check: GateMode = "off",
    times: StepTimes | None = None,
) -> pa.Table:
    """`make_rows` for several formats: each image is fetched and decoded once, and each step that several formats
    share, such as a crop by the same function, is computed once.

    The columns that depend on the format are there once per format, under the names of `format_column`; see
    `rows_in_format`. An image that cannot be stored in one of the formats is a row with an error. The gate sees what
    it would see if the largest format without crop and enhancement were the only one. `times` gets the time that this
    takes.
    """
    return _make(manifest, formats, threads, contents, check, times or StepTimes())[0]


def _make(
    manifest: pa.Table,
    formats: Sequence[ImageFormat],
    threads: int,
    contents: Sequence[Content | None] | None,
    check: GateMode,
    times: StepTimes,
) -> tuple[pa.Table, BoxCounts]:
    stores = [
        np.zeros((manifest.num_rows, pixels.size, pixels.size), pixels.dtype)
        for pixels in (stored.pixels for stored in formats)
    ]
    make = partial(
        _row,
        turn=Semaphore(threads),
        formats=formats,
        boxes_frame=boxes_frame_px(manifest.schema),
        gated=check != "off",
        times=times,
    )
    with ThreadPoolExecutor(max(_FETCHED, threads)) as pool:
        values = list(pool.map(make, manifest.to_pylist(), zip(*stores, strict=True), contents or repeat(None)))
    if check != "off":
        _apply_gate(values, check)
    return _table(manifest, values, stores, formats)


def _apply_gate(values: list[Values], check: GateMode) -> None:
    """Add the columns `gate` and `gate_score`; with "exclude", replace rows that do not pass by an error."""
    good = [row for row in values if _THUMBNAIL in row]
    empty = np.empty((0, gate.SIZE, gate.SIZE), np.uint8)
    names, scores = gate.verdicts(np.stack([row.pop(_THUMBNAIL) for row in good]) if good else empty)
    for row, name, score in zip(good, names, scores.tolist(), strict=True):
        codes = (row[schema.VIEW], row[schema.BODY_PART], row[schema.MODALITY])
        by_header = gate.header_verdict(*codes)
        row |= {schema.GATE: by_header or name, schema.GATE_SCORE: 0.0 if by_header else score}
        if check == "exclude" and row[schema.GATE] != gate.FRONTAL:
            remaining = {key: row[key] for key in _KEPT_WITH_ERRORS}
            row.clear()
            row |= {schema.ERROR: f"{gate.EXCLUDED}: {remaining[schema.GATE]}", **remaining}


def _row(
    manifest_row: Values,
    outputs: Sequence[np.ndarray],
    content: Content | None,
    turn: Semaphore,
    formats: Sequence[ImageFormat],
    boxes_frame: int | None,
    gated: bool,
    times: StepTimes,
) -> Values:
    """The columns that decoding adds to a manifest row; the pixels of each format are written into its output, an
    array (size, size).

    Args:
        turn: limits the number of images that are decoded, but not how many are fetched.
        times: gets the time for fetching and for decoding, without waiting for others.
    """
    sizes = sorted({stored.pixels.size for stored in formats if stored.is_fit}, reverse=True)
    needs_original = not all(stored.is_fit for stored in formats)
    try:
        with _fetched(manifest_row[schema.SOURCE_URI], content, times) as image, turn, times.measured(DECODING):
            decoded = _decoded(image, [None, *sizes] if needs_original else sizes)
            times.add(DECODING, -decoded.waited_s)
            height, width = decoded.height, decoded.width
            values = _image_columns(manifest_row, decoded, boxes_frame)
            masks = _original_masks(manifest_row[schema.MASKS] or (), height, width)
            in_formats = enumerate(zip(_stored_pixels(decoded, formats), formats, outputs, strict=True))
            for number, ((square, transform, crop_status), stored, output) in in_formats:
                output[:] = to_bits(square, stored.pixels.bits)
                cropped = crop_status is not None and not crop_status.startswith(WHOLE)
                own = {
                    schema.RESIZE_TRANSFORM: transform.as_dict(),
                    schema.CROP_STATUS: crop_status,
                    schema.TRUE_THETA: None if cropped else manifest_row[schema.TRUE_THETA],
                    schema.MASKS: _fitted_masks(masks, stored.pixels.size, transform),
                }
                values |= {format_column(name, number): value for name, value in own.items()}
            if gated:
                values[_THUMBNAIL] = gate.thumbnail(decoded.fitted[sizes[0]] if sizes else decoded.image.pixels)
            return values
    except Exception as error:
        if not _concerns_one_image(error):
            raise
        return {schema.ERROR: _reason(error)}


@contextmanager
def _fetched(uri: str, content: Content | None, times: StepTimes) -> Iterator[bytes | Image]:
    """Read an image's file, unless it is in memory; while the block runs, its memory is reserved from the threads'
    budget."""
    with ExitStack() as reservation:

        def check(head: bytes, file_bytes: int) -> None:
            check_head(head, file_bytes)
            reservation.close()  # release the memory of a failed attempt
            reservation.enter_context(_FILES.hold(_COPIES * file_bytes))

        if content is None:
            with times.measured(STORAGE):
                image = storage.read_bytes(uri, check=check)
        elif isinstance(image := content(), bytes):
            check(image, len(image))
        yield image


def _decoded(image: bytes | Image, sizes: Sequence[int | None]) -> Decoded:
    """Decode an image, unless it has been decoded already, and resize it; None is its original size, which only the
    first may be."""
    if isinstance(image, bytes):
        return decode_image(image, *sizes)
    height, width = image.pixels.shape
    check_size(height, width)
    check_not_blank(image.pixels)
    fitted = {size: geometry.fit(image.pixels, size)[0] for size in sizes if size}
    first = replace(image, pixels=fitted[sizes[0]]) if sizes[0] else image
    return Decoded(first, height, width, fitted=fitted)


def _stored_pixels(
    decoded: Decoded, formats: Sequence[ImageFormat]
) -> Iterator[tuple[np.ndarray, ResizeTransform, str | None]]:
    """For each format: the pixels to store, their transform, and the value of column `crop_status`.

    Args:
        decoded: at its original size, if a format needs it; and resized for all others.
    """
    original = decoded.image.pixels

    @cache
    def enhanced(enhance: Enhancement | None) -> np.ndarray:
        return enhance(original) if enhance else original

    @cache
    def region_of(crop: Crop) -> Region:
        return crop(original)

    @cache
    def fitted(enhance: Enhancement | None, size: int) -> np.ndarray:
        return geometry.fit(enhanced(enhance), size)[0]

    @cache
    def cropped(crop: Crop, enhance: Enhancement | None, size: int) -> np.ndarray:
        return region_of(crop).crop(enhanced(enhance), size)

    for stored in formats:
        size, crop, enhance = stored.pixels.size, stored.crop, stored.enhance or None
        region = region_of(crop) if crop else None
        if crop and region and not region.reason:
            yield cropped(crop, enhance, size), region.transform(size), region.status
        else:
            transform = geometry.fitted_transform(decoded.height, decoded.width, size)
            whole = decoded.fitted[size] if stored.is_fit else fitted(enhance, size)
            yield whole, transform, f"{WHOLE}: {region.reason}" if region else None


def _concerns_one_image(error: Exception) -> bool:
    if isinstance(error, storage.StorageError):
        return isinstance(error, (storage.NotFoundError, storage.UnreadableError))
    return not isinstance(error, (MemoryError, UserError))


def _reason(error: Exception) -> str:
    """Why an image is unusable, without its URI, which is in the row, and without values from its header."""
    if isinstance(error, ImageRejectedError):
        return str(error)
    if isinstance(error, storage.NotFoundError):
        return "file not found"
    if isinstance(error, storage.StorageError):
        cause = error.__cause__
        reason = getattr(cause, "strerror", None) or type(cause).__name__
        return f"unusable file: {reason}" if isinstance(error, storage.DamagedError) else f"{_NOT_READABLE}: {reason}"
    return f"unexpected {type(error).__name__}{raised_at(error)}"


def is_unread(error: str) -> bool:
    """Whether an error of a row says that storage did not give its file, which it may do later although the file has
    not changed."""
    return error.startswith(_NOT_READABLE)


def _image_columns(manifest_row: Values, decoded: Decoded, boxes_frame: int | None) -> Values:
    """All columns except boxes and those that depend on the format; the spacing is that of the file's own pixels."""
    image, height, width = decoded.image, decoded.height, decoded.width
    x_scale, y_scale = frame_scales(manifest_row[schema.BOXES_FRAME], boxes_frame, height, width)
    spacing = manifest_row[schema.SPACING_MM]
    if spacing is not None:
        spacing = [spacing[0] / y_scale, spacing[1] / x_scale]
    return {
        **{name: _first_known(manifest_row[name], getattr(image, name)) for name in _FROM_HEADER},
        schema.VIEW: dicom_terms.view(manifest_row[schema.VIEW]) or image.view,
        schema.HEIGHT_PX: height,
        schema.WIDTH_PX: width,
        schema.SPACING_MM: spacing or image.spacing_mm,
    }


def _first_known(listed: Any, in_file: Any) -> Any:
    return in_file if listed is None else listed


def _original_masks(sources: Sequence[Values], height: int, width: int) -> dict[str, np.ndarray]:
    """One bool (height, width) per label: the union of all masks with this label, such as left and right lung."""
    united: dict[str, np.ndarray] = {}
    for source in sources:
        label = source[schema.LABEL]
        mask = original_mask(source, height, width)
        united[label] = united[label] | mask if label in united else mask
    return united


def _fitted_masks(masks: Mapping[str, np.ndarray], size: int, transform: ResizeTransform) -> list[Values]:
    """The masks of an original, bit-packed on the pixel grid of its stored pixels."""
    return [
        {schema.LABEL: label, schema.MASK_BITS: np.packbits(geometry.fit_mask(mask, size, transform)).tobytes()}
        for label, mask in masks.items()
    ]


def original_mask(source: Values, height: int, width: int) -> np.ndarray:
    """Read a mask as published: bool (height, width) of the original image.

    In a mask file (PNG, GIF or JPEG), pixels brighter than half of the brightest one belong to the mask; the
    brightness of a color is that of its brightest channel. A mask of another size is resized to the image.
    """
    code = source[schema.MASK_RLE]
    if code is not None:
        own = source.get(schema.MASK_HEIGHT_PX) or height, source.get(schema.MASK_WIDTH_PX) or width
        if min(own) < 1 or own[0] * own[1] > MAX_PIXELS:
            raise ImageRejectedError(f"mask of {source[schema.LABEL]}: invalid size, {own[1]} x {own[0]}")
        mask = rle.decode(code, *own, source.get(schema.MASK_FORM) or "relative")
        return _resized_mask(mask, source[schema.LABEL], height, width)
    try:
        picture = decode_mask(
            storage.read_bytes(source[schema.MASK_URI], check=check_head)
        )  # blank masks are allowed
    except (ImageRejectedError, storage.NotFoundError) as error:
        raise ImageRejectedError(f"mask of {source[schema.LABEL]}: {_reason(error)}") from None
    return _resized_mask(picture > picture.max() // 2, source[schema.LABEL], height, width)


def _resized_mask(mask: np.ndarray, label: str, height: int, width: int) -> np.ndarray:
    mask_height, mask_width = mask.shape
    if (mask_height, mask_width) == (height, width):
        return mask
    if abs(mask_width * height - mask_height * width) > _ASPECT_TOLERANCE * mask_height * width:
        raise ImageRejectedError(
            f"mask of {label}: expected the aspect ratio of the image ({width} x {height}), "
            f"got {mask_width} x {mask_height}"
        )
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)


def _table(
    manifest: pa.Table, values: Sequence[Values], stores: Sequence[np.ndarray], formats: Sequence[ImageFormat]
) -> tuple[pa.Table, BoxCounts]:
    row_schema = schema.row_schema(formats[0].pixels)
    errors = pa.array([row.get(schema.ERROR) for row in values], pa.string())

    def column(name: str, key: str) -> pa.Array:
        return pa.array([row.get(key) for row in values], row_schema.field(name).type)

    columns = {name: manifest[name] for name in manifest.column_names}
    columns |= {name: column(name, name) for name in _DECODED_COLUMNS}
    columns |= {schema.ERROR: errors}
    placed = _placed_boxes(manifest, columns[schema.WIDTH_PX], columns[schema.HEIGHT_PX])
    columns[schema.BOXES] = placed.boxes
    fields = [*row_schema]
    for number, (store, stored) in enumerate(zip(stores, formats, strict=True)):
        own = {name: column(name, format_column(name, number)) for name in _FORMAT_COLUMNS}
        own[schema.PIXELS] = _pixels_column(store, errors, stored.pixels)
        columns |= {format_column(name, number): value for name, value in own.items()}
        fields += [pa.field(format_column(name, number), value.type) for name, value in own.items() if number]
    row_schema = pa.schema(fields, row_schema.metadata)
    return pa.table([columns[name] for name in row_schema.names], schema=row_schema), placed.counts


def _placed_boxes(manifest: pa.Table, width_px: pa.Array, height_px: pa.Array) -> PlacedBoxes:
    """The boxes of manifest rows in pixels of their files, given the files' sizes (null without an image).

    Null remains null: unknown boxes do not mean that there are no findings.
    """
    sizes = np.stack([side.to_numpy(zero_copy_only=False) for side in (width_px, height_px)], 1).astype(np.float64)
    frames = frames_px(manifest[schema.BOXES_FRAME], boxes_frame_px(manifest.schema))
    return place_boxes(manifest[schema.BOXES], frames, sizes)


def _pixels_column(store: np.ndarray, errors: pa.Array, pixels: PixelFormat) -> pa.Array:
    """A view of `store`, null where there is an error."""
    good = np.packbits(errors.is_null().to_numpy(zero_copy_only=False), bitorder="little")
    buffers = [pa.py_buffer(good), pa.py_buffer(store.reshape(-1))]
    return pa.Array.from_buffers(pa.binary(pixels.row_bytes), len(store), buffers)
