"""List the files of an archive that may be images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.errors import UserError
from cxr.sources.dicomdir import FILE_BYTES, FILE_VERSION, PATH, referenced_files
from cxr.storage import FileEntry, NotFoundError, UnreadableError, is_container, list_files, normalize, split_member
from cxr.wording import counted

IMAGE_SUFFIXES = frozenset(
    ("dcm", "dicom", "dic", "png", "jpg", "jpeg", "jp2", "tif", "tiff", "bmp", "gif", "webp", "img")
)
_COLUMNS = pa.schema(
    [(PATH, pa.string()), (schema.SOURCE_URI, pa.string()), (FILE_BYTES, pa.int64()), (FILE_VERSION, pa.string())]
)
_LONG_COLUMNS = pa.schema(
    [
        (PATH, pa.large_string()),
        (schema.SOURCE_URI, pa.large_string()),
        (FILE_BYTES, pa.int64()),
        (FILE_VERSION, pa.string()),
    ]
)
_CHUNK = 65_536
_THREADS = 16  # containers listed at a time
_GZIPPED = re.compile(r"(\.dcm|\.dicom)\.gz$", re.IGNORECASE)
_EXAMINED, _SAMPLED_FROM = 4096, 1000  # listed files, and candidates among them, from which a sample is taken
_OTHER_FILES = re.compile(
    r"(?!.*\.(dcm|dicom)\.gz$)(dicomdir|readme|license|thumbs\.db"
    r"|.*(?P<suffix>\.(csv|tsv|txt|log|md|rst|pdf|docx?|xlsx?|html?|jsonl?|xml|ya?ml|toml|parquet|py|ipynb|sh"
    r"|exe|dll|inf|ini|bat|md5|sha256|zip|gz|tgz|bz2|xz|tar|7z|rar)))",
    re.IGNORECASE,
)


_recorded: ContextVar[dict[str, tuple[pa.Table, list[str]]] | None] = ContextVar("listings", default=None)


@dataclass
class _Skipped:
    """Files that are not listed as images."""

    others: Counter[str] = field(default_factory=Counter)  # by kind
    containers: list[FileEntry] = field(default_factory=list)  # ZIP and TAR files
    dicomdir: FileEntry | None = None  # in the listed folder itself


def list_images(uri: str) -> tuple[pa.Table, list[str]]:
    """Files that may be images, sorted, with columns PATH, schema.SOURCE_URI, FILE_BYTES and FILE_VERSION; and notes.

    Only its content determines what a file is, so files count regardless of their extension, except hidden files and
    files whose names clearly say otherwise. Pipes, sockets and devices are skipped. No file is opened, with two
    exceptions:

    - If the folder has a DICOMDIR, exactly the images that it references are listed (see `cxr.sources.dicomdir`).
    - ZIP and TAR files are opened if the folder contains no other images; the paths of their members begin with the
      name of the file. Beside other images they are skipped, because they usually contain the same images again.

    Raises:
        UserError: no file remains, or the URI cannot be listed.
    """
    recorded = _recorded.get()
    if recorded is None:
        return _list_images(uri)
    if uri not in recorded:
        recorded[uri] = _list_images(uri)
    files, notes = recorded[uri]
    return files, [*notes]


@contextmanager
def recorded_listings() -> Iterator[None]:
    """List each URI only once within the block, and let `file_versions` know what was listed."""
    token = _recorded.set({})
    try:
        yield
    finally:
        _recorded.reset(token)


def file_versions(uris: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Sizes (FILE_BYTES) and versions (FILE_VERSION) of an archive's files, as they were listed.

    Files that were not listed within `recorded_listings`, such as those of a list of images, are examined one by one.
    Missing files have size 0 and an empty version.
    """
    listed = [files for files, _ in (_recorded.get() or {}).values()]
    known = pa.concat_tables(listed) if listed else _COLUMNS.empty_table()
    row = pc.index_in(uris.combine_chunks(), value_set=known[schema.SOURCE_URI].combine_chunks())
    others = [uri for uri, there in zip(uris.to_pylist(), row.is_valid().to_pylist(), strict=True) if not there]
    if others:
        with ThreadPoolExecutor(_THREADS) as pool:
            examined = list(pool.map(_examined, others))
        known = pa.concat_tables([known, pa.Table.from_batches(_batches(iter(examined))).cast(_COLUMNS)])
        row = pc.index_in(uris.combine_chunks(), value_set=known[schema.SOURCE_URI].combine_chunks())
    return known[FILE_BYTES].combine_chunks().take(row), known[FILE_VERSION].combine_chunks().take(row)


def _examined(uri: str) -> FileEntry:
    try:
        return replace(next(list_files(uri)), uri=uri)
    except (NotFoundError, UnreadableError, StopIteration):
        return FileEntry(uri, "", 0)


