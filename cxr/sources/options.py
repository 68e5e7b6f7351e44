"""How an archive is read, and where its labels come from. This module imports no source, so that all can use it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import tyro

from cxr import storage
from cxr.errors import UserError
from cxr.sources import selection

GateMode = Literal["off", "warn", "exclude"]
ReaderBoxes = Literal["wbf", "majority", "union"]
MaskCode = Literal["auto", "relative", "absolute", "absolute-rows"]
LabelPolicy = Literal["unknown", "negative", "positive"]
_URIS = {"labels", "label_mapping", "boxes", "masks"}  # fields of Labeling that are URIs
_OF_LABELS = (  # fields of Labeling that have a meaning only with a table of labels
    "image_column",
    "patient_column",
    "split_column",
    "view_column",
    "label_columns",
    "value_column",
    "blank_as",
)
NO_COLUMN = "none"  # in place of a column of the table of labels: do not use one
HEADERS = "headers"  # folder in OUT


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read an archive, and which of its images."""

    source: str = "auto"
    """Layout of the archive: the name of a source, or auto to detect it."""
    select: str = ""
    """Expression that selects the images to use, such as 'view in PA,AP and age_years >= 18'. It may contain ==, !=,
    <, <=, >, >=, in, not in, and, or, not, parentheses, and the columns image_id, patient_id, study_id, series_id,
    split, sex, age_years, view, body_part and modality. An unknown value matches only the word unknown, as in
    'view in PA,unknown'. Default: all images."""

    gate: GateMode = "warn"
    """Whether to check that each image is an upright frontal chest X-ray that is not inverted. warn: report the
    others in the columns gate and gate_score, and count them. exclude: also reject them. off: do not check."""
    headers: str = ""
    """Folder or URI in which headers of DICOM archives are stored, so that later runs need not read them again.
    Default: OUT/headers."""
    id_key: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """File or URI of the secret key for the pseudonyms of patients. Default: the value of CXR_ID_KEY, or else a
    random key in the folder of headers."""
    crosswalk: tyro.conf.Suppress[str] = ""
    """URI of the crosswalk by which the archive's ids are replaced once it has been read; see `data.identity`. Set by
    reports on runs with pseudonyms."""
    keep_ids: bool = False
    """Store PatientID and AccessionNumber of DICOM files as they are, instead of pseudonyms."""

    def with_headers(self, out: str) -> ReadOptions:
        """The same options; headers are stored in OUT/headers unless they say where."""
        return self if self.headers else replace(self, headers=storage.join(out, HEADERS))

    def __post_init__(self) -> None:
        if self.select:
            selection.parse(self.select)

    def describe(self) -> dict[str, Any]:
        """The settings that decide which images are read and differ from their defaults."""
        settings = {"select": self.select} if self.select else {}
        return settings | ({"gate": self.gate} if self.gate == "exclude" else {})

    def check_raw(self, archive: str) -> None:
        """Raise UserError if images are selected; call this for shards, whose images have been selected already."""
        if changed := self.describe():
            options = " and ".join(f"--{name}" for name in changed)
            raise UserError(
                f"{archive} contains shards, whose images cannot be selected: omit {options}, or use it with "
                f"cxr ingest when you create the shards"
            )


ALL_IMAGES = ReadOptions()
"""Every image of an archive whose layout is detected."""


