"""Pseudonyms in results: keyed HMAC-SHA256 in place of ids and paths, and a crosswalk that leads back.

Each id and path becomes 32 hexadecimal digits, which are the same in every run with the same key. The crosswalk is a
folder of Parquet files with a row per image: each of COLUMNS as it is, and its pseudonym in `pseudonym_COLUMN`. Only
who has the crosswalk or the key can tell which image, study or patient a result belongs to.

Imports neither torch nor Ray, because processes that decode images use it.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.errors import UserError, raised_at
from cxr.sources.options import ReadOptions
from cxr.sources.pseudonyms import ID_CHARS, Pseudonyms, read_key

COLUMNS = (schema.IMAGE_ID, schema.SOURCE_URI, schema.PATIENT_ID, schema.STUDY_ID, schema.SERIES_ID)
CROSSWALK = "crosswalk"  # default name of the folder, beside the key
REMOVED = "[removed]"  # in place of a name in a message
_PSEUDONYM = "pseudonym_"
_FREE_TEXT = (schema.EXTRA,)  # columns that contain what the source published, whatever that is
_FIELDS = pa.schema(
    [(name, pa.string()) for name in COLUMNS] + [(_PSEUDONYM + name, pa.string()) for name in COLUMNS]
)
_ENDINGS = re.compile(r"(\.[A-Za-z]\w{0,5}){1,2}$")
_SELECT = "select"  # option whose value may contain ids
_PRIVATE_PLACES = ("pseudonymize", "crosswalk", "id_key", "headers")  # options whose values are places of secrets
_THREADS = 8


@dataclass(frozen=True)
class Identity:
    """How the ids and paths in results are replaced."""

    pseudonyms: Pseudonyms
    crosswalk: str
    """URI of the folder."""
    archives: tuple[str, ...]
    """URIs of the archives, which are no secret."""
    key_file: str = ""

    @property
    def private_folder(self) -> str:
        """URI of the folder that contains the crosswalk, and other files with ids and paths."""
        return _parent(self.crosswalk)

    @property
    def key_name(self) -> str:
        """A name of the key that does not reveal it."""
        return str(self.pseudonyms.describe()["key"])

    def private(self, reading: ReadOptions) -> ReadOptions:
        """The same options; headers of DICOM files, which contain ids, are stored beside the crosswalk, and
        PatientIDs are hashed with the same key."""
        changed = reading.with_headers(self.private_folder)
        return changed if changed.id_key else replace(changed, id_key=self.key_file)

    def hidden_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Options, also within options, without what may name a patient or the key: of an expression that selects
        images, only the HMAC remains, and the places of the key, the crosswalk and the headers are left out."""
        hidden: dict[str, Any] = {}
        for name, value in settings.items():
            if isinstance(value, Mapping):
                hidden[name] = self.hidden_settings(value)
            elif name == _SELECT and value:
                hidden[f"{_SELECT}_hmac"] = self.pseudonyms.of(_SELECT, value.encode())
            elif name not in (_SELECT, *_PRIVATE_PLACES):
                hidden[name] = value
        return hidden

    def applied(self, rows: pa.Table) -> pa.Table:
        """The same rows with pseudonyms, and null in place of what else the source published about an image.

        Any of COLUMNS may be missing. Null remains null.
        """
        for name in COLUMNS:
            if name in rows.column_names:
                rows = rows.set_column(rows.column_names.index(name), name, self._column(name, rows[name]))
        for name in _FREE_TEXT:
            if name in rows.column_names:
                empty = pa.nulls(rows.num_rows, rows.schema.field(name).type)
                rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), empty)
        return rows

    def record(self, rows: pa.Table) -> None:
        """Write the crosswalk of some rows. The same rows always give the same file.

        Args:
            rows: with COLUMNS, not yet replaced.
        """
        originals = rows.select(list(COLUMNS)).replace_schema_metadata()
        columns = [*originals.columns, *(self._column(name, originals[name]) for name in COLUMNS)]
        sink = io.BytesIO()
        pq.write_table(pa.table(columns, schema=_FIELDS), sink)
        digest = hashlib.sha256(repr(originals.to_pylist()).encode()).hexdigest()[:32]
        storage.write_bytes(storage.join(self.crosswalk, f"{digest}.parquet"), sink.getvalue(), private=True)

    def _column(self, name: str, values: pa.ChunkedArray) -> pa.Array:
        made = [self.pseudonyms.of(name, None if text is None else text.encode()) for text in values.to_pylist()]
        return pa.array(made, pa.string())

    # ---- Messages

    def hide(self, text: str, rows: Iterable[pa.Table]) -> str:
        """A message without ids, paths, and names of folders and files of these rows.

        Numbers of fewer than five digits and names of one or two characters remain, because they cannot be told from
        counts and words.
        """
        names = {name for table in rows for name in self._names(table) if name in text and _is_telling(name)}
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", REMOVED, text)
        return text

    def _names(self, rows: pa.Table) -> set[str]:
        """Ids, and the parts of paths below the archives, with and without their endings."""
        names: set[str] = set()
        for column in (name for name in COLUMNS if name in rows.column_names):
            values = {text for text in rows[column].to_pylist() if text}
            names |= values
            for text in values:
                root = next((root for root in self.archives if text.startswith((f"{root}/", f"{root}!/"))), "")
                names |= set(text.removeprefix(root).split("/"))
        return names | {_ENDINGS.sub("", name) for name in names}

    @contextmanager
    def hidden_in_errors(self, rows: Sequence[pa.Table]) -> Iterator[None]:
        """Errors that the block raises do not name anything of these rows, to which the block may add.

        If there are no rows by then, because the archive could not be read, they do not name any of its files.
        """
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            _raise_hidden(error, self.hide(str(error), rows or self._files()))

    def _files(self) -> list[pa.Table]:
        """The paths of all files of the archives, as far as they can be listed."""
        uris: list[str] = []
        for archive in self.archives:
            with suppress(UserError):
                uris += [file.uri for file in storage.list_files(archive)]
        return [pa.table({schema.SOURCE_URI: pa.array(uris, pa.string())})]


