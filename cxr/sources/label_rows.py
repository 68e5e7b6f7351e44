"""Merge the rows of a label file by image, with repeated and contradictory rows and varying spellings.

Repeated rows count once. Values in which the rows of an image differ are unknown; a blank contradicts nothing. Words
are compared only by their letters and digits, regardless of case.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.sources.csv_table import CsvTable
from cxr.sources.image_files import image_keys
from cxr.wording import counted

_WORDS_IN_NOTE = 10
_LETTERS_IN_NOTE = 40  # of each word

ImageKeys = Callable[[pa.Array | pa.ChunkedArray], pa.Array]
"""What identifies the images with these names: `image_files.image_keys` in published lists, whose file names are
unique, and `image_match.image_paths` in the lists of users."""


def listed_keys(table: CsvTable, column: str, keys_of: ImageKeys = image_keys) -> pa.Array:
    """The key of each row's image, whose name is in `column`.

    Raises:
        UserError: a row does not name an image.
    """
    keys = keys_of(table.texts(column))
    if (row := _first_blank(keys)) >= 0:
        raise table.error(row, "an image name", table.texts(column)[row].as_py())
    return keys


def numbered_images(table: CsvTable, column: str, keys_of: ImageKeys = image_keys) -> tuple[np.ndarray, pa.Array]:
    """int64 (rows,) the number of each row's image, in the order in which images first occur; and their keys.

    Raises like `listed_keys`, and takes less memory if images have several rows.
    """
    names = table.texts(column).combine_chunks().dictionary_encode()
    keys = keys_of(names.dictionary)
    if (number := _first_blank(keys)) >= 0:
        raise table.error(pc.index(names.indices, number).as_py(), "an image name", names.dictionary[number].as_py())
    encoded = keys.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64)[names.indices.to_numpy()], encoded.dictionary


def _first_blank(keys: pa.Array) -> int:
    """The position of the first key without a file name, or -1."""
    return pc.index(pc.match_substring_regex(keys, r"(^|/)$"), True).as_py()


def rows_by_image(table: CsvTable, column: str, keys_of: ImageKeys = image_keys) -> dict[str, list[int]]:
    """Indices of the rows of each image, by its key, in the file's order; raises like `listed_keys`."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(listed_keys(table, column, keys_of).to_pylist()):
        rows[key].append(row)
    return dict(rows)


def merged_row(rows: Sequence[Sequence[str]]) -> tuple[list[str], bool]:
    """Merge the rows of an image into one that is blank where they differ; also whether they differ anywhere."""
    merged, differ = [], False
    for values in zip(*rows, strict=True):
        spellings = {value.casefold(): value for value in values if value}
        merged.append(next(iter(spellings.values())) if len(spellings) == 1 else "")
        differ = differ or len(spellings) > 1
    return merged, differ


def agreed_labels(statements: Sequence[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Combine statements about an image, each int8 (findings,); also return whether any contradict each other.

    A finding is unknown if no statement says anything about it, or if they disagree.
    """
    stacked = np.stack(statements)
    positive, negative = ((stacked == value).any(0) for value in (schema.POSITIVE, schema.NEGATIVE))
    agreed = np.where(positive, schema.POSITIVE, schema.NEGATIVE)
    return np.where(positive != negative, agreed, schema.UNKNOWN).astype(np.int8), bool((positive & negative).any())


def word_key(word: str) -> str:
    """The word's letters and digits in lower case: the same for "Pleural_Thickening" and "pleural thickening"."""
    return "".join(filter(str.isalnum, word.casefold()))


def unknown_words_note(words: Counter[str], file: str, consequence: str) -> list[str]:
    """A note that lists unrecognized words, each with its number of rows."""
    if not words:
        return []
    named = [f"{word[:_LETTERS_IN_NOTE]!r} ({count:,})" for word, count in words.most_common(_WORDS_IN_NOTE)]
    more = [counted(len(words) - _WORDS_IN_NOTE, "other word")] if len(words) > _WORDS_IN_NOTE else []
    return [f"unrecognized words in {file}, {', '.join([*named, *more])}: {consequence}"]


def presence_notes(
    file: str, listed: int, missing: int, images: int, unlisted: int, consequence: str = "labels are unknown"
) -> list[str]:
    """Notes on listed images without a file and on images that are not listed.

    Args:
        listed: number of images in the list.
        missing: number of these without a file.
        images: number of images in the archive.
        unlisted: number of these that are not in the list.
        consequence: what that means for them.
    """
    notes = []
    if missing:
        lost = f"missing from the archive: {missing:,} of {counted(listed, 'image')} listed in {file}"
        notes.append(f"{lost}; continuing with {counted(images, 'image')}")
    if unlisted:
        notes.append(f"not listed in {file}, so {consequence}: {counted(unlisted, 'image')}")
    return notes


def contradictions_note(images: int, file: str) -> list[str]:
    """A note that counts the images whose rows contradict each other."""
    if not images:
        return []
    return [f"contradictory rows in {file}: {counted(images, 'image')}; the values that differ are unknown"]
