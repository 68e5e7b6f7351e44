"""The header of a scored DICOM image: what exported objects take over from it, and what they refer to.

Exported objects go back to the PACS, so they carry the patient and the study of the original, unchanged. Nothing from
a header appears in logs, errors or file names, except for UIDs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from uuid import UUID, uuid5

from pydicom import DataElement, Dataset, uid
from pydicom.charset import python_encoding
from pydicom.config import RAISE
from pydicom.filereader import read_partial
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.valuerep import DA, TM, VR, validate_value

from cxr import storage
from cxr.errors import ImageRejectedError, UserError, raised_at
from cxr.imaging import dicom_terms
from cxr.imaging.dicom import rejecting_damaged_files
from cxr.imaging.dicom_header import is_dicom, read_header

_FIRST_BYTES, _MORE, _MOST_BYTES = 32 << 10, 8, 16 << 20  # as `sources.header_scan` reads headers
_FIRST_PIXEL_TAG = 0x7FE00001
_NAMESPACE = UUID("6f0c1f0e-8d3c-5b7e-9b7e-6a1c5d0f3c11")  # of UIDs that this package derives
UTF8 = "ISO_IR 192"  # Specific Character Set

# Type 2 of the modules Patient and General Study (PS3.3 C.7.1.1, C.7.2.1): present in every object, perhaps empty.
_REQUIRED_TEXT = ("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName")
_COPIED = (
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence",
    "PatientBirthName",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "EthnicGroup",
    "PatientComments",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "IssuerOfAccessionNumberSequence",
    "StudyDescription",
    "ProcedureCodeSequence",
)
_LOSSY_METHODS = {  # PS3.3 C.7.6.1.1.5.1
    uid.JPEGBaseline8Bit: "ISO_10918_1",
    uid.JPEGExtended12Bit: "ISO_10918_1",
    uid.JPEGLSNearLossless: "ISO_14495_1",
    uid.JPEG2000: "ISO_15444_1",
    uid.HTJ2K: "ISO_15444_15",
}


@dataclass(frozen=True)
class SourceImage:
    """A scored image in the PACS.

    `reference` has the attributes of the original that objects derived from it take over, with the attributes that
    the standard requires, empty where the original lacks them; no pixels.
    """

    reference: Dataset
    character_set: Any  # Specific Character Set of the original's texts; None: the default

    @property
    def study_uid(self) -> str:
        return str(self.reference.StudyInstanceUID)

    @property
    def series_uid(self) -> str:
        return str(self.reference.SeriesInstanceUID)

    @property
    def sop_uid(self) -> str:
        return str(self.reference.SOPInstanceUID)

    @property
    def height(self) -> int:
        return int(self.reference.Rows)

    @property
    def width(self) -> int:
        return int(self.reference.Columns)

    @property
    def spacing_mm(self) -> tuple[float, float] | None:
        """Between rows, between columns; None if unknown."""
        spacing = self.reference.get("PixelSpacing")
        return (float(spacing[0]), float(spacing[1])) if spacing else None


def derived_uid(*parts: str) -> str:
    """A UID of the root 2.25 (PS3.5 B.2) that is always the same for these texts."""
    return f"2.25.{uuid5(_NAMESPACE, chr(0).join(parts)).int}"


def read_source(uri: str) -> SourceImage:
    """Read the header of a DICOM file, from its first bytes.

    Raises:
        ImageRejectedError: the file is not DICOM, damaged, or lacks the UIDs by which objects refer to it.
        StorageError: storage failed in a way that concerns more than this file.
    """
    if not uri:
        raise ImageRejectedError("the scores, or the crosswalk, do not say where the file is")
    size, data, total, header = _FIRST_BYTES, b"", 0, None
    try:
        while header is None:
            data, total = storage.read_start(uri, size)
            if not is_dicom(data):
                raise ImageRejectedError("not a DICOM file: only images that were scored from DICOM can be exported")
            header = read_header(data, complete=len(data) >= total or size >= _MOST_BYTES)
            size *= _MORE
        if header.transfer_syntax == uid.DeflatedExplicitVRLittleEndian:
            data = storage.read_bytes(uri)
    except (storage.NotFoundError, storage.UnreadableError) as error:
        raise ImageRejectedError(f"file not readable: {type(error).__name__}") from None
    with rejecting_damaged_files():
        return _source(read_partial(BytesIO(data), _at_pixels, force=True), header.spacing_mm, total)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep values of a header out of the logs, warnings and errors of the libraries that write DICOM.

    Raises:
        ImageRejectedError: they raised any other exception, whose text may quote a header.
    """
    logger, level = logging.getLogger("highdicom"), logging.getLogger("highdicom").level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ImageRejectedError, UserError, MemoryError):
        raise
    except Exception as error:
        raise ImageRejectedError(f"cannot be written as DICOM: {type(error).__name__}{raised_at(error)}") from None
    finally:
        logger.setLevel(level)


