"""What the rows of a label file say of an image, where rows repeat or contradict each other and where words vary.

The same row twice is one row. What the rows of an image differ in is unknown; a blank says nothing, so it differs
from nothing. Words are compared by their letters and digits alone, whatever their case.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from cxr import schema
from cxr.sources.csv_table import CsvTable
from cxr.sources.image_files import image_key

_WORDS_IN_NOTE = 10
_LETTERS_IN_NOTE = 40  # of each word


def image_keys(table: CsvTable, column: str) -> list[str]:
    """The `image_key` of each row's image, whose name is in `column`.

    Raises:
        UserError: a row names no image.
    """
    names = table.column(column)
    keys = [image_key(name) for name in names]
    if "" in keys:
        row = keys.index("")
        raise table.error(row, "the name of an image", names[row])
    return keys


def rows_by_image(table: CsvTable, column: str) -> dict[str, list[int]]:
    """The rows (as indices) about each image, by `image_key`, in the file's order; raises as `image_keys`."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(image_keys(table, column)):
        rows[key].append(row)
    return dict(rows)


def merged_row(rows: Sequence[Sequence[str]]) -> tuple[list[str], bool]:
    """One row from those of an image, blank where they differ; and whether they differ anywhere."""
    merged, differ = [], False
    for values in zip(*rows, strict=True):
        spellings = {value.casefold(): value for value in values if value}
        merged.append(next(iter(spellings.values())) if len(spellings) == 1 else "")
        differ = differ or len(spellings) > 1
    return merged, differ


def agreed_labels(statements: Sequence[np.ndarray]) -> tuple[np.ndarray, bool]:
    """What one or more statements about an image, each int8 (findings,), say together; and whether they contradict.

    A finding is unknown if none says anything of it, or one says positive and another negative.
    """
    said = np.stack(statements)
    positive, negative = ((said == value).any(0) for value in (schema.POSITIVE, schema.NEGATIVE))
    agreed = np.where(positive, schema.POSITIVE, schema.NEGATIVE)
    return np.where(positive != negative, agreed, schema.UNKNOWN).astype(np.int8), bool((positive & negative).any())


def word_key(word: str) -> str:
    """The word's letters and digits in lower case: the same for "Pleural_Thickening" and "pleural thickening"."""
    return "".join(filter(str.isalnum, word.casefold()))


def unknown_words_note(words: Counter[str], file: str, consequence: str) -> list[str]:
    """A note that names the words that are not understood, each with the number of rows that have it."""
    if not words:
        return []
    named = [f"{word[:_LETTERS_IN_NOTE]!r} ({count:,})" for word, count in words.most_common(_WORDS_IN_NOTE)]
    more = [f"{len(words) - _WORDS_IN_NOTE:,} other words"] if len(words) > _WORDS_IN_NOTE else []
    return [f"{file} has words that are not understood, {', '.join([*named, *more])}: {consequence}"]


def contradictions_note(images: int, file: str) -> list[str]:
    """A note that counts the images whose rows contradict each other."""
    if not images:
        return []
    return [f"{images:,} images have rows in {file} that contradict each other: what they differ in is unknown"]
