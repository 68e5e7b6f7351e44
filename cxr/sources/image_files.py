"""List the files of an archive that may be images."""

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

IMAGE_SUFFIXES = frozenset(
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
    """Files that may be images, sorted, with columns PATH and schema.SOURCE_URI; and a note on the others.

    Only its content determines what a file is, so files count regardless of their extension, except hidden files and
    files whose names clearly say otherwise. Pipes, sockets and devices are skipped. No file is opened.

    Raises:
        UserError: no file remains, or the URI cannot be listed.
    """
    others: Counter[str] = Counter()
    batches = list(_batches(_candidates(list_files(uri, others), others)))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
    notes = [f"skipped files that are not images: {kinds}"] if others else []
    if not batches:
        content = f"no images ({notes[0]})" if notes else "no files"
        raise UserError(f"expected X-rays in {uri}, got {content}: give the folder that contains the X-rays")
    return _sorted(pa.Table.from_batches(batches)), notes


def files_below(uri: str) -> Iterator[FileEntry]:
    """Every file below `uri`; none if the folder does not exist."""
    try:
        yield from list_files(uri)
    except NotFoundError:
        return


def image_key(name: str) -> str:
    """The key that joins an image file to its rows in label files: the file name without folders and image suffixes.

    Surrounding blanks, the case of the suffix and the direction of slashes are ignored; the case of the name is not.
    So "images\\A.PNG", "A.jpeg", " A" and "A.dcm.png" have the same key, as have files with the same name in several
    folders: each gets the labels of that image.
    """
    key = name.replace("\\", "/").rpartition("/")[2].strip()
    stem, _, suffix = key.rpartition(".")
    if stem and suffix.lower() in IMAGE_SUFFIXES:
        key = stem.rstrip()
        stem, _, suffix = key.rpartition(".")
        if stem and suffix.lower() in IMAGE_SUFFIXES:  # a copy may keep the original's suffix: A.dicom.png
            key = stem.rstrip()
    return key


def image_ids(paths: pa.Array, names: pa.Array) -> tuple[pa.Array, list[str]]:
    """File names as ids, or paths for names shared by several files, which a note counts."""
    counts = names.value_counts()
    shared = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if not len(shared):
        return names, []
    note = (
        f"image names shared by several files: {len(shared):,}; each of these files is used, with its path as its id"
    )
    return pc.if_else(pc.is_in(names, value_set=shared), paths, names), [note]


def _batches(entries: Iterator[FileEntry]) -> Iterator[pa.RecordBatch]:
    while chunk := list(islice(entries, _CHUNK)):
        yield pa.record_batch([[e.path for e in chunk], [e.uri for e in chunk]], schema=_LONG_COLUMNS)


def _sorted(files: pa.Table) -> pa.Table:
    """Sort by path, in chunks far below the 2 GiB limit of an Arrow string array."""
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
    """The kind of a file whose name shows that it is not an image; None for others."""
    if path.startswith(".") or "/." in path:
        return "hidden"
    other = _OTHER_FILES.fullmatch(path.rpartition("/")[2])
    return (other["suffix"] or other[0]).lower() if other else None
