"""Masks that a user gives beside an archive (`--masks`): a folder of pictures, COCO JSON, or a CSV of run lengths.

    folder      PNG, GIF or JPEG files named like their images, perhaps with an ending such as "_mask". The label
                is `--mask-label`, or the name of the folder in which a mask is. A label may have several folders,
                such as leftMask and rightMask, whose masks are united; an image needs a mask in each of them.
    COCO JSON   see `coco`. Labels are its categories; an image without annotations has empty masks.
    CSV         ImageId, EncodedPixels: a row for each piece of a mask of `--mask-label`, "-1" or blank for none.
                There may be columns for the label (class_name), and the height and width that the code is for. A
                row with neither label nor code means that the image shows none of the labels.
    CheXmask    Gaggion et al. 2024 (https://physionet.org/content/chexmask-cxr-segmentation-data): Left Lung, Right
                Lung, Heart (absolute codes along rows, as its repository CheXmask-Database decodes them), Height,
                Width, and Dice RCA (Mean), the estimated quality; its data dictionary recommends to use masks with
                at least .7. The images are in a column Image Index, image_id, dicom_id, ImageID or Path, as in the
                list of the data set.

Left and right lung together are `schema.LUNGS`.
"""

from __future__ import annotations

import csv as python_csv
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import csv

from cxr import schema, storage
from cxr.errors import ImageRejectedError, UserError
from cxr.sources import coco, rle
from cxr.sources.annotations import side_px
from cxr.sources.coco import Coco
from cxr.sources.image_files import IMAGE_SUFFIXES
from cxr.sources.image_match import image_paths
from cxr.sources.label_rows import word_key
from cxr.sources.options import MaskCode
from cxr.sources.rle import Form
from cxr.storage import FileEntry
from cxr.wording import counted

QUALITY, LEFT, RIGHT, HEART = "Dice RCA (Mean)", "Left Lung", "Right Lung", "Heart"
_IMAGE_COLUMNS = ("imageid", "imageindex", "dicomid", "path", "image", "filename", "id")  # by `word_key`
_CODE_COLUMNS = ("encodedpixels", "rle", "maskrle", "code")
_LABEL_COLUMNS = ("classname", "label", "finding", "class")
_LUNG_WORDS = frozenset(
    ("lung", "lungs", "leftlung", "rightlung", "leftmask", "rightmask", "lungmask", "lungmasks", "lungfields")
)
_PICTURES = frozenset((".png", ".gif", ".jpg", ".jpeg"))
_IMAGES = frozenset(f".{suffix}" for suffix in IMAGE_SUFFIXES)
_KNOWN_LABELS = {word_key(name): name for name in (schema.PNEUMOTHORAX, HEART)} | dict.fromkeys(
    _LUNG_WORDS, schema.LUNGS
)
_HALVES = ("left", "right")  # folders of a mask's halves, if the label is given
_ENDINGS = ("_mask", "-mask", "_masks", "_seg", "_segmentation", "_label")
_BLOCK_BYTES = 1 << 24  # of CSV; a row may not be longer
_GZIP_MAGIC = b"\x1f\x8b"

Mask = dict[str, Any]  # an item of schema.MASK_SOURCE_TYPE


@dataclass(frozen=True)
class MaskList:
    """Masks by `image_match.image_paths`, as far as they are known: an image may lack some of the labels."""

    labels: tuple[str, ...]
    masks: Mapping[str, Sequence[Mask]]
    notes: Sequence[str]


def read_masks(
    uri: str, images: Collection[str], *, label: str = "", form: MaskCode = "auto", quality: float = 0.7
) -> MaskList:
    """List masks in one of the formats above; no picture is opened, and no code decoded.

    Args:
        images: `image_key` of the archive's images; other rows of a table are not read.
        label: label of masks whose format does not name it.
        form: of run lengths in a CSV file. auto: absolute along columns if all runs are in order then, else relative.
        quality: least `QUALITY` of CheXmask's masks.

    Raises:
        UserError: there are no masks, the format is none of these, or a label or form is unknown.
        StorageError: the URI cannot be read.
    """
    files = list(storage.list_files(uri))
    if [file.uri for file in files] != [uri]:
        return _from_folder(uri, files, images, label)
    if coco.is_json(uri):
        return _from_coco(coco.read_coco(uri))
    table = _CodeTable(uri)
    if {word_key(name) for name in (QUALITY, LEFT, RIGHT, HEART)} <= table.columns.keys():
        return _from_chexmask(table, images, quality)
    return _from_codes(table, images, label, form)


