"""What a scoring run says about each image, in the form in which DICOM objects are made from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

import cxr
from cxr import schema
from cxr.imaging import dicom_terms
from cxr.sources.annotations import NO_FINDING_WORDS
from cxr.sources.label_rows import word_key

_LO_LETTERS = 64  # of a text with the value representation LO (PS3.5 6.2)


@dataclass(frozen=True)
class Algorithm:
    """The model whose results are exported, as DICOM objects name it.

    Args:
        member: its name in a panel; "" without one.
        sha256: of its weights.
        thresholds: by finding; findings without a known threshold are missing.
        mask_label: what its masks show; "" for other families.
        box_thresholds: from which score on a box of a finding is exported.
        box_score: the same for other findings.
    """

    family: str
    sha256: str
    member: str = ""
    findings: tuple[str, ...] = ()
    thresholds: Mapping[str, float] | None = None
    mask_label: str = ""
    box_thresholds: Mapping[str, float] = field(default_factory=dict)
    box_score: float = 0.25

    def box_threshold(self, finding: str) -> float:
        """From which score on a box of this finding is exported."""
        return self.box_thresholds.get(finding, self.box_score)

    @property
    def name(self) -> str:
        return f"cxr {self.family}{f' {self.member}' if self.member else ''}"[:_LO_LETTERS]

    @property
    def version(self) -> str:
        return f"{cxr.__version__}, weights {self.sha256[:16]}"[:_LO_LETTERS]


@dataclass(frozen=True)
class FindingScore:
    """What the model says about one finding in the whole image.

    Args:
        probability: in [0, 1]; None if there is none.
        threshold: from which probability on the finding counts as present; None if unknown.
        present: the decision; None if there is none.
    """

    name: str
    probability: float | None
    threshold: float | None
    present: bool | None


@dataclass(frozen=True)
class BoxScore:
    """A predicted box: corners in pixels of the original, edges at integers."""

    label: str
    score: float
    corners: tuple[float, float, float, float]  # x_min, y_min, x_max, y_max


@dataclass(frozen=True)
class MaskScore:
    """A predicted mask at the original's size, as relative run lengths (`sources.rle`)."""

    label: str
    rle: str
    area_px: int


@dataclass(frozen=True)
class ImageResult:
    """The results of one image. `findings`, `boxes` and `mask` are empty where the family has none, or for `error`.

    Args:
        image_id: as in the scores.
        study_uid: of the scored file; None if unknown. Likewise `sop_uid`.
    """

    image_id: str
    source_uri: str
    error: str | None
    study_uid: str | None
    sop_uid: str | None
    height: int
    width: int
    findings: tuple[FindingScore, ...] = ()
    boxes: tuple[BoxScore, ...] = ()
    mask: MaskScore | None = None

    @property
    def is_positive(self) -> bool:
        """Whether a finding is present, a box was predicted, or the mask is not empty."""
        return any(finding.present for finding in self.findings) or bool(self.boxes) or self.has_mask

    @property
    def has_mask(self) -> bool:
        return self.mask is not None and self.mask.area_px > 0


def as_uid(text: str | None) -> str | None:
    """An id of an image or exam if it is a UID; sources without DICOM headers have other ids."""
    return dicom_terms.uid(text) if "." in (text or "") else None


def score_columns(family_columns: Sequence[str]) -> list[str]:
    """The columns of scores that `image_results` reads, of those that a run has."""
    identity = [schema.IMAGE_ID, schema.SOURCE_URI, schema.ERROR, schema.STUDY_ID]
    sizes = [schema.HEIGHT_PX, schema.WIDTH_PX]
    read = (schema.PROBABILITIES, schema.DECISIONS, schema.PRED_BOXES, *schema.MASK_SCORES.names)
    return [*identity, *sizes, *(name for name in read if name in family_columns)]


def image_results(part: pa.Table, algorithm: Algorithm) -> Iterator[ImageResult]:
    """The results of a part's images, from the columns of `score_columns`."""
    for row in part.to_pylist():
        good = row[schema.ERROR] is None
        yield ImageResult(
            image_id=row[schema.IMAGE_ID],
            source_uri=row[schema.SOURCE_URI] or "",
            error=row[schema.ERROR],
            study_uid=as_uid(row[schema.STUDY_ID]),
            sop_uid=as_uid(row[schema.IMAGE_ID]),
            height=row[schema.HEIGHT_PX] or 0,
            width=row[schema.WIDTH_PX] or 0,
            findings=tuple(_findings(row, algorithm)) if good else (),
            boxes=tuple(_boxes(row, algorithm)) if good else (),
            mask=_mask(row, algorithm) if good else None,
        )


def _findings(row: Mapping[str, Any], algorithm: Algorithm) -> Iterator[FindingScore]:
    """Of a classifier: each finding with a probability. Of other families: each finding, by its best box or mask."""
    thresholds = algorithm.thresholds or {}
    probabilities, decisions = row.get(schema.PROBABILITIES), row.get(schema.DECISIONS)
    if isinstance(probabilities, list):
        made = decisions if isinstance(decisions, list) else [-1] * len(probabilities)
        for name, probability, decision in zip(algorithm.findings, probabilities, made, strict=True):
            if _is_finding(name) and probability is not None and not math.isnan(probability):
                present = None if decision == schema.UNKNOWN else decision == schema.POSITIVE
                yield FindingScore(name, probability, thresholds.get(name), present)
        return
    if schema.PRED_MASK_AREA_PX in row:
        label, probability = algorithm.mask_label, row[schema.PRED_MASK_PROBABILITY]
        known = isinstance(probability, float) and not math.isnan(probability)
        present = bool(row[schema.PRED_MASK_AREA_PX])
        yield FindingScore(label, probability if known else None, thresholds.get(label), present)
        return
    boxes = row.get(schema.PRED_BOXES)
    best: dict[str, float] = {}
    for box in boxes if isinstance(boxes, list) else ():
        best[box[schema.LABEL]] = max(best.get(box[schema.LABEL], 0.0), box[schema.SCORE])
    for name in dict.fromkeys([*algorithm.findings, *best]):
        if _is_finding(name):
            threshold = algorithm.box_threshold(name)
            yield FindingScore(name, best.get(name), threshold, best.get(name, -1.0) >= threshold)


def _is_finding(name: str) -> bool:
    """Whether the name does not say that there is no finding, in any data set's spelling."""
    return word_key(name) not in NO_FINDING_WORDS


def _boxes(row: Mapping[str, Any], algorithm: Algorithm) -> Iterator[BoxScore]:
    boxes = row.get(schema.PRED_BOXES)
    for box in boxes if isinstance(boxes, list) else ():
        label = box[schema.LABEL]
        if _is_finding(label) and box[schema.SCORE] >= algorithm.box_threshold(label):
            corners = tuple(box[name] for name in (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX))
            yield BoxScore(label, box[schema.SCORE], corners)


def _mask(row: Mapping[str, Any], algorithm: Algorithm) -> MaskScore | None:
    code, area = row.get(schema.PRED_MASK_RLE), row.get(schema.PRED_MASK_AREA_PX)
    if not isinstance(code, str) or not isinstance(area, int):
        return None
    return MaskScore(algorithm.mask_label, code, area)
