"""How an archive is read, and where its labels come from. This module imports no source, so that all can use it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from cxr import storage
from cxr.errors import UserError
from cxr.sources import selection

ReaderBoxes = Literal["wbf", "majority", "union"]
_URIS = {"boxes"}  # fields of Labeling that are URIs


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read an archive, and which of its images."""

    source: str = "auto"
    """Layout of the archive: the name of a source, or auto to detect it."""
    select: str = ""
    """Expression that says which images to use, such as 'view in PA,AP and age_years >= 18'. It may contain ==, !=,
    <, <=, >, >=, in, not in, and, or, not, parentheses, and the columns image_id, patient_id, study_id, series_id,
    split, sex, age_years, view, body_part and modality. An unknown value matches only the word unknown, as in
    'view in PA,unknown'. Default: all images."""

    def __post_init__(self) -> None:
        if self.select:
            selection.parse(self.select)

    def describe(self) -> dict[str, Any]:
        """The settings that decide which images are read and differ from their defaults."""
        return {"select": self.select} if self.select else {}

    def check_raw(self, archive: str) -> None:
        """Raise UserError if images are selected; call this for shards, whose images have been selected already."""
        if self.select:
            raise UserError(
                f"{archive} contains shards, whose images cannot be selected: omit --select, or give it to "
                f"jobs/ingest_archive.py when you make the shards"
            )


ALL_IMAGES = ReadOptions()
"""Every image of an archive whose layout is detected."""


@dataclass(frozen=True, kw_only=True)
class Labeling:
    """Where an archive's labels and boxes come from, if not from its source, and how readers are combined."""

    boxes: str = ""
    """URI of a file with boxes: COCO JSON, or CSV with the columns of VinBigData or of the RSNA Pneumonia Detection
    Challenge. Its labels and boxes replace those of the archive, and images that it does not list are skipped. Empty:
    use the archive's own labels and boxes."""
    readers_agree: int = 1
    """Number of readers who must have marked a finding for its label to be positive."""
    reader_boxes: ReaderBoxes = "wbf"
    """How to combine the boxes of several readers of an image. wbf: fuse overlapping boxes of a finding by weighted
    boxes fusion. majority: the same, but keep only boxes that more than half of the readers drew. union: keep all
    boxes unchanged."""

    def __post_init__(self) -> None:
        if self.readers_agree < 1:
            raise UserError(f"expected readers_agree of at least 1, got {self.readers_agree}: correct it")

    def __bool__(self) -> bool:
        """Whether any setting differs from its default."""
        return bool(self.describe())

    def describe(self) -> dict[str, Any]:
        """The settings that differ from their defaults, with normalized URIs."""
        changed = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: value for name, value in changed.items() if value != getattr(SOURCE_LABELS, name)}
        return {name: storage.normalize(value) if name in _URIS else value for name, value in changed.items()}

    def options(self) -> str:
        """The command-line options of `describe`, without their values."""
        return ", ".join("--" + name.replace("_", "-") for name in self.describe())

    def check_raw(self, archive: str) -> None:
        """Raise UserError if any setting differs from its default; call this for shards, which have fixed labels."""
        if self:
            raise UserError(
                f"{archive} contains shards, whose labels cannot be changed: omit {self.options()}, or give the "
                f"original archive"
            )


SOURCE_LABELS = Labeling()
"""The labels and boxes of an archive's source."""