# ---- Pictures


def _from_folder(uri: str, files: Sequence[FileEntry], images: Collection[str], label: str) -> MaskList:
    pictures = [file for file in sorted(files, key=lambda file: file.path) if _suffix(file) in _PICTURES]
    others = Counter(suffix for file in files if (suffix := _suffix(file)) not in _PICTURES)
    unsupported = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()) if suffix in _IMAGES)
    if not pictures and unsupported:
        raise UserError(f"expected masks as PNG, GIF or JPEG files in {uri}, got {unsupported}: convert them to PNG")
    if not pictures:
        raise UserError(
            f"expected masks as PNG, GIF or JPEG files in {uri}, got none: use the folder that contains them"
        )
    if not label and (alone := sum("/" not in file.path for file in pictures)):
        raise UserError(
            f"expected masks in folders named like their labels, got {counted(alone, 'mask')} in {uri} itself: say "
            f"what they show with --mask-label"
        )
    places = [_place(file.path, label) for file in pictures]
    names = image_paths(pa.array([name for _, name in places], pa.string())).to_pylist()
    of_folder: dict[str, dict[str, str]] = defaultdict(dict)  # name of the folder -> image -> URI
    shared = 0
    for file, (folder, _), name in zip(pictures, places, names, strict=True):
        shared += of_folder[folder].setdefault(_without_ending(name, images), file.uri) != file.uri
    folders: dict[str, list[str]] = defaultdict(list)
    for folder in of_folder:
        folders[label or mask_label(folder)].append(folder)
    masks: dict[str, list[Mask]] = defaultdict(list)
    incomplete: set[str] = set()
    for each, parts in folders.items():
        for image in dict.fromkeys(image for part in parts for image in of_folder[part]):
            uris = [of_folder[part][image] for part in parts if image in of_folder[part]]
            if len(uris) == len(parts) or label:
                masks[image] += [{schema.LABEL: each, schema.MASK_URI: uri} for uri in uris]
            else:
                incomplete.add(image)
    notes = []
    if unsupported:
        notes.append(f"masks not used, because they are not PNG, GIF or JPEG files: {unsupported}")
    if incomplete:
        parts = " and ".join(part for parts in folders.values() if len(parts) > 1 for part in parts)
        notes.append(
            f"masks not used, because an image needs one in each of {parts}: {counted(len(incomplete), 'image')}"
        )
    if shared:
        notes.append(f"masks not used, because another one in the folder is of the same image: {shared:,}")
    return MaskList(tuple(folders), masks, notes)


def _suffix(file: FileEntry) -> str:
    """The extension of a file's name, such as ".png"."""
    _, dot, suffix = file.path.rpartition("/")[2].rpartition(".")
    return dot + suffix.lower()


def _place(path: str, label: str) -> tuple[str, str]:
    """The folder that names the label of a mask, and the path without it: "a/lungs/b.png" -> "lungs", "a/b.png".

    With a given label, other folders than those of known labels or halves, such as that of a patient, belong to the
    path of the image; the first value is then "".
    """
    folders, slash, name = path.rpartition("/")
    outer, outer_slash, folder = folders.rpartition("/")
    if not slash or (label and word_key(folder) not in (*_KNOWN_LABELS, *_HALVES)):
        return "", path
    return folder, f"{outer}{outer_slash}{name}"


def mask_label(word: str) -> str:
    """The label of masks named so: `schema.LUNGS` for a lung or both, the name of a known label, or the word."""
    return _KNOWN_LABELS.get(word_key(word), word.strip())


def _without_ending(name: str, images: Collection[str]) -> str:
    """The image's name, where a mask's name has an ending such as "_mask"."""
    key = name.rpartition("/")[2]
    for ending in _ENDINGS if key not in images else ():
        if key.lower().endswith(ending) and key[: -len(ending)] in images:
            return name[: -len(ending)]
    return name


# ---- COCO


