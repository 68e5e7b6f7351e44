"""Exactly-once processing: work is divided into named parts, each a file that is either complete or absent.

The same manifest and settings always give the same parts, so a killed run is resumed by making the missing files.
`OUT/ledger.json` records the settings and a fingerprint of the input; a run with others is rejected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

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


class Named(Protocol):
    """A part, or where its rows are."""

    @property
    def path(self) -> str:
        """Path of the part's file, relative to the ledger's folder."""
        ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class Part:
    """A part of the work: its name, such as "train/part-00000", and its rows of the manifest."""

    name: str
    rows: pa.Table

    @property
    def path(self) -> str:
        return self.name + SUFFIX


@dataclass(frozen=True)
class Ledger:
    """The state of the work under `uri`."""

    uri: str

    def file(self, part: Named) -> str:
        """URI of the part's file; writing it with `storage.write_bytes` marks the part as done."""
        return storage.join(self.uri, part.path)

    def todo(self, parts: Sequence[N]) -> list[N]:
        """The parts without a file; lists the folder once."""
        done = {entry.path for entry in storage.list_files(self.uri)}
        return [part for part in parts if part.path not in done]


def plan(manifest: pa.Table, rows_per_part: int, *, by: str | None = None, folder: str = "") -> Iterator[Part]:
    """Divide a manifest into parts of at most `rows_per_part` rows, sorted by `image_id`.

    The rows of a few parts at a time are copied, while the parts are iterated over.

    Args:
        by: a column such as `split`; each of its values has its own parts, named "train/part-00000".
        folder: prefix of every part's name.

    Raises:
        UserError: an `image_id` occurs more than once in the manifest.
    """
    _check_unique(manifest[schema.IMAGE_ID])
    order = pc.sort_indices(manifest[schema.IMAGE_ID]).to_numpy().astype(np.int64)
    groups = {"": order}
    if by:
        values = sorted(manifest[by].unique().to_pylist())
        value_N = pc.index_in(manifest[by], value_set=pa.array(values)).to_numpy()[order]
        groups = {value: order[value_N == number] for number, value in enumerate(values)}
    return (
        Part("/".join(filter(None, [folder, value, f"part-{number:05d}"])), rows)
        for value, of_value in groups.items()
        for number, rows in enumerate(_pieces(manifest, of_value, rows_per_part))
    )


def _pieces(manifest: pa.Table, order: np.ndarray, size: int) -> Iterator[pa.Table]:
    together = size * max(1, _CHUNK // size)
    for start in range(0, len(order), together):
        rows = rows_at(manifest, order[start : start + together])
        yield from (rows.slice(first, size) for first in range(0, rows.num_rows, size))


def rows_at(manifest: pa.Table, order: np.ndarray) -> pa.Table:
    """The rows at `order`, in chunks far below the 2 GiB limit of an Arrow string array.

    Rows are taken from one chunk of the manifest at a time: Arrow would first join all chunks of a column of texts.
    """
    batches = manifest.to_batches() or manifest.schema.empty_table().to_batches(1)
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    starts_of_chunks = range(0, max(1, len(order)), _CHUNK)
    return pa.concat_tables(_taken(batches, starts, order[start : start + _CHUNK]) for start in starts_of_chunks)


def _taken(batches: Sequence[pa.RecordBatch], starts: np.ndarray, rows_N: np.ndarray) -> pa.Table:
    batch_N = np.searchsorted(starts, rows_N, side="right") - 1
    numbers = np.unique(batch_N).tolist()
    taken = [batches[number].take(pa.array(rows_N[batch_N == number] - starts[number])) for number in numbers]
    table = pa.Table.from_batches(taken, batches[0].schema).combine_chunks()
    in_batches = np.argsort(batch_N, kind="stable")
    return table if len(taken) < 2 else table.take(pa.array(np.argsort(in_batches)))


def _check_unique(image_ids: pa.ChunkedArray) -> None:
    if pc.count_distinct(image_ids).as_py() == len(image_ids):
        return
    counts = image_ids.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    raise UserError(
        f"expected unique image ids, got {counted(len(repeated), 'id')} more than once, for example "
        f"{repeated[0].as_py()!r}: rename the images, or split the archive"
    )


def open_ledger(out_uri: str, settings: Mapping[str, Any], fingerprint: str) -> Ledger:
    """Start or resume the work under `out_uri`.

    Args:
        settings: everything that the contents of the parts depend on, serializable as JSON.
        fingerprint: of the parts, see `Fingerprint`.

    Raises:
        UserError: `out_uri` contains results of other settings or other images.
    """
    entry = {"settings": json.loads(json.dumps(settings)), "fingerprint": fingerprint}
    ledger = Ledger(storage.normalize(out_uri))
    uri = storage.join(ledger.uri, LEDGER_FILE)
    if storage.exists(uri):
        check_same(ledger.uri, storage.read_json(uri), entry)
    else:
        storage.write_json(uri, entry)
    return ledger


def check_settings(out_uri: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError if `out_uri` contains results of other settings, whatever their images."""
    uri = storage.join(out_uri, LEDGER_FILE)
    if storage.exists(uri):
        before = storage.read_json(uri)
        now = {"settings": json.loads(json.dumps(settings)), "fingerprint": before["fingerprint"]}
        check_same(storage.normalize(out_uri), before, now)


class Fingerprint:
    """SHA-256 of the parts' names and all values of their rows, however Arrow stores them."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, part: Part) -> None:
        self._digest.update(json.dumps([part.name, part.rows.num_rows, part.rows.column_names]).encode())
        for column in part.rows.columns:
            _digest_values(column.combine_chunks(), self._digest)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


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
        digest.update(_joined(values))
    else:
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())


def _joined(texts: pa.StringArray) -> memoryview | bytes:
    """The bytes of all texts, one after another."""
    _, offsets, content = texts.buffers()
    if not len(texts) or content is None:
        return b""
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(content)[ends[0] : ends[-1]]


def check_same(uri: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError unless the settings and fingerprints of two runs are the same."""
    differing = changes(before["settings"], now["settings"])
    if not differing and before["fingerprint"] != now["fingerprint"]:
        differing = ["the archive's images, labels or splits have changed"]
    if differing:
        raise UserError(
            f"{uri} contains results with different settings ({'; '.join(differing)}): use another --out, or the "
            f"same settings"
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
