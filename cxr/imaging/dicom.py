"""Read X-rays from DICOM files (PS3.10). Tag values never appear in logs or errors."""

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

import numpy as np
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag

from cxr.errors import ImageRejectedError
from cxr.imaging import dicom_tags
from cxr.imaging.dicom_display import apply_display_pipeline, is_windowed, window_shows
from cxr.imaging.dicom_pixels import PixelData, read_pixel_data
from cxr.imaging.dicom_signature import LONG_VR, MAGIC, PREAMBLE_BYTES, has_preamble
from cxr.imaging.image import MAX_FILE_BYTES, EncodedImage, Image, to_gray

_REQUESTED = (  # no other tags are read
    "SOPClassUID",
    "StudyDate",
    "Modality",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "BodyPartExamined",
    "ViewPosition",
    "ViewCodeSequence",
    "StudyInstanceUID",
    "SeriesInstanceUID",
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
MAX_ELEMENTS = 10_000  # X-rays have a few hundred; many more take long to parse
_LOGGER = logging.getLogger("pydicom")
_PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
_LIBRARIES = r"(pydicom|PIL|imagecodecs)\b"


def inspect_dicom(data: bytes) -> EncodedImage:
    """Parse a single-frame DICOM file: uncompressed, deflated, RLE, JPEG, JPEG lossless, JPEG-LS, JPEG 2000, HTJ2K.

    Decoding applies its display pipeline (`dicom_display.apply_display_pipeline`).

    Raises:
        ImageRejectedError: the file does not contain a usable X-ray; decoding may raise it too.
        MemoryError: there is not enough memory at the moment; decoding may raise it too.
    """
    with rejecting_damaged_files():
        dataset = _parse(data)
        pixel_data = read_pixel_data(dataset)
        max_halvings = pixel_data.max_halvings if is_windowed(dataset) else 0
    return EncodedImage(
        height=pixel_data.height,
        width=pixel_data.width,
        memory_bytes=pixel_data.memory_bytes,
        decode=partial(_decode, dataset, pixel_data),
        max_halvings=max_halvings,
        decode_reduced=partial(_decode_reduced, dataset, pixel_data),
        first_center=lambda halvings: 0.5,  # low-pass samples lie at even samples (ISO/IEC 15444-1 F.3)
    )


def encode_dataset(dataset: Dataset) -> bytes:
    """A DICOM file with those elements of a data set in memory that decoding reads, so that it is decoded like any
    other file.

    Raises:
        ImageRejectedError: it cannot be written as a file.
    """
    with rejecting_damaged_files():
        reduced = Dataset()
        for tag in map(Tag, _REQUESTED):
            if tag in dataset:
                reduced[tag] = dataset.get_item(tag)
        implicit, little = dataset.original_encoding
        syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
        reduced.file_meta = FileMetaDataset()
        reduced.file_meta.TransferSyntaxUID = syntax or _plain_syntax(implicit, little)
        reduced.preamble = bytes(PREAMBLE_BYTES)
        reduced.set_original_encoding(implicit, little)
        file = BytesIO()
        dcmwrite(file, reduced, enforce_file_format=False)
        return file.getvalue()


def _plain_syntax(implicit: bool | None, little: bool | None) -> uid.UID:
    """The transfer syntax of uncompressed pixels, by whether VRs are implicit, and bytes in little-endian order."""
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRBigEndian if little is False else uid.ExplicitVRLittleEndian


def _decode(dataset: Dataset, pixel_data: PixelData) -> Image:
    with rejecting_damaged_files():
        return _image(dataset, pixel_data, pixel_data.decode())


def _decode_reduced(dataset: Dataset, pixel_data: PixelData, halvings: int) -> Image | None:
    with rejecting_damaged_files():
        samples = pixel_data.decode_reduced(halvings)
        if samples is None or not window_shows(samples, pixel_data.bits, dataset):
            return None
        return _image(dataset, pixel_data, samples)


def _image(dataset: Dataset, pixel_data: PixelData, samples: np.ndarray) -> Image:
    gray = samples.ndim == 2
    return Image(
        pixels=apply_display_pipeline(samples, pixel_data.bits, dataset) if gray else to_gray(samples[..., ::-1]),
        spacing_mm=dicom_tags.spacing_mm(dataset),
        view=dicom_tags.view(dataset),
        body_part=dicom_tags.body_part(dataset),
        modality=dicom_tags.modality(dataset),
        study_id=dicom_tags.uid(dataset, "StudyInstanceUID"),
        series_id=dicom_tags.uid(dataset, "SeriesInstanceUID"),
        sex=dicom_tags.sex(dataset),
        age_years=dicom_tags.age_years(dataset),
    )


@contextmanager
def rejecting_damaged_files() -> Iterator[None]:
    """Turn any exception caused by a damaged file into ImageRejectedError; keep tag values out of warnings and
    logs."""
    if not any(getattr(module, "pattern", None) == _LIBRARIES for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_LIBRARIES)  # permanently, because threads share the filters
    if _LOGGER.level != logging.CRITICAL:  # setting it empties the cache of all loggers
        _LOGGER.setLevel(logging.CRITICAL)
    try:
        yield
    except (ImageRejectedError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # any kind (a Rust panic is not an Exception); its text may quote tags
        raise ImageRejectedError(f"damaged DICOM: the file cannot be read ({type(error).__name__})") from None


def _parse(data: bytes) -> Dataset:
    elements = count()

    def too_many(tag: BaseTag, vr: str | None, length: int) -> bool:
        if next(elements) > MAX_ELEMENTS:
            raise ImageRejectedError(f"damaged DICOM: expected at most {MAX_ELEMENTS:,} elements, got more")
        return False

    dataset = read_partial(BytesIO(_inflate(data)), too_many, force=True, specific_tags=[*map(Tag, _REQUESTED)])
    if "PixelData" not in dataset:
        if any(tag in data for tag in _PIXEL_TAGS):
            raise ImageRejectedError("truncated DICOM: the file ends inside the pixel data")
        raise ImageRejectedError(f"DICOM without pixel data: truncated or not an image ({dicom_tags.kind(dataset)})")
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = _plain_syntax(implicit, little)
    return dataset


def _inflate(data: bytes) -> bytes:
    """The inflated data set of a deflated file (PS3.5 A.5), else the file unchanged.

    pydicom would inflate it without a size limit.
    """
    syntax, start = transfer_syntax(data)
    if syntax != uid.DeflatedExplicitVRLittleEndian:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(memoryview(data)[start:], MAX_FILE_BYTES + 1)
    except zlib.error:
        raise ImageRejectedError("damaged DICOM: the deflated data set cannot be inflated") from None
    if len(inflated) > MAX_FILE_BYTES:
        limit = f"{MAX_FILE_BYTES >> 20} MiB"
        raise ImageRejectedError(f"decompression bomb: expected at most {limit} in a deflated DICOM, got more")
    if not inflater.eof:
        raise ImageRejectedError("truncated DICOM: the file ends inside the deflated data set")
    return inflated


def transfer_syntax(data: bytes) -> tuple[str | None, int]:
    """The transfer syntax in the file meta information (PS3.10 7.1), and the offset of the data set."""
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
