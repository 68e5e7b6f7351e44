"""Sources: each reads one published layout of an archive into a manifest."""

from __future__ import annotations

from cxr.errors import UserError
from cxr.sources import (
    chestxray14,
    chexpert,
    dicom,
    file_list,
    folder,
    jsrt,
    mimic_cxr_jpg,
    padchest,
    rsna_pneumonia,
    siim,
    vinbigdata,
    vindr,
)
from cxr.sources.labeling import labeled
from cxr.sources.manifest import Manifest, Source
from cxr.sources.nlm import montgomery, shenzhen
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, Labeling, ReadOptions
from cxr.sources.selection import select
from cxr.sources.sidecar import with_truth
from cxr.sources.true_boxes import with_usable_boxes
from cxr.storage import archive_root

SOURCES: tuple[Source, ...] = (
    file_list,
    chestxray14,
    montgomery,
    shenzhen,
    chexpert,
    mimic_cxr_jpg,
    padchest,
    rsna_pneumonia,
    vindr,
    siim,
    jsrt,
    vinbigdata,
    dicom,
    folder,
)
"""In the order of detection; `folder` accepts every layout that no other source recognizes."""


def find_source(uri: str, source: str = "auto") -> Source:
    """The source with this name or, with "auto", the first that recognizes the archive's layout.

    Raises:
        UserError: there is no such source.
    """
    uri = archive_root(uri)
    for candidate in SOURCES:
        if source == candidate.name or (source == "auto" and candidate.detect(uri)):
            return candidate
    known = ", ".join(candidate.name for candidate in SOURCES)
    raise UserError(f"expected source auto, {known}, got {source!r}: choose one of these")


def open_manifest(uri: str, reading: ReadOptions = ALL_IMAGES, labeling: Labeling = SOURCE_LABELS) -> Manifest:
    """List the selected images of an archive, each once, with the labels and boxes of its source and `truth.parquet`.

    Args:
        labeling: where labels and boxes come from, if not from the source. With a file of boxes, only the images
            that it lists are included.

    Raises:
        UserError: unknown source, missing archive, no images, damaged lists, or too many boxes outside their images.
    """
    uri = archive_root(uri)
    source = find_source(uri, reading.source)
    listed = dicom.manifest(uri, reading) if source is dicom else source.manifest(uri)
    manifest = with_usable_boxes(labeled(with_truth(listed, uri), labeling))
    manifest.table, notes = select(manifest.table, reading.select, f"source {source.name}")
    manifest.notes += notes
    return manifest