@dataclass(frozen=True, kw_only=True)
class Labeling:
    """Where labels, boxes and masks come from, if not from the archive itself, and how readers are combined."""

    labels: str = ""
    """URI of a table of labels: CSV, TSV or Parquet, with a row for each image or for each image and finding. Its
    labels replace those of the archive, and images without a row are skipped. Empty: use the archive's own labels."""
    image_column: str = ""
    """Column of the label table with file names, paths or SOPInstanceUIDs. Empty: recognize it by its name."""
    patient_column: str = ""
    """Column of the label table with the patients. Empty: recognize it by its name; none: use the archive's
    patients."""
    split_column: str = ""
    """Column of the label table with the split: train, val or test. Empty: recognize it by its name; none: use no
    such column."""
    view_column: str = ""
    """Column of the label table with the view: PA, AP or lateral. Empty: recognize it by its name; none: use no such
    column."""
    label_columns: tuple[str, ...] = ()
    """Columns of the label table with the findings: one column per finding, which contains 1, 0, -1 or blank, or a
    single column that contains names of findings, such as Effusion|Mass. Default: recognize them."""
    value_column: str = ""
    """Column of the label table that contains 1, 0, -1 or blank, if each row names one finding. Empty: recognize it
    by its name; none: every named finding is positive."""
    blank_as: Literal["unknown", "negative"] = "unknown"
    """Label of a finding that the table leaves blank or does not mention for an image."""
    uncertain_as: LabelPolicy = "unknown"
    """Label of a finding that is uncertain (-1) in an image. CheXpert calls these choices U-Ignore, U-Zeros and
    U-Ones."""
    label_mapping: str = ""
    """URI of a YAML or JSON file that renames, merges and leaves out findings; see docs/how-to/labels.md."""
    boxes: str = ""
    """URI of a file with boxes: COCO JSON, or CSV with the columns of VinBigData or of the RSNA Pneumonia Detection
    Challenge. Its boxes replace those of the archive. Without --labels, its findings also replace the archive's
    labels, and images that it does not list are skipped. Empty: use the archive's own labels and boxes."""
    min_readers: int = 1
    """Number of readers who must have marked a finding for its label to be positive."""
    reader_boxes: ReaderBoxes = "wbf"
    """How to combine the boxes of several readers of an image. wbf: fuse overlapping boxes of a finding by weighted
    boxes fusion. majority: the same, but keep only boxes that more than half of the readers drew. union: keep all
    boxes unchanged."""
    masks: str = ""
    """URI of masks: a folder of PNG or GIF files named like the images, COCO JSON, or a CSV file of run lengths such
    as SIIM-ACR's or CheXmask's. They replace the archive's own masks of the same labels."""
    mask_label: str = ""
    """What the masks show, such as Lungs, Heart or Pneumothorax. Empty: the name of each mask's folder, or what the
    file says."""
    mask_code: MaskCode = "auto"
    """How the run-length codes of a CSV file give the starts of runs. relative: from the end of the previous run, as
    in SIIM-ACR. absolute: from the first pixel, column by column. absolute-rows: from the first pixel, row by row.
    auto: detect whether they are relative or absolute."""
    mask_quality: float = 0.7
    """Minimum quality of CheXmask's masks, from its column Dice RCA (Mean). Other masks are not used."""

    def __post_init__(self) -> None:
        of_masks = [name for name in self.describe() if name.startswith("mask_")]
        if of_masks and not self.masks:
            raise UserError(f"expected --masks with {_option(of_masks[0])}, got none: add it")
        if self.min_readers < 1:
            raise UserError(f"expected --min-readers of 1 or more, got {self.min_readers}")
        if self.labels and self.min_readers > 1:
            raise UserError("expected --labels or --min-readers, got both: use one of them")
        of_labels = [name for name in _OF_LABELS if name in self.describe()]
        if of_labels and not self.labels:
            raise UserError(f"expected --labels with {_option(of_labels[0])}, got none: add it")

    def __bool__(self) -> bool:
        """Whether any setting differs from its default."""
        return bool(self.describe())

    def describe(self) -> dict[str, Any]:
        """The settings that differ from their defaults, with normalized URIs."""
        values = {field: getattr(self, field.name) for field in fields(self)}
        changed = {field.name: value for field, value in values.items() if value != field.default}
        return {name: storage.normalize(value) if name in _URIS else value for name, value in changed.items()}

    def options(self) -> str:
        """The command-line options of `describe`, without their values."""
        return ", ".join(map(_option, self.describe()))

    def check_raw(self, archive: str) -> None:
        """Raise UserError if any setting differs from its default; call this for shards, which have fixed labels."""
        if self:
            raise UserError(
                f"{archive} contains shards, whose labels cannot be changed: omit {self.options()}, or use the "
                f"original archive"
            )


SOURCE_LABELS = Labeling()
"""The labels and boxes of an archive's source."""


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
