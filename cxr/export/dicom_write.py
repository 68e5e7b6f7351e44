"""Write the DICOM objects of one image, or say why there are none. Imports neither torch nor Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

import cxr
from cxr import storage
from cxr.errors import ImageRejectedError
from cxr.export.dicom_objects import KINDS, Kind, instance_uid, series_uid
from cxr.export.dicom_results import Algorithm, ImageResult
from cxr.export.dicom_source import SourceImage, quiet_libraries, read_source

WRITTEN = "written"
NOT_SCORED, BELOW, NO_FINDINGS, NO_MASK, FAILED = "not scored", "below threshold", "no findings", "no mask", "failed"
COLUMNS = ("image_id", "kind", "status", "reason", "file", "study_uid", "series_uid", "sop_uid", "pushed")
_VERSION = 2  # of the objects' content; part of each digest

Row = dict[str, Any]  # COLUMNS, and `digest` of what a written object was made from
MaskProbabilities = Callable[[str], np.ndarray]
"""From the URI of an image: the probability of each of its pixels, float32 (height, width). Can be pickled."""


@dataclass(frozen=True)
class Export:
    """Everything that a process needs to write objects.

    Args:
        out: URI of the folder of the objects.
        mask_probabilities: for segmentations of type FRACTIONAL; None: BINARY.
    """

    out: str
    algorithm: Algorithm
    kinds: tuple[Kind, ...] = KINDS
    all_images: bool = False
    mask_probabilities: MaskProbabilities | None = None

    def digest(self, kind: Kind, result: ImageResult, *, with_mask: bool) -> str:
        """Changes whenever the object must be written again; `with_mask` as for a report."""
        scores = asdict(replace(result, source_uri=""))  # an archive may move
        made_from = [_VERSION, cxr.__version__, asdict(self.algorithm), scores]
        options = [with_mask] if kind == "sr" else [self.mask_probabilities is not None]
        return hashlib.sha256(json.dumps([made_from, options]).encode()).hexdigest()


def exported_kinds(result: ImageResult, export: Export) -> list[Kind]:
    """The kinds of objects that an export has of an image; none if it was not scored or nothing was found."""
    if result.error is not None or not (export.all_images or result.is_positive):
        return []
    return [kind for kind in export.kinds if _has_content(kind, result)]


def _has_content(kind: Kind, result: ImageResult) -> bool:
    """Whether there is something to write; results with a mask have a finding, too."""
    return {"sr": bool(result.findings or result.boxes), "seg": result.has_mask, "sc": True}[kind]


def outdated_kinds(result: ImageResult, export: Export, before: Mapping[str, Row]) -> list[Kind]:
    """The kinds of objects that must be written for an image.

    Args:
        before: rows of an earlier export whose files are still there, by kind.
    """
    kinds = exported_kinds(result, export)
    digests = {kind: export.digest(kind, result, with_mask="seg" in kinds) for kind in kinds}
    return [kind for kind in kinds if kind not in before or before[kind]["digest"] != digests[kind]]


def export_image(result: ImageResult, export: Export, before: Mapping[str, Row]) -> list[Row]:
    """Write the objects of one image; returns a row for each kind, or one row that says why there is none.

    Args:
        before: rows of an earlier export whose files are still there, by kind.

    Raises:
        StorageError: storage failed in a way that concerns more than one file.
    """
    nothing: Row = dict.fromkeys(COLUMNS) | {"image_id": result.image_id}
    if result.error is not None:
        return [nothing | {"status": NOT_SCORED, "reason": result.error}]
    if not (export.all_images or result.is_positive):
        return [nothing | {"status": BELOW}]
    kinds, outdated = exported_kinds(result, export), outdated_kinds(result, export, before)
    rows = [before[kind] for kind in kinds if kind not in outdated]
    if "sr" in export.kinds and "sr" not in kinds:
        reason = "the model has no result for any finding, so there is nothing to report"
        rows.append(nothing | {"kind": "sr", "status": NO_FINDINGS, "reason": reason})
    if "seg" in export.kinds and "seg" not in kinds and result.mask is not None:
        rows.append(nothing | {"kind": "seg", "status": NO_MASK})
    if not outdated:
        return rows
    try:
        source = read_source(result.source_uri)
        _check_same_image(source, result)
    except ImageRejectedError as error:
        return [*rows, *(nothing | {"kind": kind, "status": FAILED, "reason": str(error)} for kind in outdated)]
    with_mask = "seg" in kinds and "seg" not in outdated
    for kind in sorted(outdated, key=lambda kind: kind != "seg"):  # reports refer only to segmentations that exist
        digest = export.digest(kind, result, with_mask=with_mask)
        if kind in before and before[kind]["digest"] == digest:  # the segmentation has failed again
            rows.append(before[kind])
            continue
        row = nothing | {"kind": kind, "study_uid": source.study_uid}
        try:
            with quiet_libraries():
                data = _made(kind, source, result, export, with_mask=with_mask)
        except ImageRejectedError as error:
            rows.append(row | {"status": FAILED, "reason": str(error)})
            continue
        sop_uid = instance_uid(source, export.algorithm, kind)
        file = f"{source.study_uid}/{kind}-{sop_uid}.dcm"
        storage.write_bytes(storage.join(export.out, file), data)
        made_from = {"series_uid": series_uid(source, export.algorithm, kind), "digest": digest}
        rows.append(row | made_from | {"status": WRITTEN, "file": file, "sop_uid": sop_uid})
        with_mask = with_mask or kind == "seg"
    return rows


def _check_same_image(source: SourceImage, result: ImageResult) -> None:
    """Raise ImageRejectedError if the file is not the image that was scored."""
    expected = (
        ("StudyInstanceUID", result.study_uid, source.study_uid),
        ("SOPInstanceUID", result.sop_uid, source.sop_uid),
    )
    for name, scored, there in expected:
        if scored is not None and scored != there:
            raise ImageRejectedError(
                f"the {name} of the file has changed since it was scored: score the archive again"
            )
    if (source.height, source.width) != (result.height, result.width):
        raise ImageRejectedError(
            f"expected the scored image of {result.width} x {result.height} pixels, got one of {source.width} x "
            f"{source.height}: the file has changed since it was scored"
        )


def _made(kind: Kind, source: SourceImage, result: ImageResult, export: Export, *, with_mask: bool) -> bytes:
    if kind == "sr":
        from cxr.export.dicom_sr import structured_report  # highdicom takes seconds to import

        return structured_report(source, result, export.algorithm, with_mask=with_mask)
    if kind == "seg":
        from cxr.export.dicom_seg import segmentation

        probabilities = export.mask_probabilities(result.source_uri) if export.mask_probabilities else None
        return segmentation(source, result, export.algorithm, probabilities)
    from cxr.data.decode_pool import decode_image
    from cxr.export.dicom_sc import secondary_capture

    decoded = decode_image(storage.read_bytes(result.source_uri))
    return secondary_capture(source, result, export.algorithm, decoded.image.pixels)
