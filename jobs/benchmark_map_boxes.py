"""Time how fast boxes are made of heat maps, by each rule, on one core.

python jobs/benchmark_map_boxes.py --out runs/benchmark_map_boxes
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
from cxr.runtime.job import run_job

PEAKS = 3  # of a map, at most


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_map_boxes"
    """Folder or URI of the results: OUT/map_boxes.md."""
    images: int = 500
    """How many."""
    findings: int = len(schema.FINDINGS)
    """Maps of an image."""
    cells: int = 64
    """Height and width of a map: 64 of an image of 256 px, 128 of one of 512, by the default stride."""
    seed: int = 0
    """Of the maps."""

    def __post_init__(self) -> None:
        if min(self.images, self.findings, self.cells) < 1:
            raise UserError("images, findings and cells: wanted 1 or more of each")


def main(options: Options) -> dict[str, Any]:
    cv2.setNumThreads(1)
    rng = np.random.default_rng(options.seed)
    images = [made_maps(rng, options.findings, options.cells) for _ in range(options.images)]
    rates, rows = {}, []
    for hot in get_args(ThresholdMode):
        start = time.process_time()  # of which other processes take none
        boxes = sum(len(boxes_of(maps, BoxRule(mode=hot))) for maps in images)
        rates[hot] = len(images) / (time.process_time() - start)
        rows.append([hot, f"{rates[hot]:,.0f}", f"{boxes / len(images):.1f}"])
    table = markdown(["rule", "images a second of one core", "boxes an image"], rows)
    print(f"{options.images:,} images x {options.findings} maps of {options.cells} x {options.cells} cells\n{table}")
    uri = storage.join(storage.normalize(options.out), "map_boxes.md")
    storage.write_text(uri, table)
    return {"metrics": {f"images_per_s_{hot}": rate for hot, rate in rates.items()}, "report": uri}


def made_maps(rng: np.random.Generator, findings: int, cells: int) -> np.ndarray:
    """(findings, cells, cells) uint8: a few round peaks of any height and width over a rough ground, as maps have."""
    at = (np.arange(cells) + 0.5) / cells
    x, y, width = (
        rng.random((findings, PEAKS)),
        rng.random((findings, PEAKS)),
        rng.uniform(0.02, 0.2, (findings, PEAKS)),
    )
    height = rng.random((findings, PEAKS)) * (rng.random((findings, PEAKS)) < 0.6)
    away = ((at - x[..., None]) ** 2)[:, :, None, :] + ((at - y[..., None]) ** 2)[..., None]
    peaks = (height[..., None, None] * np.exp(-away / (2 * width[..., None, None] ** 2))).max(1)
    ground = rng.random((findings, cells // 4 + 1, cells // 4 + 1)).astype(np.float32) * 0.2
    rough = np.stack([cv2.resize(one, (cells, cells), interpolation=cv2.INTER_LINEAR) for one in ground])
    return ((peaks + rough).clip(0, 1) * FULL).astype(np.uint8)


if __name__ == "__main__":
    run_job(main, Options)
