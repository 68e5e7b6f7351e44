"""Read DICOM tags that may be absent, multi-valued or invalid."""

from __future__ import annotations

import math
import struct
from typing import Any

from pydicom import Dataset
from pydicom.uid import UID

from cxr.imaging import dicom_terms


def value(dataset: Dataset, keyword: str) -> Any:
    """The tag's value; None if it is absent or unreadable."""
    try:
        return dataset.get(keyword)
    except MemoryError:
        raise
    except Exception:  # pydicom converts on access and raises many kinds
        return None


def code(dataset: Dataset, keyword: str) -> str:
    """The tag's first code string, trimmed and in capitals as the standard requires; "" if there is none."""
    content = value(dataset, keyword)
    if not isinstance(content, str) and hasattr(content, "__iter__"):
        content = next(iter(content), None)
    return str(content or "").strip(" \0").upper()


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The tag's values as floats, non-finite ones as NaN; empty if they are not numbers."""
    content = value(dataset, keyword)
    if isinstance(content, (bytes, str)):  # unknown VR
        return []
    try:
        values = [float(v) for v in (content if hasattr(content, "__iter__") else [content])]
    except (TypeError, ValueError, OverflowError):
        return []
    return [v if math.isfinite(v) else math.nan for v in values]


def number(dataset: Dataset, keyword: str) -> float | None:
    """The tag's first number; None if there is none."""
    first = next(iter(numbers(dataset, keyword)), math.nan)
    return None if math.isnan(first) else first


def words(dataset: Dataset, keyword: str) -> list[int]:
    """The tag's values as unsigned 16-bit numbers, whether its VR is US, SS or neither; empty if there are none."""
    content = value(dataset, keyword)
    if isinstance(content, bytes) and len(content) % 2 == 0:
        order = "<" if dataset.original_encoding[1] is not False else ">"
        return list(struct.unpack(f"{order}{len(content) // 2}H", content))
    values = numbers(dataset, keyword)
    return [] if any(map(math.isnan, values)) else [int(v) & 0xFFFF for v in values]


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; empty if the tag is absent."""
    content = value(dataset, keyword)
    return [item for item in content if isinstance(item, Dataset)] if hasattr(content, "__iter__") else []


def spacing_mm(dataset: Dataset) -> tuple[float, float] | None:
    """Pixel Spacing, else Imager Pixel Spacing (PS3.3 10.7.1.3): mm (between rows, between columns)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = numbers(dataset, keyword)
        if len(spacing) == 2 and spacing[0] > 0 and spacing[1] > 0:
            return spacing[0], spacing[1]
    return None


def view(dataset: Dataset) -> str | None:
    """View Position, else View Code Sequence, as a code of `dicom_terms.VIEWS`."""
    coded = (dicom_terms.coded_view(code(item, "CodeValue")) for item in items(dataset, "ViewCodeSequence"))
    return dicom_terms.view(code(dataset, "ViewPosition")) or next(filter(None, coded), None)


def body_part(dataset: Dataset) -> str | None:
    """Body Part Examined as a code of `dicom_terms.BODY_PARTS`."""
    return dicom_terms.body_part(code(dataset, "BodyPartExamined"))


def modality(dataset: Dataset) -> str | None:
    """Modality as a code of `dicom_terms.MODALITIES`."""
    return dicom_terms.modality(code(dataset, "Modality"))


def uid(dataset: Dataset, keyword: str) -> str | None:
    """A UID; None if it is absent or invalid."""
    return dicom_terms.uid(code(dataset, keyword))


def sex(dataset: Dataset) -> str | None:
    """Patient's Sex: F, M or O (other)."""
    return dicom_terms.sex(code(dataset, "PatientSex"))


def age_years(dataset: Dataset) -> float | None:
    """Patient's Age, else the time from the birth date to the study date."""
    return dicom_terms.age_years(*(code(dataset, name) for name in ("PatientAge", "PatientBirthDate", "StudyDate")))


def kind(dataset: Dataset) -> str:
    """The name of the data set's SOP class, if it is in the standard (PS3.6)."""
    sop_class = UID(str(value(dataset, "SOPClassUID") or ""))
    return sop_class.name if sop_class.name != str(sop_class) else "unknown SOP class"
