"""Manifest rows -> decoded rows: fetch, decode, fit, masks. A bad image is a row with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data.decode_pool import Decoded, decode_image, decode_mask
from cxr.data.memory_budget import MemoryBudget
from cxr.errors import ImageRejectedError, UserError, raised_at
from cxr.imaging import dicom_terms, geometry
from cxr.imaging.decode import check_head
from cxr.imaging.enhance import Enhancement
from cxr.imaging.geometry import ResizeTransform
from cxr.imaging.image import to_bits
from cxr.imaging.lung_bbox import LungSquare
from cxr.schema import PixelFormat
from cxr.sources import rle
from cxr.sources.manifest import boxes_frame_px, frame_scales
from cxr.sources.true_boxes import PlacedBoxes, frames_px, place_boxes

_ASPECT_TOLERANCE = 0.01  # by which a mask picture's width : height may differ from its image's
CROPPED = "lungs"  # in column `crop_status`

_FILES = MemoryBudget(512 << 20)  # that the threads of a process have read together
_COPIES = 3  # of a file: here, on its way to the decoder, and there

_MADE = (
    schema.VIEW,
    schema.BODY_PART,
    schema.MODALITY,
    schema.HEIGHT_PX,
    schema.WIDTH_PX,
    schema.SPACING_MM,
    schema.RESIZE_TRANSFORM,
    schema.CROP_STATUS,
    schema.TRUE_THETA,
    schema.MASKS,
)

Values = dict[str, Any]  # column name -> value of one row
Crop = Callable[[np.ndarray], LungSquare]  # an original's pixels (H, W) -> the square to cut out of them


class CropSettings(Protocol):
    """How images are cropped: settings that can be recorded, from which each process makes its own `Crop`."""

    def describe(self) -> dict[str, Any]: ...
    def loaded(self) -> Crop: ...


def make_rows(
    manifest: pa.Table,
    pixels: PixelFormat,
    threads: int = 4,
    *,
    crop: Crop | None = None,
    enhance: Enhancement | None = None,
) -> pa.Table:
    """Fetch and decode the images of a manifest; one row of `schema.row_schema(pixels)` each, in its order.

    A few threads fetch, resize and store while child processes decode (`cxr.data.decode_pool`): OpenCV and file reads
    release the GIL. OpenCV's own threads are switched off in this process, since every core has its own worker.

    An image that is missing, unreadable, refused, broken or fatal to its decoder becomes a row with `error` set,
    without pixels, boxes, masks and pose; its labels stay.

    Args:
        crop: finds the square that is stored of each image; None: all of it is. Where that finds a reason against
            a crop, the whole image is stored, and column `crop_status` tells why. Boxes stay in pixels of the original.
        enhance: what is done to each image after it was decoded; `crop` sees it as it was.

    Raises:
        StorageError: storage failed in a way that concerns more than one image (credentials, a server that
            stays away, a share that is gone): recorded as errors these would outlive their cause.
        UserError: no image can be decoded on this machine.
        MemoryError: likewise.
    """
    cv2.setNumThreads(0)
    store = np.zeros((manifest.num_rows, pixels.size, pixels.size), pixels.dtype)
    make = partial(_row, boxes_frame=boxes_frame_px(manifest.schema), bits=pixels.bits, crop=crop, enhance=enhance)
    with ThreadPoolExecutor(threads) as pool:
        made = list(pool.map(make, manifest.to_pylist(), store))
    return _table(manifest, made, store, pixels)


def _row(
    given: Values,
    out: np.ndarray,
    boxes_frame: int | None,
    bits: int,
    crop: Crop | None,
    enhance: Enhancement | None,
) -> Values:
    """What decoding one image adds to its manifest row; its pixels are written into `out` (size, size)."""
    try:
        with _file_in_memory(given[schema.SOURCE_URI]) as data:
            decoded = decode_image(data, fit_px=None if crop or enhance else len(out))
            square, frame, cropped = _framed(decoded, len(out), crop, enhance)
            made = _described(given, decoded, frame, boxes_frame) | {schema.CROP_STATUS: cropped}
            made[schema.TRUE_THETA] = None if cropped == CROPPED else given[schema.TRUE_THETA]
            made[schema.MASKS] = _masks(given[schema.MASKS] or (), decoded.height, decoded.width, len(out), frame)
            out[:] = to_bits(square, bits)
            return made
    except Exception as error:
        if not _concerns_one(error):
            raise
        return {schema.ERROR: _reason(error)}


@contextmanager
def _file_in_memory(uri: str) -> Iterator[bytes]:
    """A file that may be an image, while the block runs; what it takes is held from the budget of all threads."""
    with ExitStack() as held:

        def check(head: bytes, file_bytes: int) -> None:
            check_head(head, file_bytes)
            held.close()  # of an attempt that failed
            held.enter_context(_FILES.hold(_COPIES * file_bytes))

        yield storage.read_bytes(uri, check=check)


def _framed(
    decoded: Decoded, size: int, crop: Crop | None, enhance: Enhancement | None
) -> tuple[np.ndarray, ResizeTransform, str | None]:
    """The pixels that are stored, their frame, and what stands in column `crop_status`."""
    if not (crop or enhance):
        return decoded.image.pixels, geometry.fitted_transform(decoded.height, decoded.width, size), None
    pixels = enhance(decoded.image.pixels) if enhance else decoded.image.pixels
    lungs = crop(decoded.image.pixels) if crop else None
    if lungs is None or lungs.reason:
        return *geometry.fit(pixels, size), lungs and f"whole image: {lungs.reason}"
    return lungs.crop(pixels, size), lungs.transform(size), CROPPED


def _concerns_one(error: Exception) -> bool:
    if isinstance(error, storage.StorageError):
        return isinstance(error, (storage.NotFoundError, storage.UnreadableError))
    return not isinstance(error, (MemoryError, UserError))


def _reason(error: Exception) -> str:
    """Why an image was not used; without its URI, which the row holds, and without values of its header."""
    if isinstance(error, ImageRejectedError):
        return str(error)
    if isinstance(error, storage.NotFoundError):
        return "file not found"
    if isinstance(error, storage.StorageError):
        cause = error.__cause__
        return f"file not readable: {getattr(cause, 'strerror', None) or type(cause).__name__}"
    return f"unexpected {type(error).__name__}{raised_at(error)}"


def _described(given: Values, decoded: Decoded, frame: ResizeTransform, boxes_frame: int | None) -> Values:
    """Everything about an image but its pixels, boxes and masks; spacing is that of the file's own pixels."""
    image, height, width = decoded.image, decoded.height, decoded.width
    x_scale, y_scale = frame_scales(given[schema.BOXES_FRAME], boxes_frame, height, width)
    spacing = given[schema.SPACING_MM]
    if spacing is not None:
        spacing = [spacing[0] / y_scale, spacing[1] / x_scale]
    return {
        schema.VIEW: dicom_terms.view(given[schema.VIEW]) or image.view,
        schema.BODY_PART: image.body_part,
        schema.MODALITY: image.modality,
        schema.HEIGHT_PX: height,
        schema.WIDTH_PX: width,
        schema.SPACING_MM: spacing or image.spacing_mm,
        schema.RESIZE_TRANSFORM: frame.as_dict(),
    }


