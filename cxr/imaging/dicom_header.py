"""Read the header of a DICOM file, everything before its pixels, from its first bytes (PS3.10)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from typing import Any

from pydicom import DataElement, Dataset, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.filereader import data_element_generator, read_partial
from pydicom.tag import BaseTag

from cxr.errors import ImageRejectedError
from cxr.imaging import dicom_tags, dicom_terms
from cxr.imaging.dicom import MAX_ELEMENTS, rejecting_damaged_files, transfer_syntax
from cxr.imaging.dicom_signature import begins_like_data_set, has_preamble

_FIRST_PIXEL_TAG = 0x7FE00001  # Extended Offset Table, pixel data of any type (PS3.6), and all that follows
_MAX_INFLATED_BYTES = 16 << 20  # of a deflated data set
_TEXT_CHARS = 64  # of a manufacturer or model (PS3.5, LO)
_TAGS = {
    keyword: tag_for_keyword(keyword)
    for keyword in (
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyDate",
        "AccessionNumber",
        "Modality",
        "Manufacturer",
        "ManufacturerModelName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "PatientAge",
        "BodyPartExamined",
        "ViewPosition",
        "ImagerPixelSpacing",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Laterality",
        "ImageLaterality",
        "PhotometricInterpretation",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "PixelSpacing",
        "ViewCodeSequence",
    )
}
_REQUESTED: list[BaseTag | int] = [tag for tag in _TAGS.values() if tag is not None]

Elements = dict[int, RawDataElement | DataElement]


@dataclass(frozen=True)
class DicomHeader:
    """The attributes of a header; None if absent or invalid. They identify the patient."""

    sop_class: str | None
    sop_instance: str | None
    study: str | None
    series: str | None
    patient_id: bytes | None  # as stored, trimmed
    accession_number: bytes | None
    sex: str | None
    age_years: float | None
    study_date: str | None  # YYYY-MM-DD
    modality: str | None  # a code of dicom_terms.MODALITIES
    body_part: str | None  # a code of dicom_terms.BODY_PARTS
    view: str | None  # a code of dicom_terms.VIEWS
    laterality: str | None  # "L", "R", "B" (both) or "U" (unpaired)
    manufacturer: str | None
    model: str | None
    rows: int | None
    columns: int | None
    frames: int | None
    spacing_mm: tuple[float, float] | None  # between rows, between columns
    photometric: str | None
    transfer_syntax: str | None


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a DICOM file."""
    return has_preamble(head) or begins_like_data_set(head)


def read_header(data: bytes, *, complete: bool) -> DicomHeader | None:
    """The header of a DICOM file; None if it continues after `data`.

    Args:
        data: the first bytes of the file.
        complete: these are all bytes of the file.

    Raises:
        ImageRejectedError: the header is damaged.
    """
    elements, ended = Elements(), False
    with rejecting_damaged_files():
        syntax, start = transfer_syntax(data)
        numbers = count()

        def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
            nonlocal ended
            if next(numbers) > MAX_ELEMENTS:
                raise ImageRejectedError(f"damaged DICOM: expected at most {MAX_ELEMENTS:,} elements, got more")
            ended = int(tag) >= _FIRST_PIXEL_TAG
            return ended

        try:
            for element in _elements(data, start, syntax, at_pixels):
                elements[element.tag] = element
        except ImageRejectedError:
            raise
        except Exception:
            if complete:
                raise
        if not ended and not complete:
            return None
        if not elements:
            raise ImageRejectedError("damaged DICOM: the header has none of the expected attributes")
        return _described(elements, syntax)


