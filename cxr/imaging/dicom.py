"""DICOM files (PS3.10) to X-rays. No tag's value is ever logged or put into an error."""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import count

from pydicom import Dataset, uid
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag

from cxr.errors import ImageRejectedError
from cxr.imaging import dicom_tags
from cxr.imaging.dicom_display import rendered
from cxr.imaging.dicom_pixels import PixelData, read_pixel_data
from cxr.imaging.dicom_signature import LONG_VR, MAGIC, PREAMBLE_BYTES, has_preamble
from cxr.imaging.image import MAX_FILE_BYTES, EncodedImage, Image, to_gray

_NEEDED = (  # nothing else is read
    "SOPClassUID",
    "Modality",
    "BodyPartExamined",
    "ViewPosition",
    "ViewCodeSequence",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
    "PresentationLUTShape",
    "PixelData",
)
_MOST_ELEMENTS = 10_000  # X-rays have a few hundred; a file of nothing else takes long to read
_PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
_LIBRARIES = r"(pydicom|PIL|jpeg_ls|libjpeg|openjpeg|pylibjpeg)\b"


def inspect_dicom(data: bytes) -> EncodedImage:
    """Parse a single-frame DICOM, uncompressed, deflated, RLE, JPEG, JPEG lossless, JPEG-LS or JPEG 2000.

    Decoding applies its display pipeline (`dicom_display.rendered`).

    Raises:
        Refused: no X-ray can be had from it; decoding raises it too.
        MemoryError: there is too little memory at the moment; likewise.
    """
    with _damage_is_refused():
        dataset = _parsed(data)
        pixel_data = read_pixel_data(dataset)
    return EncodedImage(pixel_data.memory_bytes, partial(_decoded, dataset, pixel_data))


def _decoded(dataset: Dataset, pixel_data: PixelData) -> Image:
    with _damage_is_refused():
        samples = pixel_data.decode()
        gray = samples.ndim == 2
        return Image(
            pixels=rendered(samples, pixel_data.bits, dataset) if gray else to_gray(samples[..., ::-1]),
            spacing_mm=dicom_tags.spacing_mm(dataset),
            view=dicom_tags.view(dataset),
            body_part=dicom_tags.body_part(dataset),
            modality=dicom_tags.modality(dataset),
        )


@contextmanager
def _damage_is_refused() -> Iterator[None]:
    """Turn any exception that a damaged file provokes into a refusal, and keep values out of warnings and logs."""
    if not any(getattr(module, "pattern", None) == _LIBRARIES for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_LIBRARIES)  # for good: threads share the filters
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    try:
        yield
    except (ImageRejectedError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any kind (a Rust panic is no Exception); texts may quote tags
        raise ImageRejectedError(f"damaged DICOM: it cannot be read ({type(error).__name__})") from None


def _parsed(data: bytes) -> Dataset:
    elements = count()

    def too_many(tag: BaseTag, vr: str | None, length: int) -> bool:
        if next(elements) > _MOST_ELEMENTS:
            raise ImageRejectedError(f"damaged DICOM: expected at most {_MOST_ELEMENTS:,} elements, got more")
        return False

    dataset = read_partial(BytesIO(_inflated(data)), too_many, force=True, specific_tags=[*map(Tag, _NEEDED)])
    if "PixelData" not in dataset:
        if any(tag in data for tag in _PIXEL_TAGS):
            raise ImageRejectedError("truncated DICOM: it ends inside its pixel data")
        raise ImageRejectedError(f"DICOM without pixel data: truncated, or no image ({dicom_tags.kind(dataset)})")
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _inflated(data: bytes) -> bytes:
    """The data set alone where the file is deflated (PS3.5 A.5), else the file as it is.

    pydicom would inflate it without a limit.
    """
    syntax, start = _transfer_syntax(data)
    if syntax != uid.DeflatedExplicitVRLittleEndian:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(memoryview(data)[start:], MAX_FILE_BYTES + 1)
    except zlib.error:
        raise ImageRejectedError("damaged DICOM: its deflated data set cannot be inflated") from None
    if len(inflated) > MAX_FILE_BYTES:
        most = f"{MAX_FILE_BYTES >> 20} MiB"
        raise ImageRejectedError(f"decompression bomb: expected at most {most} in a deflated DICOM, got more")
    if not inflater.eof:
        raise ImageRejectedError("truncated DICOM: it ends inside its deflated data set")
    return inflated


def _transfer_syntax(data: bytes) -> tuple[str | None, int]:
    """The transfer syntax that the file meta information (PS3.10 7.1) names, and where the data set begins."""
    position, syntax = PREAMBLE_BYTES + len(MAGIC) if has_preamble(data) else 0, None
    while data.startswith(b"\2\0", position) and position + 12 <= len(data):
        if data[position + 4 : position + 6] in LONG_VR:
            header, length = 12, struct.unpack_from("<I", data, position + 8)[0]
        else:
            header, length = 8, struct.unpack_from("<H", data, position + 6)[0]
        if data.startswith(b"\x10\0", position + 2):
            syntax = data[position + header : position + header + length].strip(b" \0").decode("ascii", "replace")
        position += header + length
    return syntax, position
