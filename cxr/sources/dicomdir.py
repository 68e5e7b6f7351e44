"""DICOMDIR (PS3.3 annex F): the list of files on a DICOM medium, such as a CD from a hospital."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.wording import counted

PATH = "path"  # of an image, relative to the archive's root
FILE_BYTES = "file_bytes"
FILE_VERSION = "file_version"  # see storage.FileEntry

_MAX_BYTES = 256 << 20
_IMAGE = "IMAGE"  # Directory Record Type (0004,1430)
_INACTIVE = 0  # Record In-use Flag (0004,1410)


def referenced_files(files: pa.Table, directory_uri: str, root_uri: str) -> tuple[pa.Table, list[str]]:
    """The images that a DICOMDIR references, with the columns of `files`, and notes.

    File names are compared regardless of case, because media are often copied to lower case. A referenced file that
    does not exist is listed nevertheless, and fails when it is read. References that lead out of the folder are
    counted and left out, as are objects that are not images.

    Args:
        files: all files of the folder, with PATH, schema.SOURCE_URI, FILE_BYTES and FILE_VERSION.

    Raises:
        UserError: the file is not a DICOMDIR, or references no image.
        StorageError: the file cannot be read.
    """
    skipped: Counter[str] = Counter()
    paths = _read(directory_uri, skipped)
    if not paths:
        raise UserError(
            f"{directory_uri}: expected references to images, got none: remove it to read all files in its folder"
        )
    by_path = {row[PATH]: row for row in files.to_pylist()}
    folded = {path.casefold(): path for path in by_path}
    rows: dict[str, dict[str, str | int]] = {}
    for path in paths:
        existing = path if path in by_path else folded.get(path.casefold())
        absent = {PATH: path, schema.SOURCE_URI: storage.join(root_uri, path), FILE_BYTES: 0, FILE_VERSION: ""}
        rows[existing or path] = by_path[existing] if existing else absent
    missing = len(rows.keys() - by_path.keys())
    note = f"DICOMDIR lists {counted(len(rows), 'image')}"
    note += f", {missing:,} of which do not exist" if missing else ""
    note += f"; files that it does not list are not read: {len(by_path) - len(rows) + missing:,}"
    skipped_note = ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()))
    notes = [note, *([f"skipped entries of DICOMDIR: {skipped_note}"] if skipped else [])]
    return pa.Table.from_pylist([row for _, row in sorted(rows.items())], files.schema), notes


def _read(uri: str, skipped: Counter[str]) -> list[str]:
    """Relative paths of the images that a DICOMDIR references, each once, in its order."""
    from pydicom import dcmread  # slow to import

    def check(head: bytes, size: int) -> None:
        if size > _MAX_BYTES:
            raise UserError(f"{uri}: expected a DICOMDIR of at most {_MAX_BYTES >> 20} MiB, got {size >> 20} MiB")

    data = storage.read_bytes(uri, check=check)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lower case and long names are common
            records = dcmread(io.BytesIO(data)).DirectoryRecordSequence or ()
            return list(dict.fromkeys(_image_paths(records, skipped)))
    except Exception as error:  # pydicom raises many kinds for damaged files
        raise UserError(
            f"{uri}: expected a DICOMDIR, got an error ({type(error).__name__}): repair it, or remove it to read all "
            f"files in its folder"
        ) from error


def _image_paths(records: Sequence, skipped: Counter[str]) -> Iterator[str]:
    """Relative paths of the images that active records reference."""
    for record in records:
        file_id = record.get("ReferencedFileID")
        if not file_id or record.get("RecordInUseFlag") == _INACTIVE:
            continue
        if record.get("DirectoryRecordType") != _IMAGE:
            skipped["not an image"] += 1
            continue
        path = "/".join([file_id] if isinstance(file_id, str) else file_id)
        if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            skipped["outside the folder"] += 1
        else:
            yield path
