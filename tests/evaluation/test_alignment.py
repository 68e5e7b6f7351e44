"""Aligners are compared with known poses and lung masks, and described without them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.alignment_data import AlignedImages
from cxr.evaluation.run import ReportOptions
from cxr.imaging.geometry import ResizeTransform, fitted_transform
from cxr.models.spatial_transformer import identity, invert, warp
from cxr.phantom.archive import write_phantom
from cxr.sources import open_manifest
from tests.made_shards import chest_like
from tests.written_runs import write_scored

IMAGES, SIDE = 24, 64
OPTIONS = ReportOptions(split="all", resamples=50)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("phantoms"))
    write_phantom(uri, IMAGES, size=SIDE)
    return uri


def poses(archive: str) -> Tensor:
    column = open_manifest(archive).table[schema.TRUE_THETA].to_pylist()
    return torch.tensor(column, dtype=torch.float32).reshape(-1, 2, 3)


def write_run(out: Path, archive: str, theta: Tensor) -> str:
    """What `cxr score` writes for an aligner; the last image has an error."""
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": "align", "size": 32}}
    names = (schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT, schema.SOURCE_URI)
    rows = open_manifest(archive).table.select(names).to_pylist()
    for row, pose in zip(rows, theta.reshape(-1, 6).tolist(), strict=True):
        transform = fitted_transform(SIDE, SIDE, 32).as_dict()
        row |= {schema.HEIGHT_PX: SIDE, schema.WIDTH_PX: SIDE, schema.RESIZE_TRANSFORM: transform, schema.THETA: pose}
    rows[-1] |= {schema.ERROR: "no image", schema.THETA: None, schema.RESIZE_TRANSFORM: None}
    fields = pa.schema([*schema.SCORES, (schema.THETA, pa.list_(pa.float32(), 6))])
    return write_scored(out, settings, pa.Table.from_pylist(rows[::-1], fields))


def check_pictures(result: dict[str, Any], names: set[str]) -> None:
    assert {Path(uri).stem for uri in result["pictures"]} == names
    assert all(cv2.imread(uri) is not None for uri in result["pictures"])


def test_known_poses_have_no_error_in_any_common_frame_and_align_the_lungs(phantoms: str, tmp_path: Path) -> None:
    frame = torch.tensor([[[1.1, 0, 0.05], [0, 0.9, -0.1]]])
    theta = torch.cat([poses(phantoms), torch.tensor([[[0.0, 0, 1]]]).expand(IMAGES, -1, -1)], 1) @ torch.cat(
        [frame, torch.tensor([[[0.0, 0, 1]]])], 1
    )
    run = write_run(tmp_path / "run", phantoms, theta[:, :2])
    result = reports.report(run, OPTIONS, str(tmp_path / "out"))
    metrics = json.loads(json.dumps(result["metrics"], allow_nan=False))
    assert (metrics["images"], metrics["images_with_error"], metrics["images_implausible"]) == (IMAGES - 1, 1, 0)
    assert metrics["corner_error_pct"] == pytest.approx(0, abs=1e-3)
    assert metrics["corner_error_before_pct"] == pytest.approx(-metrics["corner_error_change_pct"], abs=1e-3)
    assert metrics["corner_error_change_pct_low"] <= metrics["corner_error_change_pct"] < -3
    assert metrics["mask_iou_before"] < metrics["mask_iou_low"] <= metrics["mask_iou"] <= metrics["mask_iou_high"]
    assert metrics["mask_iou_change_low"] > 0.1
    assert metrics["group_correlation_change_low"] > 0
    names = {"improvement", "means", "transforms", "poses", "sample", "largest_errors", "lowest_overlap"}
    check_pictures(result, names)
    rows = list(csv.DictReader(Path(result["transforms"]).read_text().splitlines()))
    assert len(rows) == IMAGES - 1
    assert float(rows[0]["distance_from_mean_pct"]) >= float(rows[-1]["distance_from_mean_pct"])


def test_the_identity_changes_nothing(phantoms: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", phantoms, identity(IMAGES))
    metrics = reports.report(run, OPTIONS, str(tmp_path / "out"))["metrics"]
    for name in ("corner_error_change_pct", "mask_iou_change", "group_correlation_change"):
        assert (metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]) == pytest.approx((0, 0, 0), abs=1e-6)


def test_two_runs_are_compared_on_the_same_images(phantoms: str, tmp_path: Path) -> None:
    known = write_run(tmp_path / "known", phantoms, poses(phantoms))
    unchanged = write_run(tmp_path / "unchanged", phantoms, identity(IMAGES))
    options = ReportOptions(split="all", resamples=50, compare_with=unchanged)
    metrics = reports.report(known, options, str(tmp_path / "out"))["metrics"]
    assert metrics["images_compared"] == IMAGES - 1
    assert metrics["corner_error_gain_pct"] == pytest.approx(metrics["corner_error_change_pct"], abs=1e-3)
    assert metrics["corner_error_gain_pct_high"] < 0
    assert metrics["mask_iou_gain"] == pytest.approx(metrics["mask_iou_change"], abs=1e-6)
    assert metrics["group_correlation_gain_low"] > 0


def test_without_poses_or_masks_the_transforms_are_described(tmp_path: Path) -> None:
    folder, rng = tmp_path / "unlabeled", np.random.default_rng(0)
    folder.mkdir()
    for image in range(6):
        (folder / f"{image}.png").write_bytes(cv2.imencode(".png", chest_like(rng, SIDE))[1].tobytes())
    theta = identity(6)
    theta[2] *= torch.tensor([[-1.0], [1.0]])  # mirrored
    run = write_run(tmp_path / "run", str(folder), theta)
    with pytest.raises(UserError, match="nothing to evaluate"):
        reports.report(run, ReportOptions(archive=str(folder), split="all"), str(tmp_path / "against"))
    result = reports.report(run, ReportOptions(resamples=20), str(tmp_path / "out"))
    metrics = json.loads(json.dumps(result["metrics"], allow_nan=False))
    assert (metrics["images"], metrics["images_implausible"]) == (6, 1)
    assert 0 < metrics["group_correlation_before"] < 1
    check_pictures(result, {"improvement", "means", "transforms", "sample", "outliers"})
    with Path(result["transforms"]).open() as lines:
        assert next(csv.DictReader(lines))["image_id"] == "2.png"


@pytest.mark.draws
def test_a_transform_of_a_crop_is_applied_to_the_crop() -> None:
    rng = np.random.default_rng(0)
    picture = np.kron(rng.random((12, 15)), np.ones((4, 4))).astype(np.float32)  # 48 x 60, half of the original
    left, top, side = 40, 16, 64  # of the crop, in pixels of the original
    images = AlignedImages(
        rows=np.array([7]),
        patients=np.array([0]),
        theta=identity(1),
        squares=np.array([[left, top, side, side]], np.float64),
        sizes_px=np.array([[96, 120]]),
        pose=identity(1),
        masked=np.array([False]),
    )
    crop = torch.from_numpy(picture[top // 2 : (top + side) // 2, left // 2 : (left + side) // 2].copy())
    theta = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])  # a quarter turn
    before, after = images.before_after(0, (picture, ResizeTransform(2, 2)), theta, side // 2)
    torch.testing.assert_close(before, crop)
    torch.testing.assert_close(after, torch.rot90(crop, 1))
    torch.testing.assert_close(after, warp(crop[None, None], theta[None])[0, 0])
    assert not torch.allclose(after, warp(crop[None, None], invert(theta[None]))[0, 0])