def _masks(sources: Sequence[Values], height: int, width: int, size: int, frame: ResizeTransform) -> list[Values]:
    """One packed mask a label: several masks of a label (left and right lung, say) are united."""
    united: dict[str, np.ndarray] = {}
    for source in sources:
        label = source[schema.LABEL]
        mask = original_mask(source, height, width)
        united[label] = united[label] | mask if label in united else mask
    return [
        {schema.LABEL: label, schema.MASK_BITS: np.packbits(geometry.fit_mask(mask, size, frame)).tobytes()}
        for label, mask in united.items()
    ]


def original_mask(source: Values, height: int, width: int) -> np.ndarray:
    """A mask as its source gives it, bool (height, width) of the original image.

    A mask picture, PNG, GIF or JPEG, marks what is brighter than half of its brightest pixel; one of another
    size is brought to the image's.
    """
    if source[schema.MASK_RLE] is not None:
        return rle.decode(source[schema.MASK_RLE], height, width)
    try:
        picture = decode_mask(storage.read_bytes(source[schema.MASK_URI], check=check_head))  # may be blank
    except (ImageRejectedError, storage.NotFoundError) as error:
        raise ImageRejectedError(f"mask of {source[schema.LABEL]}: {_reason(error)}") from None
    mask_height, mask_width = picture.shape
    if abs(mask_width * height - mask_height * width) > _ASPECT_TOLERANCE * mask_height * width:
        raise ImageRejectedError(
            f"mask of {source[schema.LABEL]} is {mask_width} x {mask_height}, its image {width} x {height}"
        )
    mask = (picture > picture.max() // 2).astype(np.uint8)
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)


def _table(manifest: pa.Table, made: Sequence[Values], store: np.ndarray, pixels: PixelFormat) -> pa.Table:
    wanted = schema.row_schema(pixels)
    errors = pa.array([row.get(schema.ERROR) for row in made], pa.string())
    columns = {name: manifest[name] for name in manifest.column_names}
    columns |= {name: pa.array([row.get(name) for row in made], wanted.field(name).type) for name in _MADE}
    columns |= {schema.ERROR: errors, schema.PIXELS: _pixels_column(store, errors, pixels)}
    columns[schema.BOXES] = placed_boxes(manifest, columns[schema.WIDTH_PX], columns[schema.HEIGHT_PX]).boxes
    return pa.table([columns[name] for name in wanted.names], schema=wanted)


def placed_boxes(manifest: pa.Table, width_px: pa.Array, height_px: pa.Array) -> PlacedBoxes:
    """The boxes of manifest rows in pixels of their files, whose sizes these are, null where there is no image.

    Null stays null: where a source says nothing of boxes, there may be findings all the same.
    """
    sizes = np.stack([side.to_numpy(zero_copy_only=False) for side in (width_px, height_px)], 1).astype(np.float64)
    frames = frames_px(manifest[schema.BOXES_FRAME], boxes_frame_px(manifest.schema))
    return place_boxes(manifest[schema.BOXES], frames, sizes)


def _pixels_column(store: np.ndarray, errors: pa.Array, pixels: PixelFormat) -> pa.Array:
    """A view on `store`, null where there is an error."""
    good = np.packbits(errors.is_null().to_numpy(zero_copy_only=False), bitorder="little")
    buffers = [pa.py_buffer(good), pa.py_buffer(store.reshape(-1))]
    return pa.Array.from_buffers(pa.binary(pixels.row_bytes), len(store), buffers)
