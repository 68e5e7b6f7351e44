"""One split of an archive or of shards in memory: pictures of one size, labels, patients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cxr import schema, storage
from cxr.data import shards
from cxr.data.decode import make_rows
from cxr.data.sampling import Rows
from cxr.errors import UserError
from cxr.families.base import Recipe, unit_pixels
from cxr.families.compatibility import check_pixels
from cxr.families.image_crop import ImageCrop
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.options import ALL_IMAGES, ReadOptions

_BLOCK = 256  # rows at once


@dataclass(frozen=True)
class XRays:
    """Pictures, labels and patients; row i of each array belongs to image i."""

    pixels: np.ndarray  # (B, size, size) uint8
    labels: np.ndarray  # (B, findings) int8
    findings: tuple[str, ...]
    patients: np.ndarray  # (B,) ids; an image with an unknown patient counts as a patient of its own


def read(
    archive: str,
    split: str,
    recipe: Recipe,
    limit: int = 0,
    reading: ReadOptions = ALL_IMAGES,
    crop: ImageCrop | None = None,
) -> tuple[XRays, list[str]]:
    """Images of a split as `recipe` gets them in scoring, rounded to 8 bits, and notes on images left out.

    Args:
        limit: maximum number of images, spread evenly; 0 for all.
        crop: how images are cropped for `recipe`; None: no crop.

    Raises:
        UserError: there is no such archive, it contains latents, the split is empty, or stored images are smaller
            than `recipe` needs, or cropped or enhanced differently.
    """
    archive = storage.normalize(archive)
    if shards.is_shards(archive):
        info = shards.read_info(archive)
        check_pixels(info, recipe, crop)
        findings, pixels, total = info.findings, info.pixels, info.rows(split)
        chosen = spread(total, limit)
        blocks = stored_rows(info, split, chosen, [schema.IMAGE_ID, schema.PATIENT_ID, schema.PIXELS, schema.LABELS])
    else:
        manifest, pixels = open_manifest(archive, reading), PixelFormat(recipe.size)
        table = manifest.table.filter(pc.field(schema.SPLIT) == split)
        findings, total = manifest.findings, table.num_rows
        chosen = spread(total, limit)
        make = partial(make_rows, pixels=pixels, crop=crop and crop.loaded(), enhance=recipe.enhancement)
        blocks = _decoded(table.take(chosen), make)
    if not total:
        raise UserError(f"{archive} has no usable image in its {split} split: use another --split or archive")
    usable = (block.filter(pc.is_valid(block[schema.PIXELS])) for block in blocks)
    parts = [_part(rows, pixels, recipe.size, len(findings)) for rows in usable if rows.num_rows]
    if not parts:
        raise UserError(f"none of the {total} images of the {split} split of {archive} can be used")
    pictures, labels, patients = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    left_out = len(chosen) - len(pictures)
    notes = [f"{left_out} of {len(chosen)} images left out because they cannot be decoded"] if left_out else []
    return XRays(pictures, labels, findings, patients), notes


def spread(total: int, limit: int) -> np.ndarray:
    """The numbers of at most `limit` of `total` rows, spread evenly; all of them if `limit` is 0."""
    return np.arange(total) if not limit or limit >= total else np.linspace(0, total - 1, limit).astype(int)


def stored_rows(
    info: shards.ShardInfo, split: str, numbers: np.ndarray, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """The rows of a split with these increasing numbers; reads only the row groups that contain them."""
    rows, reader = Rows(shards.row_groups(info, split), numbers), storage.RowGroupReader()
    for group, inside_N in rows.by_group(np.arange(len(rows))):
        yield shards.read_rows(group, columns, info.findings, reader).take(inside_N)


def _decoded(table: pa.Table, make: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, _BLOCK):
        yield make(table.slice(start, _BLOCK))


def _part(rows: pa.Table, pixels: PixelFormat, size: int, findings: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, labels and patients of rows without an error."""
    stored = torch.from_numpy(schema.pixels_array(rows[schema.PIXELS], pixels).copy())
    pictures = unit_pixels({schema.PIXELS: stored}, size)[:, 0].mul(255).round().to(torch.uint8).numpy()
    unknown = [schema.UNKNOWN] * findings
    labels = np.array([known or unknown for known in rows[schema.LABELS].to_pylist()], np.int8)
    return pictures, labels.reshape(len(pictures), findings), patients_of(rows)


def patients_of(rows: pa.Table) -> np.ndarray:
    """(B,) ids, see `schema.patients_of`."""
    return schema.patients_of(rows).to_numpy().astype(str)
