"""Archives for tests: lists, and files whose content is not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cxr import schema
from cxr.sources import open_manifest
from cxr.sources.manifest import Manifest

Rows = dict[str, dict[str, Any]]


def write(folder: Path, lists: Mapping[str, str | bytes], images: Iterable[str] = ()) -> str:
    """Write lists, and empty images at these paths; return the archive's URI."""
    files = {**lists, **dict.fromkeys(images, b"?")}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def read(archive: str) -> tuple[Manifest, Rows]:
    """The archive's manifest, and its rows by image id."""
    manifest = open_manifest(archive)
    assert manifest.table.schema.remove_metadata().equals(schema.MANIFEST)
    manifest.table.validate(full=True)
    return manifest, {row[schema.IMAGE_ID]: row for row in manifest.table.to_pylist()}


def findings(manifest: Manifest, row: Mapping[str, Any], label: int = schema.POSITIVE) -> set[str]:
    """The findings of an image with this label."""
    return {name for name, own in zip(manifest.findings, row[schema.LABELS], strict=True) if own == label}
