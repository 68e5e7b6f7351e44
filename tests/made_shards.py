"""Small shards made in a moment, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data.shard_index import write_index
from cxr.data.shards import ARCHIVE_FILE, KIND
from cxr.imaging.geometry import ResizeTransform
from cxr.schema import PixelFormat


def chest_like(rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8 (size, size): two dark ellipses on a bright body, shifted a little."""
    image = np.full((size, size), 180, np.uint8)
    x, y = rng.uniform(-0.06, 0.06, 2) * size
    for side in (-1, 1):
        center = (int(size * (0.5 + side * 0.18) + x), int(size * 0.5 + y))
        cv2.ellipse(image, center, (int(size * 0.13), int(size * 0.3)), 0, 0, 360, 60, -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


Known = Callable[[str, int], Mapping[str, object]]


def nothing_known(split: str, number: int) -> Mapping[str, object]:
    return {}


def write_shards(
    folder: Path,
    counts: dict[str, int],
    *,
    size: int = 32,
    row_group_rows: int = 8,
    part_rows: int = 20,
    known: Known = nothing_known,
    findings: tuple[str, ...] = schema.FINDINGS,
) -> str:
    """Shards of `counts` images a split; an image's first pixel is its number in the split.

    Args:
        known: more columns of the image of a split with a number.
    """
    rng = np.random.default_rng(0)
    pixels = PixelFormat(size)
    parts: dict[str, list[dict[str, object]]] = {}
    for split, count in counts.items():
        parts[split] = []
        for number, start in enumerate(range(0, count, part_rows)):
            rows = _rows(split, range(start, min(count, start + part_rows)), pixels, rng, known)
            path = f"{split}/part-{number:05d}.parquet"
            (folder / split).mkdir(parents=True, exist_ok=True)
            pq.write_table(rows, folder / path, row_group_size=row_group_rows)
            parts[split].append({"path": path, "rows": rows.num_rows})
    about = {
        "kind": KIND,
        "version": 1,
        "source": "made",
        "archive": "",
        "findings": list(findings),
        "pixels": {"size": size, "bits": 8},
        "row_group_rows": row_group_rows,
        "parts": parts,
        "rejects": 0,
    }
    finish_shards(folder, about)
    return str(folder)


def finish_shards(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the index of shard files, and `archive.json`."""
    paths = [part["path"] for listed in about["parts"].values() for part in listed]
    write_index(str(folder), ((path, storage.read_parquet(str(folder / path))) for path in paths))
    storage.write_json(str(folder / ARCHIVE_FILE), about)


def _rows(split: str, numbers: range, pixels: PixelFormat, rng: np.random.Generator, known: Known) -> pa.Table:
    images = [chest_like(rng, pixels.size) for _ in numbers]
    for number, image in zip(numbers, images, strict=True):
        image[0, 0] = number % 256
    given = {
        schema.IMAGE_ID: [f"{split}-{number:04d}.png" for number in numbers],
        schema.SPLIT: [split] * len(images),
        schema.PIXELS: [image.tobytes() for image in images],
        schema.HEIGHT_PX: [pixels.size] * len(images),
        schema.WIDTH_PX: [pixels.size] * len(images),
        schema.RESIZE_TRANSFORM: [ResizeTransform().as_dict()] * len(images),
    }
    for name in known(split, 0):
        given[name] = [known(split, number)[name] for number in numbers]
    wanted = schema.row_schema(pixels)
    columns = [pa.array(given.get(field.name, [None] * len(images)), field.type) for field in wanted]
    return pa.table(columns, schema=wanted)
