"""A recipe with `lung_crop`, from a raw archive to scores: the same crops in training and in scoring."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import train_job
from cxr.data import shards
from cxr.errors import UserError
from cxr.families import image_crop
from cxr.families.align import AlignRecipe
from cxr.imaging.geometry import ResizeTransform
from cxr.inference.score import score
from cxr.training.options import RunOptions
from tests.lung_rule import save_finder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]
COUNT, BLANK = 24, 3


def write_archive(folder: Path) -> str:
    """COUNT images with two bright blocks in the middle, of several shapes; BLANK show but a bright corner."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        height, width = 80, 80 + 10 * (number % 3)
        pixels = np.zeros((height, width), np.uint8)
        pixels[:8, :8] = 200
        if number >= BLANK:
            pixels = rng.integers(0, 30, (height, width)).astype(np.uint8)
            for x in (0.3, 0.55):
                pixels[20:60, int(x * width) : int((x + 0.15) * width)] += 190
        assert cv2.imwrite(str(folder / f"{number:02d}.png"), pixels)
    return str(folder)


def rows(folder: Path) -> dict[str, dict]:
    found = [row for file in sorted(folder.rglob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return {row[schema.IMAGE_ID]: row for row in found}


def test_from_an_archive_to_scores(tmp_path: Path) -> None:
    archive, finder = write_archive(tmp_path / "archive"), save_finder(tmp_path / "finder")
    recipe = AlignRecipe(
        size=32, epochs=1, batch_size=4, backbone="conv3", lungs=False, lung_crop=finder, lung_margin=0.1
    )
    given = ArchiveOptions(archive=(archive,), stored_size=32)
    done = train_job(recipe, given, RunOptions(), str(tmp_path / "out"))
    with pytest.raises(UserError, match="contains crops by the lung checkpoint"):
        train_job(
            recipe.replace(lung_crop=""), ArchiveOptions(archive=(done["data"],)), RunOptions(), str(tmp_path / "o")
        )
    crop = image_crop.by_lungs(finder, 0.1)
    assert shards.read_info(done["data"]).crop == crop.describe()

    (tmp_path / "finder").rename(tmp_path / "gone")  # scoring needs nothing but the checkpoint
    score(archive, done["checkpoint"], str(tmp_path / "raw"))
    score(done["data"], done["checkpoint"], str(tmp_path / "stored"))
    raw, stored = (rows(tmp_path / name / "scores") for name in ("raw", "stored"))
    cropped = rows(Path(done["data"]))
    assert len(raw) == len(stored) == COUNT
    for image_id, row in raw.items():
        assert (
            row[schema.RESIZE_TRANSFORM]
            == stored[image_id][schema.RESIZE_TRANSFORM]
            == cropped[image_id][schema.RESIZE_TRANSFORM]
        )
        assert (
            row[schema.CROP_STATUS] == stored[image_id][schema.CROP_STATUS] == cropped[image_id][schema.CROP_STATUS]
        )
        assert row[schema.THETA] == pytest.approx(stored[image_id][schema.THETA], abs=1e-5)
    assert sum(row[schema.CROP_STATUS].startswith("whole image: the lung mask") for row in raw.values()) == BLANK
    found = ResizeTransform.from_dict(raw["20.png"][schema.RESIZE_TRANSFORM]).to_original(
        np.array([[0, 0], [32, 32]])
    )
    assert np.abs(found - [[24, 12], [76, 64]]).max() <= 8  # of 100 x 80; blocks from (30, 20) to (70, 60)
