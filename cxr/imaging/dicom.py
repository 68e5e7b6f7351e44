"""DICOM files (PS3.10) to X-rays. No tag's value is ever logged or put into an error."""

from __future__ import annotations

import logging
import re
import struct
import warnings
from io import BytesIO

import numpy as np
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder

from cxr.errors import Refused
from cxr.imaging.dicom_display import rendered
from cxr.imaging.dicom_tags import kind, number, spacing_mm, value, view
from cxr.imaging.image import Image, check_size, to_gray
from cxr.imaging.raster import JPEG_END, JPEG_MAGIC, jpeg_frame

_MAGIC = b"DICM"
_FIRST_TAG = re.compile(rb"[\x02\x08]\x00[\x00-\x18]\x00|\x00[\x02\x08]\x00[\x00-\x18]", re.S)
_PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
_JPEG_2000_SIZE = b"\xff\x4f\xff\x51"


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are DICOM (PS3.10), with its preamble or, as in old archives, without."""
    return data[128:132] == _MAGIC or _FIRST_TAG.match(data) is not None


def decode_dicom(data: bytes) -> Image:
    """Decode a single-frame DICOM, uncompressed, RLE, JPEG, JPEG lossless, JPEG-LS or JPEG 2000.

    A window that is invalid, or shows nothing of the image, is passed over; without any, the least and the
    greatest value become black and white. MONOCHROME1 or an inverse presentation LUT turns the image, once.
    Padding is black. Up to 8 bits stored give uint8, more give uint16.

    Raises:
        Refused: no X-ray can be had from it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote values of tags
        try:
            return _decoded(data)
        except (Refused, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of any kind (a Rust panic is no Exception); texts may quote tags
            raise Refused(f"damaged DICOM: it cannot be read ({type(error).__name__})") from None


def _decoded(data: bytes) -> Image:
    dataset = _parsed(data)
    _check(dataset)
    stored = _stored_pixels(dataset)
    pixels = rendered(stored, dataset) if stored.ndim == 2 else to_gray(stored[..., ::-1])
    return Image(pixels, spacing_mm(dataset), view(dataset))


def _parsed(data: bytes) -> Dataset:
    if uid.DeflatedExplicitVRLittleEndian.encode() in data[:1024]:
        raise Refused("unsupported DICOM: deflated; convert it to another transfer syntax")
    dataset = dcmread(BytesIO(data), force=True)
    if "PixelData" not in dataset:
        if any(tag in data for tag in _PIXEL_TAGS):
            raise Refused("truncated DICOM: it ends inside its pixel data")
        raise Refused(f"DICOM without pixel data: truncated, or no image ({kind(dataset)})")
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _check(dataset: Dataset) -> None:
    rows, columns = number(dataset, "Rows"), number(dataset, "Columns")
    if rows is None or columns is None:
        raise Refused("damaged DICOM: Rows or Columns are missing")
    check_size(int(rows), int(columns))
    frames = number(dataset, "NumberOfFrames") or 1
    if frames > 1:
        raise Refused(f"multi-frame image: a DICOM of {frames:.0f} frames")
    photometric = value(dataset, "PhotometricInterpretation")
    samples, bits = number(dataset, "SamplesPerPixel") or 1, number(dataset, "BitsAllocated")
    gray = samples == 1 and photometric in ("MONOCHROME1", "MONOCHROME2") and bits in (8, 16)
    colour = samples == 3 and str(photometric).startswith(("RGB", "YBR")) and bits == 8
    if not (gray or colour):
        raise Refused("unsupported DICOM pixels: wanted MONOCHROME1 or MONOCHROME2 of 8 or 16 bits allocated")
    allocated, stored, high = _bits(dataset)
    if not 0 < stored <= high + 1 <= allocated:
        raise Refused("damaged DICOM: Bits Stored and High Bit contradict Bits Allocated")


def _bits(dataset: Dataset) -> tuple[int, int, int]:
    """Bits Allocated, Bits Stored and High Bit; what is absent takes the whole of what is allocated."""
    allocated = int(dataset.BitsAllocated)
    stored = int(number(dataset, "BitsStored") or allocated)
    return allocated, stored, int(number(dataset, "HighBit") or stored - 1)


def _stored_pixels(dataset: Dataset) -> np.ndarray:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        get_decoder(syntax)
    except NotImplementedError:
        raise Refused("unsupported DICOM: no decoder for its transfer syntax; convert it") from None
    if syntax.is_encapsulated:
        _check_codestream(dataset)
    elif len(dataset.PixelData) < dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8:
        raise Refused("truncated DICOM: fewer bytes of pixels than Rows x Columns need")
    pixels = dataset.pixel_array
    if pixels.shape[:2] != (dataset.Rows, dataset.Columns):
        raise Refused("damaged DICOM: Rows and Columns contradict its pixel data")
    return pixels if syntax.is_encapsulated or pixels.ndim == 3 else _stored_bits(pixels, dataset)


def _check_codestream(dataset: Dataset) -> None:
    """Refuse a torn codestream, or one of another size than Rows x Columns, before it is decoded."""
    coded = get_frame(dataset.PixelData, 0, number_of_frames=1)
    size = None
    if coded.startswith(JPEG_MAGIC):
        _, _, height, width, _ = jpeg_frame(coded)
        size = (height or dataset.Rows, width)
    elif (start := coded.find(_JPEG_2000_SIZE)) >= 0 and len(coded) > start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", coded, start + 8)
        size = (bottom - top, right - left)
        if JPEG_END not in coded[start:]:
            raise Refused("truncated DICOM pixels: JPEG 2000 without its end marker")
    if size is not None and size != (dataset.Rows, dataset.Columns):
        raise Refused("damaged DICOM: Rows and Columns contradict its pixel data")


def _stored_bits(pixels: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Uncompressed pixels without overlays and unset sign bits above the bits stored (PS3.5 8.1.1)."""
    allocated, stored, high = _bits(dataset)
    native = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return (native << (allocated - 1 - high)) >> (allocated - stored)
