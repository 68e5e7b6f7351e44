"""COCO JSON (Lin et al. 2014, https://cocodataset.org/#format-data): boxes and masks of a data set in one file.

    {"images": [{"id": 1, "file_name": "a.png", "width": 2048, "height": 2500}, …],
     "categories": [{"id": 1, "name": "Fracture"}, …],
     "annotations": [{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "segmentation": …}, …]}

Boxes and masks refer to an image of the size that its entry gives or, without one, to the image file. An image
without annotations shows none of the categories. `segmentation` is a list of polygons, or an object with `size`
[height, width] and `counts`: the lengths of runs of zeros and ones in turn, along columns, as a list or compressed to
text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement, rle
from cxr.sources.annotations import NO_FINDING_WORDS
from cxr.sources.image_match import image_paths
from cxr.sources.label_rows import word_key
from cxr.wording import counted

_LARGEST_PX = 65_535
_SHOWN = 60  # characters of a value in an error message


@dataclass(frozen=True)
class Annotation:
    """One entry of `annotations`."""

    image: str  # its `image_match.image_paths`
    label: str
    position: int  # in the file's list, from 0
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Coco:
    """The contents of a file; images by `image_match.image_paths` of their file_name."""

    location: str
    labels: tuple[str, ...]  # in the order of `categories`
    sizes_px: Mapping[str, list[int] | None]  # [height, width] of each listed image
    annotations: Sequence[Annotation]
    notes: Sequence[str]

    def error(self, annotation: Annotation, expected: str, got: object) -> UserError:
        """The error to raise for an invalid annotation."""
        return _error(self.location, f"annotations[{annotation.position}]", expected, got)


def is_json(location: str) -> bool:
    """Whether a file begins like a JSON object or list, in whatever encoding of Unicode."""
    return storage.read_bytes(location).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")[:1] in (b"{", b"[")


def read_coco(location: str) -> Coco:
    """Read a COCO JSON file, without looking into boxes and masks.

    Categories such as "No finding" are no labels, and their annotations are ignored.

    Raises:
        UserError: the file is not such JSON; the message names the entry.
        StorageError: the file cannot be read.
    """
    try:
        content = json.loads(storage.read_bytes(location))
    except (ValueError, RecursionError) as error:  # also text in another encoding
        reason = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise UserError(f"{location}: expected COCO JSON, got an error at {reason}: repair the file") from None
    images, categories, annotations = (_entries(location, content, name) for name in _LISTS)
    names: dict[Any, str | None] = {}
    for number, category in enumerate(categories):
        name = category.get("name")
        if not isinstance(name, str) or not word_key(name) or not name.isprintable():
            raise _error(location, f"categories[{number}]", "a name", name)
        names[_id(location, f"categories[{number}]", category, "id")] = (
            None if word_key(name) in NO_FINDING_WORDS else name.strip()
        )
    keys: dict[Any, str] = {}
    sizes: dict[str, list[int] | None] = {}
    file_names = pa.array([_text(image.get("file_name")) for image in images], pa.string())
    for number, (image, key) in enumerate(zip(images, image_paths(file_names).to_pylist(), strict=True)):
        place = f"images[{number}]"
        if not key or key.endswith("/"):
            raise _error(location, place, "a file_name", image.get("file_name"))
        size = _size(location, place, image)
        if sizes.setdefault(key, size) != size:
            raise _error(location, place, f"the size of the other entry of {key!r}", size)
        keys[_id(location, place, image, "id")] = key
    read: list[Annotation] = []
    for number, annotation in enumerate(annotations):
        place = f"annotations[{number}]"
        of_image, of_category = (_id(location, place, annotation, name) for name in ("image_id", "category_id"))
        if of_image not in keys:
            raise _error(location, place, "an image_id that is listed in images", of_image)
        if of_category not in names:
            raise _error(location, place, "a category_id that is listed in categories", of_category)
        if label := names[of_category]:
            read.append(Annotation(keys[of_image], label, number, annotation))
    shared = len(keys) - len(sizes)
    notes = [f"entries of images with the same file name, used as one: {counted(shared, 'entry', 'entries')}"]
    return Coco(location, tuple(dict.fromkeys(filter(None, names.values()))), sizes, read, notes if shared else [])


def boxes(coco: Coco) -> dict[str, list[dict[str, Any]]]:
    """The boxes (schema.BOX_TYPE) of each listed image, in pixels of its size.

    Raises:
        UserError: an annotation has no valid bbox.
    """
    result: dict[str, list[dict[str, Any]]] = {image: [] for image in coco.sizes_px}
    for annotation in coco.annotations:
        bbox = annotation.values.get("bbox")
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
            raise coco.error(annotation, "a bbox of four numbers, [x, y, width, height]", bbox)
        x, y, width, height = map(float, bbox)
        corners = dict(zip(rater_agreement.CORNERS, (x, y, x + width, y + height), strict=True))
        result[annotation.image].append({schema.LABEL: annotation.label, schema.READER: None, **corners})
    return result


def mask_code(coco: Coco, annotation: Annotation) -> tuple[str, rle.Form, list[int] | None]:
    """The code of an annotation's mask, its form, and the [height, width] that it is for, if known.

    Raises:
        UserError: it has no valid segmentation.
    """
    segmentation = annotation.values.get("segmentation")
    if isinstance(segmentation, list) and segmentation and all(map(_is_polygon, segmentation)):
        code = ";".join(" ".join(f"{number:g}" for number in polygon) for polygon in segmentation)
        return code, "polygon", coco.sizes_px[annotation.image]
    if not isinstance(segmentation, dict):
        raise coco.error(annotation, "a segmentation as polygons or run lengths", segmentation)
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(_is_side(side) for side in size):
        raise coco.error(annotation, "a segmentation with size [height, width]", size)
    try:
        counts = rle.uncompressed(counts) if isinstance(counts, str) else counts
    except ValueError:
        raise coco.error(annotation, "a segmentation with valid counts", counts) from None
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise coco.error(annotation, "a segmentation with counts", counts)
    if sum(counts) != int(size[0]) * int(size[1]):
        raise coco.error(annotation, f"counts that add up to {size[0]} x {size[1]} pixels", sum(counts))
    return rle.from_counts(counts), "relative", [int(side) for side in size]


def _is_polygon(value: object) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(_is_number, value))


def _is_side(value: object) -> bool:
    return _is_number(value) and 1 <= value <= _LARGEST_PX and value == int(value)


_LISTS = ("images", "categories", "annotations")


def _entries(location: str, content: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise _error(location, "its content", f"an object with the lists {', '.join(_LISTS)}", got)
    for number, entry in enumerate(content[name]):
        if not isinstance(entry, dict):
            raise _error(location, f"{name}[{number}]", "an object", entry)
    return content[name]


def _id(location: str, place: str, entry: Mapping[str, Any], name: str) -> int | str:
    """An id; published files have numbers, and some tools write text."""
    value = entry.get(name)
    if not isinstance(value, (int, str)):
        raise _error(location, place, f"a number or text as {name}", value)
    return value


def _size(location: str, place: str, image: Mapping[str, Any]) -> list[int] | None:
    sides: list[Any] = [image.get("height"), image.get("width")]
    if sides == [None, None]:
        return None
    if not all(map(_is_side, sides)):
        raise _error(location, place, f"height and width from 1 to {_LARGEST_PX:,} pixels", sides)
    return [int(side) for side in sides]


def _text(value: object) -> str:
    """Text without halves of surrogate pairs, which JSON may contain; "" for other values."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _error(location: str, place: str, expected: str, got: object) -> UserError:
    text = repr(got)
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return UserError(
        f"{location}, {place}: expected {expected}, got {shown}: correct this entry, or export the file again"
    )