def _elements(data: bytes, start: int, syntax: str | None, stop_when: Any) -> Iterator[RawDataElement | DataElement]:
    """The requested elements of the data set, up to the one at which `stop_when` returns True."""
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        data, start = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], _MAX_INFLATED_BYTES), 0
    if syntax is None:  # without file meta information, pydicom guesses the encoding
        dataset = read_partial(BytesIO(data), stop_when, force=True, specific_tags=_REQUESTED)
        tags = [tag for tag in _REQUESTED if tag in dataset]
        yield from (dataset.get_item(tag) for tag in tags)  # pyright: ignore[reportReturnType]
        return
    stream = BytesIO(data)
    stream.seek(start)
    implicit, little = syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian
    yield from data_element_generator(stream, implicit, little, stop_when, specific_tags=_REQUESTED)


def _described(elements: Elements, syntax: str | None) -> DicomHeader:
    texts = {keyword: _text(elements.get(tag)) for keyword, tag in _TAGS.items() if tag is not None}
    studied = dicom_terms.date(texts["StudyDate"])
    frames = (texts["NumberOfFrames"] or "").strip()
    return DicomHeader(
        sop_class=dicom_terms.uid(texts["SOPClassUID"]),
        sop_instance=dicom_terms.uid(texts["SOPInstanceUID"]),
        study=dicom_terms.uid(texts["StudyInstanceUID"]),
        series=dicom_terms.uid(texts["SeriesInstanceUID"]),
        patient_id=_bytes(elements, "PatientID"),
        accession_number=_bytes(elements, "AccessionNumber"),
        sex=dicom_terms.sex(texts["PatientSex"]),
        age_years=dicom_terms.age_years(texts["PatientAge"], texts["PatientBirthDate"], texts["StudyDate"]),
        study_date=studied.isoformat() if studied else None,
        modality=dicom_terms.modality(texts["Modality"]),
        body_part=dicom_terms.body_part(texts["BodyPartExamined"]),
        view=dicom_terms.view(texts["ViewPosition"]) or _coded_view(elements),
        laterality=dicom_terms.laterality(texts["ImageLaterality"] or texts["Laterality"]),
        manufacturer=(texts["Manufacturer"] or "")[:_TEXT_CHARS] or None,
        model=(texts["ManufacturerModelName"] or "")[:_TEXT_CHARS] or None,
        rows=_word(elements, "Rows"),
        columns=_word(elements, "Columns"),
        frames=int(frames) if frames.isdecimal() and len(frames) < 8 else None,
        spacing_mm=_spacing(texts["PixelSpacing"]) or _spacing(texts["ImagerPixelSpacing"]),
        photometric=dicom_terms.photometric(texts["PhotometricInterpretation"]),
        transfer_syntax=dicom_terms.uid(syntax),
    )


def _text(element: RawDataElement | DataElement | None) -> str | None:
    """The value of an element that contains text, trimmed. Codes, dates and numbers are ASCII (PS3.5 6.2)."""
    raw = None if element is None else element.value
    if isinstance(raw, bytes):
        return raw.decode("latin-1").strip(" \0") or None
    return raw.strip(" \0") or None if isinstance(raw, str) else None


def _bytes(elements: Elements, keyword: str) -> bytes | None:
    element = elements.get(_TAGS[keyword] or 0)
    raw = None if element is None else element.value
    raw = raw.encode() if isinstance(raw, str) else raw
    return raw.strip(b" \0\t") or None if isinstance(raw, bytes) else None


def _word(elements: Elements, keyword: str) -> int | None:
    element = elements.get(_TAGS[keyword] or 0)
    if not isinstance(element, RawDataElement) or not element.value or len(element.value) != 2:
        return None
    return struct.unpack("<H" if element.is_little_endian else ">H", element.value)[0]


def _spacing(text: str | None) -> tuple[float, float] | None:
    try:
        rows_mm, columns_mm = map(float, (text or "").split("\\"))
    except ValueError:
        return None
    return (rows_mm, columns_mm) if 0 < rows_mm < 100 and 0 < columns_mm < 100 else None


def _coded_view(elements: Elements) -> str | None:
    tag = _TAGS["ViewCodeSequence"]
    if tag not in elements:
        return None
    dataset = Dataset({tag: elements[tag]})  # pyright: ignore[reportArgumentType]
    return dicom_tags.view(dataset)
