"""Measure how fast boxes are extracted from heat maps in each threshold mode, on one core.

cxr benchmark map-boxes --out runs/benchmark_map_boxes
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, get_args

import cv2
import numpy as np

from cxr import schema, storage
from cxr.boxes.from_heatmaps import FULL, BoxRule, ThresholdMode, boxes_of
from cxr.errors import UserError
from cxr.reporting.tables import markdown

PEAKS = 3  # maximum number of peaks per map


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_map_boxes"
    """Folder or URI of the results: OUT/map_boxes.md."""
    images: int = 500
    """Number of images."""
    findings: int = len(schema.FINDINGS)
    """Number of maps per image."""
    cells: int = 64
    """Height and width of a map in cells. With the default map_stride of 4, an image of 256 px has 64 x 64 cells."""
    seed: int = 0
    """Random seed of the maps."""

    def __post_init__(self) -> None:
        if min(self.images, self.findings, self.cells) < 1:
            raise UserError(
                "expected --images, --findings and --cells of 1 or more, got less: raise the one that is below 1"
            )


def main(options: Options) -> dict[str, Any]:
    cv2.setNumThreads(1)
    rng = np.random.default_rng(options.seed)
    images = [made_maps(rng, options.findings, options.cells) for _ in range(options.images)]
    rates, rows = {}, []
    for mode in get_args(ThresholdMode):
        start = time.process_time()  # CPU time, which other processes do not affect
        boxes = sum(len(boxes_of(maps, BoxRule(mode=mode))) for maps in images)
        rates[mode] = len(images) / (time.process_time() - start)
        rows.append([mode, f"{rates[mode]:,.0f}", f"{boxes / len(images):.1f}"])
    table = markdown(["mode", "images/s on one core", "boxes per image"], rows)
    print(f"{options.images:,} images x {options.findings} maps of {options.cells} x {options.cells} cells\n{table}")
    uri = storage.join(storage.normalize(options.out), "map_boxes.md")
    storage.write_text(uri, table)
    return {"metrics": {f"images_per_s_{mode}": rate for mode, rate in rates.items()}, "report": uri}


def made_maps(rng: np.random.Generator, findings: int, cells: int) -> np.ndarray:
    """(findings, cells, cells) uint8: a few round peaks of random height and width on a noisy background."""
    position = (np.arange(cells) + 0.5) / cells
    x, y, width = (
        rng.random((findings, PEAKS)),
        rng.random((findings, PEAKS)),
        rng.uniform(0.02, 0.2, (findings, PEAKS)),
    )
    height = rng.random((findings, PEAKS)) * (rng.random((findings, PEAKS)) < 0.6)
    away = ((position - x[..., None]) ** 2)[:, :, None, :] + ((position - y[..., None]) ** 2)[..., None]
    peaks = (height[..., None, None] * np.exp(-away / (2 * width[..., None, None] ** 2))).max(1)
    noise = rng.random((findings, cells // 4 + 1, cells // 4 + 1)).astype(np.float32) * 0.2
    background = np.stack(
        [cv2.resize(map_noise, (cells, cells), interpolation=cv2.INTER_LINEAR) for map_noise in noise]
    )
    return ((peaks + background).clip(0, 1) * FULL).astype(np.uint8)
