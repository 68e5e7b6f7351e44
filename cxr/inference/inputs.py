"""The images that a program gives to a `Predictor`: files, bytes, arrays and data sets, or an archive."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data.decode import Content
from cxr.errors import UserError
from cxr.imaging.arrays import image_from_array
from cxr.sources.manifest import manifest_table

if TYPE_CHECKING:
    from pydicom import Dataset

OneImage: TypeAlias = Union[str, os.PathLike[str], bytes, bytearray, memoryview, np.ndarray, "Dataset"]
Images: TypeAlias = OneImage | Iterable[OneImage]

_KINDS = "a path or URI, the bytes of a file, a NumPy array or a pydicom Dataset"
_LISTS = (".csv", ".tsv", ".parquet")
_HELD_BYTES = 256 << 20  # of images in memory that are taken from an iterator before they are decoded
_DATASET_BYTES = 16 << 20  # assumed size of a pydicom Dataset


@dataclass(frozen=True)
class Chunk:
    """Some images: their rows of a manifest, and the content of those that are in memory."""

    manifest: pa.Table
    contents: list[Content | None]


@dataclass(frozen=True)
class _Entry:
    """An image: a file with this URI, or in memory, where it holds about so many bytes."""

    image_id: str
    uri: str | None = None
    content: Content | None = None
    size_bytes: int = 0


def archive_uri(images: Images) -> str | None:
    """The URI of an archive, if that is what was given: a folder, a container or a list of images.

    Raises:
        UserError: a path or URI that does not exist.
    """
    if not isinstance(images, (str, os.PathLike)):
        return None
    uri = storage.normalize(images)
    if storage.is_container(uri) or uri.lower().endswith(_LISTS):
        return uri
    if storage.is_local(uri) and "!" not in uri:
        if not Path(uri).exists():
            raise UserError(
                f"expected an image or an archive, got {images}, which does not exist: name a file or folder that "
                "does"
            )
        return uri if Path(uri).is_dir() else None
    return None if storage.exists(uri) else uri


def chunks(images: Images, most_rows: int) -> Iterator[Chunk]:
    """The images in order, at most `most_rows` at a time; an iterator is read only as far as needed.

    Image ids are the paths as they were given, or the number of the image, from 0, for images in memory.

    Raises:
        UserError: there is no image, or something is not an image.
    """
    rows: list[_Entry] = []
    number, held = -1, 0
    for number, image in enumerate(_each(images)):
        rows.append(_entry(image, number))
        held += rows[-1].size_bytes
        if len(rows) == most_rows or held >= _HELD_BYTES:
            yield _chunk(rows)
            rows, held = [], 0
    if rows:
        yield _chunk(rows)
    if number < 0:
        raise UserError(f"expected at least one image, got none: use {_KINDS}, or several of them")


def _each(images: Images) -> Iterable[OneImage]:
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray)) or _is_dataset(images):
        return [images]  # pyright: ignore[reportReturnType]
    if isinstance(images, Iterable):
        return images  # pyright: ignore[reportReturnType] (no Dataset)
    raise UserError(f"expected {_KINDS}, or several of them, got {_type_name(images)}: convert it")


def _entry(image: OneImage, number: int) -> _Entry:
    if isinstance(image, (str, os.PathLike)):
        return _Entry(os.fspath(image), uri=storage.normalize(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _Entry(str(number), content=partial(bytes, image), size_bytes=memoryview(image).nbytes)
    if isinstance(image, np.ndarray):
        return _Entry(str(number), content=partial(image_from_array, image), size_bytes=image.nbytes)
    if _is_dataset(image):
        from cxr.imaging.dicom import encode_dataset  # imports pydicom, as the caller has

        return _Entry(str(number), content=partial(encode_dataset, image), size_bytes=_DATASET_BYTES)
    raise UserError(f"image {number}: expected {_KINDS}, got {_type_name(image)}: convert it")


def _is_dataset(image: Any) -> TypeGuard[Dataset]:
    pydicom = sys.modules.get("pydicom")  # whoever has a Dataset has imported it
    return pydicom is not None and isinstance(image, pydicom.Dataset)


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _chunk(entries: Sequence[_Entry]) -> Chunk:
    columns = {
        schema.IMAGE_ID: pa.array([entry.image_id for entry in entries]),
        schema.SOURCE_URI: pa.array([entry.uri for entry in entries], pa.string()),
    }
    return Chunk(manifest_table(columns), [entry.content for entry in entries])