def _from_coco(content: Coco) -> MaskList:
    """Every listed image has a mask of each label, which is empty where it has no annotation."""
    labels = tuple(dict.fromkeys(map(mask_label, content.labels)))
    masks: dict[str, dict[str, list[Mask]]] = {image: {label: [] for label in labels} for image in content.sizes_px}
    for annotation in content.annotations:
        code, form, size = coco.mask_code(content, annotation)
        label = mask_label(annotation.label)
        masks[annotation.image][label].append(_coded(label, code, form, size))
    return MaskList(
        labels,
        {
            image: [mask for label, drawn in of_image.items() for mask in drawn or [_coded(label, rle.EMPTY)]]
            for image, of_image in masks.items()
        },
        content.notes,
    )


def _coded(label: str, code: str, form: Form = "relative", size: Sequence[int] | None = None) -> Mask:
    height, width = size or (None, None)
    return {
        schema.LABEL: label,
        schema.MASK_RLE: code,
        schema.MASK_FORM: form,
        schema.MASK_HEIGHT_PX: height,
        schema.MASK_WIDTH_PX: width,
    }


# ---- CSV


class _CodeTable:
    """A CSV file of codes, of which only the rows of an archive's images are held.

    Raises:
        UserError: the file has no header, or no column of images.
        StorageError: the file cannot be read.
    """

    def __init__(self, location: str) -> None:
        self.location, self._data = location, storage.read_bytes(location)
        try:
            head = self._stream().read(1 << 16).decode("utf-8-sig", "replace")
            names = next(python_csv.reader([head.partition("\n")[0]]), [])
        except (OSError, python_csv.Error):
            names = []
        self.columns = {word_key(name): number for number, name in reversed([*enumerate(names)])}
        """Number of each column by `word_key` of its name."""
        self.image = self.find(_IMAGE_COLUMNS)
        if self.image is None:
            raise UserError(
                f"{location}: expected masks as COCO JSON or as CSV with the columns ImageId, EncodedPixels, or "
                f"those of CheXmask, got {', '.join(names)[:200] or 'no header'}: convert the file to one of these"
            )

    def find(self, names: Sequence[str]) -> int | None:
        """The number of the first of these columns that the file has."""
        return next((self.columns[name] for name in names if name in self.columns), None)

    def rows(self, images: Collection[str], columns: Sequence[int]) -> Iterator[tuple[int, str, Sequence[str]]]:
        """Number in the file, name and values of each row; without the values if `images` lack the `image_key`."""
        names = [f"f{number}" for number in dict.fromkeys((self.image, *columns))]
        options = (
            csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, autogenerate_column_names=True),
            csv.ParseOptions(newlines_in_values=True),  # in CheXmask's landmarks
            csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string())),
        )
        row = 1
        try:
            for batch in csv.open_csv(self._stream(), *options):
                for at, name in enumerate(image_paths(batch[names[0]]).to_pylist()):
                    if row > 1:
                        known = name.rpartition("/")[2] in images
                        yield row, name, [batch[f"f{n}"][at].as_py().strip() for n in columns] if known else ()
                    row += 1
        except pa.ArrowInvalid as error:  # whose message may contain the row
            fields = re.search(r"Expected (\d+) columns, got (\d+)", str(error))
            got = f"{fields[2]} fields after row {row}" if fields else f"a damaged file after row {row}"
            expected = f"{fields[1]} fields in each row" if fields else "rows of UTF-8 text"
            raise UserError(f"{self.location}: expected {expected}, got {got}: repair the file") from None

    def error(self, row: int, expected: str, got: str) -> UserError:
        """The error to raise for an invalid value in a row, numbered from 1, the header."""
        return UserError(f"{self.location}, row {row}: expected {expected}, got {got[:60]!r}: correct the row")

    def _stream(self) -> pa.NativeFile:
        stream = pa.BufferReader(self._data)
        return pa.CompressedInputStream(stream, "gzip") if self._data.startswith(_GZIP_MAGIC) else stream


