"""Which files of an archive may be images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.errors import UserError
from cxr.storage import FileEntry, NotFoundError, list_files

PATH = "path"  # relative to the archive's root

_IMAGE_SUFFIXES = frozenset(
    ("dcm", "dicom", "dic", "png", "jpg", "jpeg", "jp2", "tif", "tiff", "bmp", "gif", "webp", "img")
)
_COLUMNS = pa.schema([(PATH, pa.string()), (schema.SOURCE_URI, pa.string())])
_LONG_COLUMNS = pa.schema([(PATH, pa.large_string()), (schema.SOURCE_URI, pa.large_string())])
_CHUNK = 65_536
_OTHER_FILES = re.compile(
    r"dicomdir|readme|license|thumbs\.db|desktop\.ini"
    r"|.*(?P<suffix>\.(csv|tsv|txt|log|md|rst|pdf|docx?|xlsx?|html?|jsonl?|xml|ya?ml|toml|parquet|py|ipynb|sh"
    r"|md5|sha256|zip|gz|tgz|bz2|xz|tar|7z|rar))",
    re.IGNORECASE,
)


def list_images(uri: str) -> tuple[pa.Table, list[str]]:
    """Files that may be images, with columns PATH and schema.SOURCE_URI, sorted; and a note on the others.

    Only its content can tell what a file is, so each one counts whatever its extension, but for hidden files
    and names that are evidently something else. Pipes, sockets and devices are none. No file is opened.

    Raises:
        UserError: no file is left, or the URI cannot be listed.
    """
    others: Counter[str] = Counter()
    batches = list(_batches(_candidates(list_files(uri, others), others)))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
    notes = [f"not taken for images: {kinds}"] if others else []
    if not batches:
        found = f" ({notes[0]})" if notes else ", nor any other file"
        raise UserError(f"no image lies in {uri}{found}: give the folder that holds the X-rays")
    return _sorted(pa.Table.from_batches(batches)), notes


def files_below(uri: str) -> Iterator[FileEntry]:
    """Every file below `uri`; none where there is no such folder."""
    try:
        yield from list_files(uri)
    except NotFoundError:
        return


def image_key(name: str) -> str:
    """What joins an image's file to its rows in label files: the file's name without folders and image suffixes.

    Blanks around the name, the suffix's case and the direction of slashes do not matter; the rest of the name does,
    its case included. So "images\\A.PNG", "A.jpeg", " A" and "A.dcm.png" are one image, as are files of one name in
    several folders: each gets what the label file says of that image.
    """
    key = name.replace("\\", "/").rpartition("/")[2].strip()
    stem, _, suffix = key.rpartition(".")
    if stem and suffix.lower() in _IMAGE_SUFFIXES:
        key = stem.rstrip()
        stem, _, suffix = key.rpartition(".")
        if stem and suffix.lower() in _IMAGE_SUFFIXES:  # a copy may keep the original's suffix: A.dicom.png
            key = stem.rstrip()
    return key


def image_ids(paths: pa.Array, names: pa.Array) -> tuple[pa.Array, list[str]]:
    """Files' names; paths for files that share their name with another, which a note counts."""
    counts = names.value_counts()
    shared = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if not len(shared):
        return names, []
    note = (
        f"{len(shared):,} image names belong to several files: each of these files is used, with its path as its id"
    )
    return pc.if_else(pc.is_in(names, value_set=shared), paths, names), [note]


def _batches(entries: Iterator[FileEntry]) -> Iterator[pa.RecordBatch]:
    while chunk := list(islice(entries, _CHUNK)):
        yield pa.record_batch([[e.path for e in chunk], [e.uri for e in chunk]], schema=_LONG_COLUMNS)


def _sorted(files: pa.Table) -> pa.Table:
    """By path, in chunks, each far below the 2 GiB that an Arrow string array can hold."""
    order = pc.sort_indices(files[PATH])
    files = files.combine_chunks()
    starts = range(0, len(order), _CHUNK)
    return pa.concat_tables(files.take(order.slice(start, _CHUNK)).cast(_COLUMNS) for start in starts)


def _candidates(entries: Iterable[FileEntry], others: Counter[str]) -> Iterator[FileEntry]:
    for entry in entries:
        if kind := _other_kind(entry.path):
            others[kind] += 1
        else:
            yield entry


def _other_kind(path: str) -> str | None:
    """What a file evidently is that is no image, by its name alone."""
    if path.startswith(".") or "/." in path:
        return "hidden"
    other = _OTHER_FILES.fullmatch(path.rpartition("/")[2])
    return (other["suffix"] or other[0]).lower() if other else None
