"""Join long lists of images or exams to an archive's files, as Arrow columns instead of Python rows.

Lists are tables of text without nulls (`arrow_csv.read_columns`). The rules for repeated and contradictory rows are
those of `label_rows`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr.sources.label_rows import merged_row, presence_notes

SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O"}
_OLDEST_YEARS = 130  # higher ages are errors
_CHUNK = 65_536  # rows of JSON, far below the 2 GiB limit of an Arrow string array


def merged_rows(table: pa.Table, key: str) -> tuple[pa.Table, int]:
    """One row for each value of the column `key`, and the number of keys with contradictory rows.

    Values in which the rows of a key differ are blank; a blank contradicts nothing.
    """
    encoded = table[key].combine_chunks().dictionary_encode()
    number = encoded.indices.to_numpy(zero_copy_only=False)
    repeated = np.bincount(number, minlength=len(encoded.dictionary))[number] > 1
    if not repeated.any():
        return table, 0
    rows_by_key: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    several = table.filter(pa.array(repeated))
    keys = several[key].to_pylist()
    for name, *values in zip(keys, *(column.to_pylist() for column in several.columns), strict=True):
        rows_by_key[name].append(tuple(values))
    merged = [merged_row(rows) for rows in rows_by_key.values()]
    columns = zip(*(row for row, _ in merged), strict=True)
    once = pa.table(
        {name: pa.array(column, pa.string()) for name, column in zip(table.column_names, columns, strict=True)}
    )
    contradictory = sum(differ for _, differ in merged)
    return pa.concat_tables([table.filter(pa.array(~repeated)), once]), contradictory


def match(keys: pa.Array, table: pa.Table, key: str) -> pa.Array:
    """int32 (N): the row of `table`, whose column `key` has unique values, for each of the keys; null if none."""
    return pc.index_in(keys, value_set=table[key].combine_chunks())


def taken(table: pa.Table, row: pa.Array) -> dict[str, pa.Array]:
    """The table's columns at these rows, by name; blank where `row` is null."""
    return {name: pc.fill_null(table[name].combine_chunks().take(row), "") for name in table.column_names}


def listing_notes(file: str, listed: int, row: pa.Array, consequence: str = "labels are unknown") -> list[str]:
    """`presence_notes` of a list with `listed` images, from the `match` of the archive's images."""
    matched = np.zeros(listed, bool)
    matched[row.drop_null().to_numpy()] = True
    missing = listed - int(matched.sum())
    return presence_notes(file, listed, missing, len(row), row.null_count, consequence)


# ---- Columns


def translated(texts: pa.Array, words: Mapping[str, str]) -> pa.Array:
    """The translation of each text, whose case is ignored; null for texts that are not in `words` (in lower case)."""
    number = pc.index_in(pc.utf8_lower(texts), value_set=pa.array(list(words), pa.string()))
    return pa.array(list(words.values()), pa.string()).take(number)


def blank_as_null(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(texts, ""), None, texts)


def numbers(texts: pa.Array) -> np.ndarray:
    """float64 (N); NaN where the text is not a non-negative decimal number."""
    valid = pc.match_substring_regex(texts, r"^\d{1,15}(\.\d*)?$")
    return pc.cast(pc.if_else(valid, texts, None), pa.float64()).to_numpy(zero_copy_only=False)


def ages(years: np.ndarray) -> pa.Array:
    """float32 (N): ages in years; null where they are NaN or impossible."""
    known = (years >= 0) & (years <= _OLDEST_YEARS)  # NaN is not
    return pa.array(years.astype(np.float32), mask=~known)


def json_objects(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Array:
    """A JSON object per image with its values that are not blank; null if all are blank.

    Each different combination of values is encoded only once, because many images share it.
    """
    combinations: list[tuple[str, ...]] = [()]
    number_N = np.zeros(len(next(iter(columns.values()))), np.int64)  # of each image's combination
    for values in columns.values():
        encoded = pc.fill_null(_one_chunk(values), "").dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        pairs = pa.array(number_N * len(texts) + encoded.indices.to_numpy(zero_copy_only=False)).dictionary_encode()
        number_N = pairs.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        split = (divmod(pair, len(texts)) for pair in pairs.dictionary.to_pylist())
        combinations = [(*combinations[number], texts[text]) for number, text in split]
    filled = [{name: value for name, value in zip(columns, row, strict=True) if value} for row in combinations]
    objects = pa.array([json.dumps(row) if row else None for row in filled], pa.string())
    return objects.take(pa.array(number_N))


def json_rows(table: pa.Table, row: pa.Array) -> pa.ChunkedArray:
    """A JSON object with all values of each of these rows, as `json.dumps` writes it; null where `row` is null.

    Args:
        table: texts without nulls, in one chunk.
    """
    slices = (row.slice(start, _CHUNK) for start in range(0, len(row), _CHUNK))
    return pa.chunked_array([_json_rows(table.take(some), some.is_valid()) for some in slices], pa.string())


def _json_rows(table: pa.Table, known: pa.Array) -> pa.Array:
    pieces, special = [], np.zeros(table.num_rows, bool)
    for number, (name, values) in enumerate(zip(table.column_names, table.columns, strict=True)):
        pieces += [f'{", " if number else "{"}{json.dumps(name)}: "', values.combine_chunks(), '"']
        special |= pc.match_substring_regex(values, r"[^ !#-\[\]-~]").fill_null(False).to_numpy()
    texts = pc.if_else(known, pc.binary_join_element_wise(*pieces, "}", ""), None)
    if not special.any():
        return texts
    encoded = pa.array([json.dumps(row) for row in table.filter(pa.array(special)).to_pylist()], pa.string())
    return pc.replace_with_mask(texts, pa.array(special), encoded)


def by_text(texts: pa.Array | pa.ChunkedArray, function: Callable[[str], float]) -> np.ndarray:
    """float64 (N): a function of each text, called once for each different one."""
    encoded = _one_chunk(texts).dictionary_encode()
    values = np.array([function(text) for text in encoded.dictionary.to_pylist()], np.float64)
    return values[encoded.indices.to_numpy(zero_copy_only=False)]


def _one_chunk(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