def _at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
    return int(tag) >= _FIRST_PIXEL_TAG


def _source(header: Dataset, spacing_mm: tuple[float, float] | None, file_bytes: int) -> SourceImage:
    reference = Dataset()
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
        value = dicom_terms.uid(str(header.get(keyword, "")))
        if value is None:
            raise ImageRejectedError(f"no valid {keyword} in the header, by which other objects could refer to it")
        setattr(reference, keyword, value)
    if not header.get("Rows") or not header.get("Columns"):
        raise ImageRejectedError("no Rows or Columns in the header")
    reference.Rows, reference.Columns = int(header.Rows), int(header.Columns)
    if isinstance(header.get("PatientID"), MultiValue):
        raise ImageRejectedError("PatientID in the header has several values, so it does not identify the patient")
    for keyword in _REQUIRED_TEXT:
        setattr(reference, keyword, _text(header.get(keyword)))
    reference.PatientSex = dicom_terms.sex(_text(header.get("PatientSex"))) or ""
    for keyword in ("PatientBirthDate", "StudyDate"):
        setattr(reference, keyword, _valid(DA, header.get(keyword)))
    reference.StudyTime = _valid(TM, header.get("StudyTime"))
    for keyword in _COPIED:
        if header.get(keyword) and _is_valid(header[keyword]):
            reference[keyword] = deepcopy(header[keyword])
    for _ in reference.iterall():  # reads the texts in sequences, too; unread ones would be written as their bytes
        pass
    reference.Modality = str(header.get("Modality") or "OT")
    number = str(header.get("InstanceNumber") or "")
    reference.InstanceNumber = int(number) if number.isdecimal() and 0 < int(number) < 2**31 else 1
    orientation = [side.strip() for side in _text(header.get("PatientOrientation")).split("\\")]
    reference.PatientOrientation = orientation if len(orientation) == 2 else None
    if frame_of_reference := dicom_terms.uid(str(header.get("FrameOfReferenceUID", ""))):
        reference.FrameOfReferenceUID = frame_of_reference
    if spacing_mm:
        reference.PixelSpacing = [*spacing_mm]
    _add_lossy_compression(reference, header, file_bytes)
    encodings = header.get("SpecificCharacterSet")
    listed = [encodings] if isinstance(encodings, str) else list(encodings or ())
    return SourceImage(reference, encodings if all(name in python_encoding for name in listed) else UTF8)


def _add_lossy_compression(reference: Dataset, header: Dataset, file_bytes: int) -> None:
    """Derived images are lossy if their source is (PS3.3 C.7.6.1.1.5); ratio and method are then required."""
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    if header.get("LossyImageCompression") != "01" and syntax not in _LOSSY_METHODS:
        reference.LossyImageCompression = "00"
        return
    stored = reference.Rows * reference.Columns * int(header.get("BitsAllocated") or 8) / 8
    ratio = header.get("LossyImageCompressionRatio") or round(max(stored / max(file_bytes, 1), 1.0), 2)
    method = header.get("LossyImageCompressionMethod") or _LOSSY_METHODS.get(syntax)  # pyright: ignore[reportArgumentType]
    reference.LossyImageCompression = "01"
    reference.LossyImageCompressionRatio = ratio
    if method:
        reference.LossyImageCompressionMethod = method


def _text(value: object) -> str:
    """A value as text; several values as in a file, separated by backslashes."""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")


def _is_valid(element: DataElement) -> bool:
    """Whether a value conforms to its value representation. Others are left out, since they are optional."""
    if element.VR == VR.SQ:
        return True
    try:
        validate_value(element.VR, str(element.value), RAISE)
    except ValueError:
        return False
    return True


def _valid(kind: type[DA] | type[TM], value: object) -> str:
    """A date or time as stored; "" if it is not valid."""
    text = str(value or "").strip()
    try:
        kind(text)
    except ValueError:
        return ""
    return text
