"""Readers of archives: each layout in which X-rays are published becomes one manifest."""

from __future__ import annotations

from cxr.errors import UserError
from cxr.sources import chestxray14, folder, jsrt, siim, vinbigdata, vindr
from cxr.sources.annotations import Labeling, labeled
from cxr.sources.manifest import Manifest, Source
from cxr.sources.nlm import montgomery, shenzhen
from cxr.sources.sidecar import with_truth
from cxr.sources.true_boxes import with_usable_boxes
from cxr.storage import normalize

SOURCES: tuple[Source, ...] = (chestxray14, montgomery, shenzhen, vindr, siim, jsrt, vinbigdata, folder)
"""In the order in which they are asked; `folder` takes what no other knows."""


def find_source(uri: str, source: str = "auto") -> Source:
    """The source of that name, or with "auto" the first that knows the archive's layout.

    Raises:
        UserError: there is no such source.
    """
    for candidate in SOURCES:
        if source == candidate.name or (source == "auto" and candidate.detect(uri)):
            return candidate
    known = ", ".join(candidate.name for candidate in SOURCES)
    raise UserError(f"there is no source {source!r}: wanted auto, {known}")


def open_manifest(uri: str, source: str = "auto", labeling: Labeling | None = None) -> Manifest:
    """Every image of an archive once, with what its source and a `truth.parquet` beside it know.

    Args:
        labeling: whose labels and boxes these are, where not the source's own; with annotations only the images
            that they name are there.

    Raises:
        UserError: no such source or archive, an archive without images, or one whose own files are broken; or too
            many boxes outside the frame that the archive gives them.
    """
    uri = normalize(uri)
    manifest = with_truth(find_source(uri, source).manifest(uri), uri)
    return with_usable_boxes(labeled(manifest, labeling) if labeling else manifest)
