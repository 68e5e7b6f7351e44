"""Exactly once: work is cut into named parts, each a file that is either there whole or not there at all.

The same manifest and settings always give the same parts, so a run that was killed goes on with those whose
files are missing. `OUT/ledger.json` tells what the parts were made of; a run of anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError

LEDGER_FILE = "ledger.json"
_HASH = "_sha256"  # at the end of a setting's name: the hash of what the rest of the name says
_VALUE_CHARS = 120  # of a setting in a message
SUFFIX = ".parquet"
_CHUNK = 16_384
_LONG = {pa.string(): pa.large_string()}


@dataclass(frozen=True)
class Part:
    """A piece of the work: its name, "train/part-00000", and its rows of the manifest."""

    name: str
    rows: pa.Table

    @property
    def path(self) -> str:
        """Of the part's file, relative to the ledger's folder."""
        return self.name + SUFFIX


@dataclass(frozen=True)
class Ledger:
    """Which parts of the work under `uri` are done."""

    uri: str

    def file(self, part: Part) -> str:
        """URI of the part's file; `storage.write_bytes` to it is what marks the part as done."""
        return storage.join(self.uri, part.path)

    def todo(self, parts: Sequence[Part]) -> list[Part]:
        """Parts without a file, by one listing."""
        found = {entry.path for entry in storage.list_files(self.uri)}
        return [part for part in parts if part.path not in found]


def plan(manifest: pa.Table, rows_per_part: int, *, by: str | None = None, folder: str = "") -> list[Part]:
    """Cut a manifest into parts of at most `rows_per_part` rows, sorted by `image_id`.

    Args:
        by: a column, `split` say; each of its values gets parts of its own, named "train/part-00000".
        folder: goes before every part's name.

    Raises:
        UserError: an `image_id` stands twice in the manifest.
    """
    _check_unique(manifest[schema.IMAGE_ID])
    ordered = rows_at(manifest, pc.sort_indices(manifest[schema.IMAGE_ID]))
    groups = {"": ordered}
    if by:
        values = sorted(ordered[by].unique().to_pylist())
        groups = {value: ordered.filter(pc.field(by) == value) for value in values}
    return [
        Part("/".join(filter(None, [folder, value, f"part-{number:05d}"])), rows.slice(start, rows_per_part))
        for value, rows in groups.items()
        for number, start in enumerate(range(0, rows.num_rows, rows_per_part))
    ]


def rows_at(manifest: pa.Table, order: pa.Array) -> pa.Table:
    """The rows at `order`, in chunks, each far below the 2 GiB that an Arrow string array can hold."""
    long = [field.with_type(_LONG.get(field.type, field.type)) for field in manifest.schema]
    whole = manifest.cast(pa.schema(long, manifest.schema.metadata)).combine_chunks()
    starts = range(0, max(1, len(order)), _CHUNK)
    return pa.concat_tables(whole.take(order.slice(start, _CHUNK)).cast(manifest.schema) for start in starts)


def _check_unique(image_ids: pa.ChunkedArray) -> None:
    counts = image_ids.value_counts()
    twice = [entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1]
    if twice:
        raise UserError(
            f"the archive lists {len(twice)} image ids more than once, {twice[0]!r} for one: an id names one "
            f"image; rename them, or split the archive"
        )


def open_ledger(out_uri: str, settings: Mapping[str, Any], parts: Iterable[Part]) -> Ledger:
    """Begin or go on with the work under `out_uri`.

    Args:
        settings: whatever the parts' contents depend on, as JSON takes it.

    Raises:
        UserError: what lies there was made with other settings or of other images.
    """
    entry = {"settings": json.loads(json.dumps(settings)), "fingerprint": fingerprint(parts)}
    ledger = Ledger(storage.normalize(out_uri))
    uri = storage.join(ledger.uri, LEDGER_FILE)
    if storage.exists(uri):
        _check_same(ledger.uri, storage.read_json(uri), entry)
    else:
        storage.write_json(uri, entry)
    return ledger


def fingerprint(parts: Iterable[Part]) -> str:
    """SHA-256 over the parts' names and all values of their rows."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps([part.name, part.rows.to_pylist()]).encode())
    return digest.hexdigest()


def _check_same(uri: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changes = _changes(before["settings"], now["settings"])
    if not changes and before["fingerprint"] != now["fingerprint"]:
        changes = ["the archive's images, labels or splits have changed"]
    if changes:
        raise UserError(
            f"{uri} holds results of other settings ({'; '.join(changes)}): give another --out, or those settings"
        )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, the settings that differ.

    Settings within settings, those of a checkpoint's recipe say, count only if nothing else differs: they follow from
    the checkpoint.
    """
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    nested = [key for key in differing if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping)]
    if plain := [key for key in differing if key not in nested]:
        return [_change(key, old.get(key), new.get(key)) for key in plain]
    return [f"{key}: {change}" for key in nested for change in _changes(old[key], new[key])]


def _change(key: str, old: Any, new: Any) -> str:
    if key.endswith(_HASH):
        return f"another {key.removesuffix(_HASH)}: SHA-256 was {str(old)[:12]}, is {str(new)[:12]}"
    return f"{key} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}…"
