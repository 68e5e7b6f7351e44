"""OUT/parts of an export: a row for each object of a few images, from which a later export continues.

OUT/parts/part-NNNNNN.json   what is written for some images, in the order of the scores

Memory holds a few bytes for each object, and the rows of the images that are being exported.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from cxr import storage
from cxr.data.prefetch import read_ahead
from cxr.export.dicom_write import WRITTEN, Row

PARTS = "parts"
_AHEAD = 8  # parts that are read at a time


def part_uri(out: str, number: int) -> str:
    return storage.join(out, PARTS, f"part-{number:06d}.json")


def part_uris(out: str) -> list[str]:
    """The files of OUT/parts, in order."""
    try:
        entries = storage.list_files(storage.join(out, PARTS))
        return sorted(entry.uri for entry in entries if entry.path.endswith(".json"))
    except storage.NotFoundError:
        return []


def read_parts(uris: Sequence[str]) -> Iterator[list[Row]]:
    """The rows of each part, in order; a few parts are read ahead."""
    return read_ahead(storage.read_json, uris, _AHEAD)


def short_key(text: str) -> int:
    """64 bits that stand for the path of a file or the id of an image: with a billion of them, a pair has the same
    key with a probability of 3 %."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def object_files(out: str) -> Iterator[str]:
    """The paths in OUT of all exported objects."""
    try:
        yield from (entry.path for entry in storage.list_files(out) if entry.path.endswith(".dcm"))
    except storage.NotFoundError:
        return


class EarlierObjects:
    """The objects that an earlier export has written and that are still there."""

    def __init__(self, out: str) -> None:
        self._uris = part_uris(out)
        self._files = np.unique(np.fromiter(map(short_key, object_files(out) if self._uris else ()), np.uint64))
        keys, parts = array("Q"), array("i")
        for number, rows in enumerate(read_parts(self._uris)):
            images = {short_key(row["image_id"]) for row in rows if row["status"] == WRITTEN}
            keys.extend(images)
            parts.extend([number] * len(images))
        order = np.argsort(keys, kind="stable")
        self._images, self._parts = np.array(keys)[order], np.array(parts)[order]
        self._read = np.zeros(len(self._uris), bool)
        self._waiting: dict[str, list[Row]] = {}  # rows that have been read, by image

    def take(self, number: int, image_ids: Sequence[str]) -> dict[tuple[str, str], Row]:
        """What is written for these images, by image and kind. Each image is asked for once.

        Args:
            number: of the part that will be replaced by rows of these images, so that its rows are read now.
        """
        keys = np.array([short_key(image_id) for image_id in image_ids], np.uint64)
        first, last = (np.searchsorted(self._images, keys, side) for side in ("left", "right"))
        wanted = {int(part) for start, end in zip(first, last, strict=True) for part in self._parts[start:end]}
        for part in sorted({*wanted, number}):
            if part < len(self._uris) and not self._read[part]:
                self._add(part)
        return {(image_id, row["kind"]): row for image_id in image_ids for row in self._waiting.pop(image_id, ())}

    def _add(self, part: int) -> None:
        self._read[part] = True
        for row in storage.read_json(self._uris[part]):
            if row["status"] == WRITTEN and self._is_there(row["file"]):
                self._waiting.setdefault(row["image_id"], []).append(row)

    def _is_there(self, file: str) -> bool:
        key = np.uint64(short_key(file))
        at = np.searchsorted(self._files, key)
        return bool(at < len(self._files) and self._files[at] == key)
