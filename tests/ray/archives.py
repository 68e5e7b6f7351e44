"""Small archives on disk for tests that ingest or read them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

GOOD, BAD = 40, 3


def write_archive(folder: Path, good: int = GOOD, first: str = "") -> str:
    """A tree of `good` gray noise PNGs and BAD files that are not images; every name starts with `first`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(good):
        cv2.imwrite(str(folder / f"{first}image-{i:03d}.png"), rng.integers(0, 255, (40, 30), np.uint8))
    whole = (folder / f"{first}image-000.png").read_bytes()
    for i in range(BAD):
        (folder / f"{first}torn-{i}.png").write_bytes(whole[: 50 + i])
    return str(folder)