def _list_images(uri: str) -> tuple[pa.Table, list[str]]:
    skipped = _Skipped()
    files = _table(_candidates(list_files(uri, skipped.others), skipped))
    containers = counted(len(skipped.containers), "ZIP or TAR file")
    notes: list[str] = []
    if skipped.dicomdir:
        files, notes = referenced_files(files, skipped.dicomdir.uri, uri)
    elif skipped.containers and not files.num_rows:
        files = _table(_candidates(_members(skipped.containers, skipped.others), skipped))
        notes = [f"the images are read from {containers} without unpacking"]
    elif skipped.containers:
        notes = [f"skipped {containers} beside the images: to read one, name it as --archive"]
    if skipped.others:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.others.items()))
        notes = [f"skipped files that are not images: {kinds}", *notes]
    if not files.num_rows:
        content = f"no images ({'; '.join(notes)})" if notes else "no files"
        raise UserError(f"expected X-rays in {uri}, got {content}: use the folder that contains the X-rays")
    return files, notes


def sample_images(uri: str, count: int) -> list[FileEntry]:
    """At most `count` files that may be images, spread over the sorted paths of the first ones that are listed.

    As in `list_images`, they are members of a ZIP or TAR file if the folder contains no other images.
    """
    skipped = _Skipped()
    images = _first_candidates(islice(files_below(uri), _EXAMINED), skipped)
    for container in sorted(skipped.containers, key=lambda entry: entry.path)[:count]:
        if images:
            break
        members, _ = _members_of(container)
        images = _first_candidates((member for member in members if not member.path.endswith("!")), skipped)
    images.sort(key=lambda entry: entry.path)
    return [images[at * len(images) // count] for at in range(count)] if len(images) > count else images


def _first_candidates(entries: Iterable[FileEntry], skipped: _Skipped) -> list[FileEntry]:
    return list(islice(_candidates(entries, skipped), _SAMPLED_FROM))


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
    key = _GZIPPED.sub(r"\1", name.replace("\\", "/").rpartition("/")[2].strip())
    stem, _, suffix = key.rpartition(".")
    if stem and suffix.lower() in IMAGE_SUFFIXES:
        key = stem.rstrip()
        stem, _, suffix = key.rpartition(".")
        if stem and suffix.lower() in IMAGE_SUFFIXES:  # a copy may keep the original's suffix: A.dicom.png
            key = stem.rstrip()
    return key


def image_keys(names: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The `image_key` of each of many names or paths."""
    keys = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
    keys = pc.replace_substring_regex(pc.replace_substring(keys, "\\", "/"), r"(?s)^.*/", "")
    keys = pc.replace_substring_regex(pc.utf8_trim_whitespace(keys), r"(?is)(\.dcm|\.dicom)\.gz$", r"\1")
    for _ in range(2):  # a copy may keep the original's suffix: A.dicom.png
        keys = pc.replace_substring_regex(keys, rf"(?is)^(.+)\.({'|'.join(sorted(IMAGE_SUFFIXES))})$", r"\1")
        keys = pc.utf8_rtrim_whitespace(keys)
    return keys


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
        yield pa.record_batch(
            [[getattr(e, name) for e in chunk] for name in ("path", "uri", "size", "version")], schema=_LONG_COLUMNS
        )


def _table(entries: Iterator[FileEntry]) -> pa.Table:
    """Sort by path, in chunks far below the 2 GiB limit of an Arrow string array."""
    files = pa.Table.from_batches(_batches(entries), _LONG_COLUMNS).combine_chunks()
    order = pc.sort_indices(files[PATH])
    starts = range(0, max(1, len(order)), _CHUNK)
    return pa.concat_tables(files.take(order.slice(start, _CHUNK)).cast(_COLUMNS) for start in starts)


def _candidates(entries: Iterable[FileEntry], skipped: _Skipped) -> Iterator[FileEntry]:
    for entry in entries:
        if is_container(entry.path) and not split_member(entry.uri) and not _is_hidden(entry.path):
            skipped.containers.append(entry)
        elif entry.path.upper() == "DICOMDIR":
            skipped.dicomdir = entry
        elif kind := _other_kind(entry.path):
            skipped.others[kind] += 1
        else:
            yield entry


def _members(containers: Sequence[FileEntry], others: Counter[str]) -> Iterator[FileEntry]:
    """The members of containers; a container that cannot be read is one entry, which fails when it is read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(containers), _THREADS):
            for members, special in pool.map(_members_of, containers[start : start + _THREADS]):
                others.update(special)
                yield from members


def _members_of(container: FileEntry) -> tuple[list[FileEntry], Counter[str]]:
    root, special = normalize(f"{container.uri}!"), Counter[str]()
    unreadable = FileEntry(
        f"{container.uri}!", f"{container.path}!", 0
    )  # also listed for the damaged rest of a container
    try:
        return [
            replace(member, path=f"{container.path}/{member.path}") if normalize(member.uri) != root else unreadable
            for member in list_files(root, special)
        ], special
    except (UnreadableError, NotFoundError):
        return [unreadable], special


def _other_kind(path: str) -> str | None:
    """The kind of a file whose name shows that it is not an image; None for others."""
    if _is_hidden(path):
        return "hidden"
    match = _OTHER_FILES.fullmatch(path.rpartition("/")[2])
    return (match["suffix"] or match[0]).lower() if match else None


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path
