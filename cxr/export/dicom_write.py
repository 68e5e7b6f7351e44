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
NOT_SCORED, BELOW, NO_MASK, FAILED = "not scored", "below threshold", "no mask", "failed"
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

    def digest(self, kind: str, result: ImageResult) -> str:
        """Changes whenever the object must be written again."""
        scores = asdict(replace(result, source_uri=""))  # an archive may move
        made_from = [_VERSION, cxr.__version__, asdict(self.algorithm), scores]
        options = ["seg" in self.kinds] if kind == "sr" else [self.mask_probabilities is not None]
        return hashlib.sha256(json.dumps([made_from, options]).encode()).hexdigest()


def exported_kinds(result: ImageResult, export: Export) -> list[Kind]:
    """The kinds of objects that an export has of an image; none if it was not scored or nothing was found."""
    if result.error is not None or not (export.all_images or result.is_positive):
        return []
    return [kind for kind in export.kinds if kind != "seg" or result.has_mask]


def outdated_kinds(result: ImageResult, export: Export, before: Mapping[str, Row]) -> list[Kind]:
    """The kinds of objects that must be written for an image.

    Args:
        before: rows of an earlier export whose files are still there, by kind.
    """
    kinds = exported_kinds(result, export)
    return [k for k in kinds if k not in before or before[k]["digest"] != export.digest(k, result)]


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
    outdated = outdated_kinds(result, export, before)
    rows = [before[kind] for kind in exported_kinds(result, export) if kind not in outdated]
    if "seg" in export.kinds and result.mask is not None and not result.has_mask:
        rows.append(nothing | {"kind": "seg", "status": NO_MASK})
    if not outdated:
        return rows
    try:
        source = read_source(result.source_uri)
        _check_same_image(source, result)
    except ImageRejectedError as error:
        return [*rows, *(nothing | {"kind": kind, "status": FAILED, "reason": str(error)} for kind in outdated)]
    for kind in outdated:
        row = nothing | {"kind": kind, "study_uid": source.study_uid}
        try:
            with quiet_libraries():
                data = _made(kind, source, result, export)
        except ImageRejectedError as error:
            rows.append(row | {"status": FAILED, "reason": str(error)})
            continue
        sop_uid = instance_uid(source, export.algorithm, kind)
        file = f"{source.study_uid}/{kind}-{sop_uid}.dcm"
        storage.write_bytes(storage.join(export.out, file), data)
        made_from = {"series_uid": series_uid(source, export.algorithm, kind), "digest": export.digest(kind, result)}
        rows.append(row | made_from | {"status": WRITTEN, "file": file, "sop_uid": sop_uid})
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


def _made(kind: Kind, source: SourceImage, result: ImageResult, export: Export) -> bytes:
    if kind == "sr":
        from cxr.export.dicom_sr import structured_report  # highdicom takes seconds to import

        with_mask = "seg" in export.kinds and result.has_mask
        return structured_report(source, result, export.algorithm, with_mask=with_mask)
    if kind == "seg":
        from cxr.export.dicom_seg import segmentation

        probabilities = export.mask_probabilities(result.source_uri) if export.mask_probabilities else None
        return segmentation(source, result, export.algorithm, probabilities)
    from cxr.data.decode_pool import decode_image
    from cxr.export.dicom_sc import secondary_capture

    decoded = decode_image(storage.read_bytes(result.source_uri))
    return secondary_capture(source, result, export.algorithm, decoded.image.pixels)
