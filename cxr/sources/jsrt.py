"""The JSRT database (Shiraishi et al. 2000) with the lungs of the SCR database (van Ginneken et al. 2006).

    JPCLN001.IMG … JPCLN154.IMG    chests with one lung nodule each, anywhere below the archive's root
    JPCNN001.IMG … JPCNN093.IMG    chests without one
    masks/left lung/JPCLN001.gif, masks/right lung/JPCLN001.gif …   1024 x 1024, also below fold1/ and fold2/

The images are 2048 x 2048 pixels of .175 mm without a header (`imaging.raster.inspect_jsrt`); copies as PNG, of any
size, count as well. One image a patient; the splits follow from the image's name by a hash, since SCR's two folds
are for cross-validation. Hearts, clavicles, landmarks and the list of the nodules' places are not read.
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

name = "jsrt"

FINDING = "Nodule"
NODULE, NO_NODULE = "JPCLN", "JPCNN"  # with which the images' names begin
MASKS, SIDES = "masks", ("left lung", "right lung")
FRAME_PX, SPACING_MM = 2048, 0.175

_KNOWN = (  # the first image of a kind, or a folder of the two databases as they are unpacked
    *(f"{kind}001.{suffix}" for kind in (NODULE, NO_NODULE) for suffix in ("IMG", "png", "jpg")),
    "All247images",
    *(f"{folder}{MASKS}/{SIDES[0]}" for folder in ("", "fold1/", "scratch/fold1/")),
)
_NAME = re.compile(rf"({NODULE}|{NO_NODULE})\d+", re.IGNORECASE)


def detect(uri: str) -> bool:
    """Whether one of a few known files and folders is there."""
    return any(storage.exists(storage.join(uri, path)) for path in _KNOWN)


def manifest(uri: str) -> Manifest:
    """Every image with a name of the database; masks null for those without both lungs, which a note counts.

    Raises:
        UserError: there is none.
    """
    files, notes = list_images(uri)
    paths = files[PATH].to_pylist()
    found = [None if MASKS in _folders(path) else _name(path) for path in paths]
    images = files.filter(pa.array([each is not None for each in found]))
    if not images.num_rows:
        wanted = f"{NODULE}001.IMG … {NO_NODULE}093.IMG"
        raise UserError(f"no image {wanted} lies in {uri}: put them there, or choose the source folder")
    stems = [each for each in found if each]
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
    """`masks` of each image; null unless both lungs are there: one alone would be a wrong mask."""
    lungs: dict[tuple[str, str], str] = {}
    for path, uri in zip(files[PATH].to_pylist(), files[schema.SOURCE_URI].to_pylist(), strict=True):
        if side := _side(path):
            lungs.setdefault((_name(path) or "", side), uri)
    pairs = ([lungs.get((stem, side)) for side in SIDES] for stem in stems)
    masks = [[_mask(uri) for uri in pair] if all(pair) else None for pair in pairs]
    return pa.array(masks, schema.MANIFEST.field(schema.MASKS).type)


def _name(path: str) -> str | None:
    """The name in the database of an image or its mask; None for other files."""
    key = image_key(path)
    return key.upper() if _NAME.fullmatch(key) else None


def _folders(path: str) -> list[str]:
    return path.lower().split("/")[:-1]


def _side(path: str) -> str | None:
    """Which lung a file is the mask of; None for other files."""
    *_, parent, side = ["", "", *_folders(path)]
    return side if parent == MASKS and side in SIDES and _name(path) else None


def _mask(uri: str | None) -> dict[str, str | None]:
    return {schema.LABEL: schema.LUNGS, schema.MASK_RLE: None, schema.MASK_URI: uri}


def _notes(paths: Sequence[str], images: int, without_masks: int) -> list[str]:
    others = sum(_side(path) is None for path in paths) - images
    notes = [f"{others:,} files are neither named as the database's images nor masks of lungs"] if others else []
    return [*notes, f"{without_masks:,} of {images:,} images have no lung masks here"] if without_masks else notes
