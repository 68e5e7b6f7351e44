"""Reading of DICOM tags that may be absent, many, or nonsense."""

from __future__ import annotations

import math
import re
from typing import Any

from pydicom import Dataset
from pydicom.uid import UID

_VIEW = re.compile(r"[A-Z]{1,4}")


def value(dataset: Dataset, keyword: str) -> Any:
    """The tag's value; None where it is absent or cannot be read."""
    try:
        return dataset.get(keyword)
    except Exception:  # pydicom converts on access, and raises many kinds
        return None


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The tag's values, one or many, as finite numbers; empty where it has others or none."""
    given = value(dataset, keyword)
    try:
        values = [float(v) for v in (given if hasattr(given, "__iter__") else [given])]
    except (TypeError, ValueError):
        return []
    return values if all(map(math.isfinite, values)) else []


def number(dataset: Dataset, keyword: str) -> float | None:
    """The tag's first number, None where it has none."""
    return next(iter(numbers(dataset, keyword)), None)


def spacing_mm(dataset: Dataset) -> tuple[float, float] | None:
    """Pixel Spacing, else Imager Pixel Spacing (PS3.3 10.7.1.3): (between rows, between columns)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = numbers(dataset, keyword)
        if len(spacing) == 2 and min(spacing) > 0:
            return spacing[0], spacing[1]
    return None


def view(dataset: Dataset) -> str | None:
    """View Position where it is one of the standard's short codes; free text might name a patient."""
    code = str(value(dataset, "ViewPosition") or "").strip().upper()
    return code if _VIEW.fullmatch(code) else None


def kind(dataset: Dataset) -> str:
    """The name of the dataset's SOP class where the standard has one (PS3.6)."""
    sop_class = UID(str(value(dataset, "SOPClassUID") or ""))
    return sop_class.name if sop_class.name != str(sop_class) else "unknown SOP class"
