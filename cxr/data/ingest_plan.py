"""The plan of an ingest, with which an interrupted run continues instead of listing and reading the archive again.

OUT/plan/00000.parquet …   the manifest, one row group for each part (`cxr.data.manifest_files`)
OUT/plan/plan.json         the parts, findings and notes, and what the manifest was made from; written last
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cxr import storage
from cxr.data.ledger import Fingerprint, Part
from cxr.data.manifest_files import StoredPart, write_parts
from cxr.data.shards import RowGroup

_FOLDER, _FILE = "plan", "plan.json"


@dataclass(frozen=True)
class IngestPlan:
    """What an ingest decodes.

    Args:
        settings: of the ingest, see `ledger.open_ledger`.
        fingerprint: of the parts, see `ledger.Fingerprint`.
        findings: of the labels, in order.
        notes: of the manifest, for the user.
        files: the version of each file that the manifest was made from, by URI; None: it could not be read. Images
            and their headers are not among them.
    """

    settings: Mapping[str, Any]
    parts: list[StoredPart]
    fingerprint: str
    findings: tuple[str, ...]
    notes: list[str]
    files: Mapping[str, str | None]

    @property
    def images(self) -> int:
        return sum(part.group.rows for part in self.parts)

    def changed_files(self) -> list[str]:
        """Names of the files that have another version than when the manifest was made from them."""
        now = storage.current_versions(self.files)
        return [storage.name(uri) for uri, version in self.files.items() if now[uri] != version]


def write_plan(
    out: str,
    settings: Mapping[str, Any],
    parts: Iterable[Part],
    findings: Sequence[str],
    notes: Sequence[str],
    files: Collection[str],
) -> IngestPlan:
    """Store a plan in the folder of an ingest, in place of an earlier one.

    Args:
        files: URIs of the files that the manifest was made from.
    """
    folder = storage.join(out, _FOLDER)
    storage.delete(storage.join(folder, _FILE))
    fingerprint = Fingerprint()

    def counted() -> Iterator[Part]:
        for part in parts:
            fingerprint.add(part)
            yield part

    stored = write_parts(folder, counted())
    plan = IngestPlan(
        json.loads(json.dumps(settings)),
        stored,
        fingerprint.hexdigest(),
        tuple(findings),
        [*notes],
        storage.current_versions(files),
    )
    places = [[part.name, storage.name(part.group.uri), part.group.index, part.group.rows] for part in stored]
    content = {"settings": plan.settings, "fingerprint": plan.fingerprint, "findings": plan.findings}
    content |= {"notes": plan.notes, "files": plan.files, "parts": places}
    storage.write_bytes(storage.join(folder, _FILE), json.dumps(content, ensure_ascii=False).encode())
    return plan


def read_plan(out: str) -> IngestPlan | None:
    """The plan in the folder of an ingest; None if there is none, or it is incomplete."""
    folder = storage.join(out, _FOLDER)
    if not storage.exists(storage.join(folder, _FILE)):
        return None
    content = storage.read_json(storage.join(folder, _FILE))
    parts = [
        StoredPart(name, RowGroup(storage.join(folder, file), index, rows, ()))
        for name, file, index, rows in content["parts"]
    ]
    return IngestPlan(
        content["settings"],
        parts,
        content["fingerprint"],
        tuple(content["findings"]),
        content["notes"],
        content["files"],
    )