def _from_codes(table: _CodeTable, images: Collection[str], label: str, form: MaskCode) -> MaskList:
    code, word = table.find(_CODE_COLUMNS), table.find(_LABEL_COLUMNS)
    if code is None or (word is None and not label):
        missing = "EncodedPixels" if code is None else "class_name, or --mask-label"
        raise UserError(f"{table.location}: expected a column {missing}, got none: add it")
    sides = [table.columns[name] for name in ("height", "width") if name in table.columns]
    sized = len(sides) == 2
    columns = [code, *([] if word is None else [word]), *(sides if sized else [])]
    masks: dict[str, dict[str, list[Mask]]] = {}
    without_any: list[str] = []  # images
    in_order: Counter[bool | None] = Counter()
    for row, image, values in table.rows(images, columns):
        of_image = masks.setdefault(image, {})
        if not values:
            continue
        text, *rest = values
        name = mask_label(rest.pop(0)) if word is not None else ""
        if not (label or name):
            if text not in rle.NO_MASK:
                raise table.error(row, "a label for this mask", "")
            without_any.append(image)
            continue
        of_label = of_image.setdefault(label or name, [])
        if text in rle.NO_MASK:
            continue
        try:
            in_order[rle.has_absolute_order(text)] += 1
        except ImageRejectedError:
            raise table.error(row, "pairs of a position and a length, or -1 for an empty mask", text) from None
        of_label.append(_coded(label or name, text, size=_size(table, row, rest) if sized else None))
    labels = dict.fromkeys(name for of_image in masks.values() for name in of_image)
    if without_any and not labels:
        raise UserError(
            f"{table.location}: expected a label in some row, got none: add them, or say what the masks show with "
            f"--mask-label"
        )
    for image in without_any:
        masks[image] |= {name: masks[image].get(name, []) for name in labels}
    chosen = _chosen_form(table.location, in_order) if form == "auto" else form
    for of_image in masks.values():
        for name, pieces in of_image.items():
            for piece in pieces:
                piece[schema.MASK_FORM] = chosen
            of_image[name] = pieces or [_coded(name, rle.EMPTY)]
    united = {image: [mask for pieces in of_image.values() for mask in pieces] for image, of_image in masks.items()}
    return MaskList(tuple(labels), united, [f"mask codes in {storage.name(table.location)} are read as {chosen}"])


def _chosen_form(location: str, in_order: Counter[bool | None]) -> Form:
    """The form of codes, by how many of them have their runs in order if read as absolute.

    Raises:
        UserError: that does not decide it.
    """
    if in_order[True] and not in_order[False]:
        return "absolute"
    if in_order[False] > in_order[True]:
        return "relative"
    if not in_order.total():
        return "relative"  # all masks are empty
    raise UserError(
        f"{location}: cannot tell whether positions are relative or absolute: read as absolute, {in_order[True]:,} "
        f"masks have their runs in order, {in_order[False]:,} do not, and {in_order[None]:,} have a single run: say "
        "which with --mask-code"
    )


def _from_chexmask(table: _CodeTable, images: Collection[str], least: float) -> MaskList:
    names = (QUALITY, LEFT, RIGHT, HEART, "Height", "Width")
    columns = [table.columns.get(word_key(name)) for name in names]
    if None in columns:
        missing = ", ".join(name for name, column in zip(names, columns, strict=True) if column is None)
        raise UserError(f"{table.location}: expected the columns {', '.join(names)}, got a table without {missing}")
    masks: dict[str, list[Mask]] = {}
    poor = 0
    for row, image, values in table.rows(images, [column for column in columns if column is not None]):
        of_image = masks.setdefault(image, [])
        if not values:
            continue
        quality, left, right, heart, *sides = values
        try:
            if not float(quality or "nan") >= least:
                poor += 1
                continue
        except ValueError:
            raise table.error(row, f"a number in {QUALITY}", quality) from None
        size = _size(table, row, sides)
        lungs = [(schema.LUNGS, left), (schema.LUNGS, right)] if left and right else []  # one lung is a wrong mask
        of_image += [_coded(label, code, "absolute-rows", size) for label, code in (*lungs, (HEART, heart)) if code]
    notes = (
        [f"masks of lower quality ({QUALITY} below {least:g}), not used: {counted(poor, 'image')}"] if poor else []
    )
    return MaskList((schema.LUNGS, HEART), masks, notes)


def _size(table: _CodeTable, row: int, sides: Sequence[str]) -> list[int]:
    """[height, width] in pixels."""
    height, width = map(side_px, sides)
    if height is None or width is None:
        raise table.error(row, "the height and width of the mask in pixels", ", ".join(sides))
    return [height, width]
