"""Exactly-once processing: work is divided into named parts, each a file that is either complete or absent.

The same manifest and settings always give the same parts, so a killed run is resumed by making the missing files.
`OUT/ledger.json` records the settings and a fingerprint of the input; a run with others is rejected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.wording import counted

LEDGER_FILE = "ledger.json"
_HASH = "_sha256"  # suffix of settings that are hashes; the rest of the name says of what
_VALUE_CHARS = 120  # maximum length of a setting in a message
SUFFIX = ".parquet"
_CHUNK = 16_384
_LONG = {pa.string(): pa.large_string()}


@dataclass(frozen=True)
class Part:
    """A part of the work: its name, such as "train/part-00000", and its rows of the manifest."""

    name: str
    rows: pa.Table

    @property
    def path(self) -> str:
        """Path of the part's file, relative to the ledger's folder."""
        return self.name + SUFFIX


@dataclass(frozen=True)
class Ledger:
    """The state of the work under `uri`."""

    uri: str

    def file(self, part: Part) -> str:
        """URI of the part's file; writing it with `storage.write_bytes` marks the part as done."""
        return storage.join(self.uri, part.path)

    def todo(self, parts: Sequence[Part]) -> list[Part]:
        """The parts without a file; lists the folder once."""
        done = {entry.path for entry in storage.list_files(self.uri)}
        return [part for part in parts if part.path not in done]


def plan(manifest: pa.Table, rows_per_part: int, *, by: str | None = None, folder: str = "") -> list[Part]:
    """Divide a manifest into parts of at most `rows_per_part` rows, sorted by `image_id`.

    Args:
        by: a column such as `split`; each of its values has its own parts, named "train/part-00000".
        folder: prefix of every part's name.

    Raises:
        UserError: an `image_id` occurs more than once in the manifest.
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
    """The rows at `order`, in chunks far below the 2 GiB limit of an Arrow string array."""
    long = [field.with_type(_LONG.get(field.type, field.type)) for field in manifest.schema]
    whole = manifest.cast(pa.schema(long, manifest.schema.metadata)).combine_chunks()
    starts = range(0, max(1, len(order)), _CHUNK)
    return pa.concat_tables(whole.take(order.slice(start, _CHUNK)).cast(manifest.schema) for start in starts)


def _check_unique(image_ids: pa.ChunkedArray) -> None:
    counts = image_ids.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise UserError(
            f"expected unique image ids, got {counted(len(repeated), 'id')} more than once, for example "
            f"{repeated[0].as_py()!r}: rename the images, or split the archive"
        )


def open_ledger(out_uri: str, settings: Mapping[str, Any], parts: Iterable[Part]) -> Ledger:
    """Start or resume the work under `out_uri`.

    Args:
        settings: everything that the contents of the parts depend on, serializable as JSON.

    Raises:
        UserError: `out_uri` contains results of other settings or other images.
    """
    entry = {"settings": json.loads(json.dumps(settings)), "fingerprint": fingerprint(parts)}
    ledger = Ledger(storage.normalize(out_uri))
    uri = storage.join(ledger.uri, LEDGER_FILE)
    if storage.exists(uri):
        check_same(ledger.uri, storage.read_json(uri), entry)
    else:
        storage.write_json(uri, entry)
    return ledger


def fingerprint(parts: Iterable[Part]) -> str:
    """SHA-256 of the parts' names and all values of their rows, however Arrow stores them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps([part.name, part.rows.num_rows, part.rows.column_names]).encode())
        for column in part.rows.columns:
            _digest_values(column.combine_chunks(), digest)
    return digest.hexdigest()


def _digest_values(values: pa.Array, digest: hashlib._Hash) -> None:
    """Add the type and the values of an array to a digest: first which are null, then the others."""
    digest.update(str(values.type).encode())
    digest.update(np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    values = values.drop_null()
    if isinstance(values, pa.StructArray):
        for field in values.flatten():
            _digest_values(field, digest)
    elif isinstance(values, (pa.ListArray, pa.FixedSizeListArray)):
        digest.update(pc.list_value_length(values).to_numpy().astype("<i4").tobytes())
        _digest_values(values.flatten(), digest)
    elif pa.types.is_string(values.type):
        digest.update(pc.binary_length(values).to_numpy().astype("<i4").tobytes())
        digest.update("".join(values.to_pylist()).encode())
    else:
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())


def check_same(uri: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError unless the settings and fingerprints of two runs are the same."""
    differing = changes(before["settings"], now["settings"])
    if not differing and before["fingerprint"] != now["fingerprint"]:
        differing = ["the archive's images, labels or splits have changed"]
    if differing:
        raise UserError(
            f"{uri} contains results of other settings ({'; '.join(differing)}): choose another --out, or the same "
            f"settings"
        )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe the settings that differ.

    Nested settings, such as those of a checkpoint's recipe, are described only if nothing else differs, because they
    follow from the checkpoint.
    """
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    nested = [key for key in differing if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping)]
    if plain := [key for key in differing if key not in nested]:
        return [_change(key, old.get(key), new.get(key)) for key in plain]
    return [f"{key}: {change}" for key in nested for change in changes(old[key], new[key])]


def _change(key: str, old: Any, new: Any) -> str:
    if key.endswith(_HASH):
        return f"{key.removesuffix(_HASH)} changed: SHA-256 was {str(old)[:12]}, is now {str(new)[:12]}"
    return f"{key} was {_short(old)}, is now {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}…"
