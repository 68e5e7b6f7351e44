"""The JSRT database (Shiraishi et al. 2000) with the lung masks of the SCR database (van Ginneken et al. 2006).

    JPCLN001.IMG … JPCLN154.IMG    one lung nodule each; anywhere below the archive's root
    JPCNN001.IMG … JPCNN093.IMG    no nodule
    masks/left lung/JPCLN001.gif, masks/right lung/JPCLN001.gif …   1024 x 1024, also below fold1/ and fold2/

The images are 2048 x 2048 pixels of .175 mm without a header (`imaging.png_jpeg.inspect_jsrt`); PNG copies of any
size are accepted as well. There is one image per patient; splits are a hash of the image's name, because SCR's two
folds are for cross-validation. Heart and clavicle masks, landmarks and nodule positions are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.image_files import PATH, image_ids, image_key, list_images
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient
from cxr.wording import counted

name = "jsrt"

FINDING = "Nodule"
NODULE, NO_NODULE = "JPCLN", "JPCNN"  # prefixes of the image names
MASKS, SIDES = "masks", ("left lung", "right lung")
FRAME_PX, SPACING_MM = 2048, 0.175

_KNOWN = (  # the first image of each kind, or a folder of the unpacked databases
    *(f"{kind}001.{suffix}" for kind in (NODULE, NO_NODULE) for suffix in ("IMG", "png", "jpg")),
    "All247images",
    *(f"{folder}{MASKS}/{SIDES[0]}" for folder in ("", "fold1/", "scratch/fold1/")),
)
_NAME = re.compile(rf"({NODULE}|{NO_NODULE})\d+", re.IGNORECASE)


def detect(uri: str) -> bool:
    """Whether one of a few known files and folders exists."""
    return any(storage.exists(storage.join(uri, path)) for path in _KNOWN)


def manifest(uri: str) -> Manifest:
    """List every image with a name of the database; masks are null unless both lungs exist, which a note counts.

    Raises:
        UserError: there are no such images.
    """
    files, notes = list_images(uri)
    paths = files[PATH].to_pylist()
    matched = [None if MASKS in _folders(path) else _name(path) for path in paths]
    images = files.filter(pa.array([each is not None for each in matched]))
    if not images.num_rows:
        names = f"{NODULE}001.IMG … {NO_NODULE}093.IMG"
        raise UserError(f"expected images named {names} in {uri}, got none: add them, or use --source folder")
    stems = [each for each in matched if each]
    masks = _masks(files, stems)
    names = pa.array([path.rpartition("/")[2] for path in images[PATH].to_pylist()], pa.string())
    ids, id_notes = image_ids(images[PATH].combine_chunks(), names)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: pa.array(stems, pa.string()),
        schema.SPLIT: split_by_patient(pa.array(stems, pa.string())),
        schema.SOURCE_URI: images[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.array([[stem.startswith(NODULE)] for stem in stems], np.int8)),
        schema.MASKS: masks,
        schema.SPACING_MM: pa.array([[SPACING_MM] * 2] * len(stems), schema.MANIFEST.field(schema.SPACING_MM).type),
    }
    notes += [*_notes(paths, len(stems), masks.null_count), *id_notes]
    return Manifest(manifest_table(columns, FRAME_PX), (FINDING,), notes)


def _masks(files: pa.Table, stems: Iterable[str]) -> pa.Array:
    """Column `masks`; null unless both lungs exist, because one alone would be a wrong mask."""
    lungs: dict[tuple[str, str], str] = {}
    for path, uri in zip(files[PATH].to_pylist(), files[schema.SOURCE_URI].to_pylist(), strict=True):
        if side := _side(path):
            lungs.setdefault((_name(path) or "", side), uri)
    pairs = ([lungs.get((stem, side)) for side in SIDES] for stem in stems)
    masks = [[_mask(uri) for uri in pair] if all(pair) else None for pair in pairs]
    return pa.array(masks, schema.MANIFEST.field(schema.MASKS).type)


def _name(path: str) -> str | None:
    """The database's name of an image or its mask; None for other files."""
    key = image_key(path)
    return key.upper() if _NAME.fullmatch(key) else None


def _folders(path: str) -> list[str]:
    return path.lower().split("/")[:-1]


def _side(path: str) -> str | None:
    """The lung of which a file is the mask; None for other files."""
    *_, parent, side = ["", "", *_folders(path)]
    return side if parent == MASKS and side in SIDES and _name(path) else None


def _mask(uri: str | None) -> dict[str, str | None]:
    return {schema.LABEL: schema.LUNGS, schema.MASK_RLE: None, schema.MASK_URI: uri}


def _notes(paths: Sequence[str], images: int, without_masks: int) -> list[str]:
    skipped = sum(_side(path) is None for path in paths) - images
    notes = [f"skipped files that are neither images of the database nor lung masks: {skipped:,}"] if skipped else []
    return (
        [*notes, f"without lung masks: {without_masks:,} of {counted(images, 'image')}"] if without_masks else notes
    )