def _raise_hidden(error: Exception, message: str) -> NoReturn:
    """Raise the error again with another message, and without the errors that led to it."""
    if isinstance(error, UserError):
        raise type(error)(message) from None
    raise RuntimeError(f"unexpected {type(error).__name__}{raised_at(error)}") from None


def _is_telling(name: str) -> bool:
    return len(name) > (4 if name.isdigit() else 2)


# ---- Where the key and the crosswalk are


def open_identity(key_file: str, crosswalk: str, out: str, archives: Sequence[str]) -> Identity | None:
    """Read the key, and check where the crosswalk is to be written; None if results have the archive's own ids.

    Args:
        key_file: a file with at least 16 bytes, as for `--id-key`; empty for the archive's own ids.
        crosswalk: URI of the folder of the crosswalk; empty for one beside the key.
        out: URI of the results.

    Raises:
        UserError: the key cannot be read or is too short, or the key or the crosswalk lies among the results.
    """
    if not key_file:
        if crosswalk:
            raise UserError("expected --pseudonymize with --crosswalk, got --crosswalk alone: use both, or neither")
        return None
    key_uri = storage.normalize(key_file)
    folder = storage.normalize(crosswalk) if crosswalk else storage.join(_parent(key_uri), CROSSWALK)
    for uri, option in ((key_uri, "--pseudonymize"), (folder, "--crosswalk")):
        if uri == out or storage.is_inside(uri, out):
            raise UserError(
                f"{option}: expected a location outside --out {out}, whose readers must not see the ids, got {uri}: "
                f"use another one"
            )
    key = read_key(key_file, f"--pseudonymize {key_file}")
    return Identity(Pseudonyms(key), folder, tuple(archives), key_file)


def _parent(uri: str) -> str:
    return uri.rpartition("/")[0] or "/"


# ---- The crosswalk


@dataclass(frozen=True)
class Crosswalk:
    """The crosswalk of one or more runs, in memory."""

    table: pa.Table
    _sorted: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """By column that was looked up: its M pseudonyms in ascending order, and their rows."""

    def originals(self, column: str, pseudonyms: pa.Array | pa.ChunkedArray) -> pa.Array:
        """The values of a column that were replaced by these pseudonyms; null where that is unknown."""
        if column not in self._sorted:
            made = _as_bytes(self.table[_PSEUDONYM + column])
            order = np.argsort(made, kind="stable")
            self._sorted[column] = made[order], order
        (made_M, rows_M), asked_N = self._sorted[column], _as_bytes(pseudonyms)
        if not len(made_M):
            return pa.nulls(len(asked_N), pa.string())
        places_N = np.searchsorted(made_M, asked_N).clip(max=len(made_M) - 1)
        rows = pa.array(rows_M[places_N], mask=made_M[places_N] != asked_N)
        return self.table[column].take(rows).combine_chunks()

    def with_paths(self, scores: pa.Table) -> pa.Table:
        """Scores with pseudonyms, whose column `source_uri` has the paths again; null for unknown images."""
        paths = self.originals(schema.SOURCE_URI, scores[schema.SOURCE_URI])
        return scores.set_column(scores.column_names.index(schema.SOURCE_URI), schema.SOURCE_URI, paths)

    def pseudonymized(self, truth: pa.Table) -> pa.Table:
        """A manifest with the pseudonyms of its images; those without one become "not scored 0", "not scored 1", …"""
        for name in (name for name in COLUMNS if name in truth.column_names and name != schema.SOURCE_URI):
            known = pc.index_in(truth[name], self.table[name].combine_chunks())
            numbers = pc.dictionary_encode(truth[name]).combine_chunks().indices.cast(pa.string())
            unknown = pc.binary_join_element_wise("not scored", numbers, " ")
            made = pc.coalesce(self.table[_PSEUDONYM + name].take(known), unknown)
            made = pc.if_else(truth[name].is_valid(), made, pa.scalar(None, pa.string()))
            truth = truth.set_column(truth.column_names.index(name), name, made)
        return truth


def _as_bytes(pseudonyms: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(N,) of ID_CHARS bytes each; empty for null."""
    return np.array([(text or "").encode() for text in pseudonyms.to_pylist()], f"S{ID_CHARS}")


def read_crosswalk(uri: str, columns: Sequence[str] = COLUMNS) -> Crosswalk:
    """Read the folder that runs with `--pseudonymize` wrote, or a single Parquet file of it.

    Args:
        columns: some of COLUMNS, which are enough for the caller.

    Raises:
        UserError: it contains no crosswalk.
    """
    uri = storage.normalize(uri)
    files = [file.uri for file in storage.list_files(uri) if file.path.endswith(".parquet") and "/" not in file.path]
    with ThreadPoolExecutor(_THREADS) as pool:
        names = [*columns, *(_PSEUDONYM + name for name in columns)]
        tables = list(pool.map(lambda file: storage.read_parquet(file, columns=names), files))
    if not tables or any({*table.schema.names} != {*names} for table in tables):
        raise UserError(
            f"expected a crosswalk in {uri}, got other files: use the folder that cxr score --pseudonymize wrote"
        )
    whole = pa.concat_tables(tables)
    return Crosswalk(whole.group_by(whole.column_names, use_threads=False).aggregate([]))  # runs may share images
