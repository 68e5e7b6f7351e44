"""Phantom images match their ground truth; appearance of findings; poses work with affine_grid."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cxr.errors import UserError
from cxr.phantom import Anatomy, Film, Phantom, render, sample_pose
from cxr.phantom.render import enclosing_box
from cxr.schema import FINDINGS, LUNGS

CLEAN = Film(noise=0.0, scatter=0.0, equalize=0.0, sharpness=0.0)


def phantom(*findings: str, seed: int = 0, film: Film = CLEAN, size: int = 256, **settings: object) -> Phantom:
    anatomy = Anatomy.sample(np.random.default_rng([1, seed]))
    return render(anatomy, findings, np.random.default_rng(seed), size=size, film=film, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("seed", range(3))
def test_finding_has_mask_and_exact_boxes_and_changes_the_image(finding: str, seed: int) -> None:
    pose = sample_pose(np.random.default_rng([2, seed]))
    sick = phantom(finding, seed=seed, pose_unit=pose)
    assert sick.labels == (finding,)
    assert set(sick.masks) == {LUNGS, finding}
    mask = sick.masks[finding]
    boxes = np.array([box.xyxy_px for box in sick.boxes])
    assert {box.label for box in sick.boxes} == {finding}
    assert (*boxes[:, :2].min(0), *boxes[:, 2:].max(0)) == enclosing_box(mask)
    covered = np.zeros_like(mask)
    for x_min, y_min, x_max, y_max in boxes:
        covered[y_min:y_max, x_min:x_max] = True
        inside = mask[y_min:y_max, x_min:x_max]
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
    assert not (mask & ~covered).any()
    if finding not in ("Cardiomegaly", "Emphysema"):  # those change the whole chest
        healthy = phantom(seed=seed, pose_unit=pose)
        change = np.abs(sick.pixels.astype(int) - healthy.pixels)
        assert change[mask].mean() > 4
        assert change[mask].mean() > 4 * change[~mask].mean()


def test_healthy_chest_has_two_dark_lungs_and_no_findings() -> None:
    healthy = phantom()
    assert healthy.labels == ()
    assert healthy.boxes == ()
    lungs = healthy.masks[LUNGS]
    assert 0.15 < lungs.mean() < 0.5
    assert healthy.pixels[lungs].mean() < 0.6 * healthy.pixels[170:, 90:170].mean()
    assert healthy.pixels.dtype == np.uint8


def test_the_seed_determines_the_image() -> None:
    settings = {"film": Film(noise=0.2)}
    first, again, other = (phantom("Mass", "Effusion", seed=s, **settings) for s in (4, 4, 5))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    np.testing.assert_array_equal(first.masks["Mass"], again.masks["Mass"])
    assert first.boxes == again.boxes
    assert (first.pixels != other.pixels).mean() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_pose_unit_is_the_theta_that_restores_the_neutral_pose(seed: int) -> None:
    pose = sample_pose(np.random.default_rng([3, seed]), strength=1.5)
    straight, posed = phantom("Mass", seed=seed), phantom("Mass", seed=seed, pose_unit=pose)
    stack_BCHW = torch.tensor(np.stack([posed.pixels, 255.0 * posed.masks[LUNGS]]), dtype=torch.float32)[None]
    theta = torch.tensor(posed.pose_unit, dtype=torch.float32)[None]
    grid = F.affine_grid(theta, list(stack_BCHW.shape), align_corners=False)
    back, lungs = F.grid_sample(stack_BCHW, grid, align_corners=False)[0].numpy()
    inner = (grid.abs() < 0.98).all(-1)[0].numpy()
    error = np.abs(back - straight.pixels)[inner]
    unaligned = np.abs(posed.pixels.astype(float) - straight.pixels)[inner]
    assert error.mean() < 5
    assert error.mean() < 0.25 * unaligned.mean()
    truth = straight.masks[LUNGS] & inner
    assert ((lungs > 127) & truth).sum() / ((lungs > 127) & inner | truth).sum() > 0.97


def test_pose_strength_zero_is_identity() -> None:
    np.testing.assert_array_equal(sample_pose(np.random.default_rng(0), 0.0), [[1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_cardiomegaly_exceeds_half_of_the_thorax(seed: int) -> None:
    sick, anatomy = phantom("Cardiomegaly", seed=seed), Anatomy.sample(np.random.default_rng([1, seed]))
    (heart,), lungs = [box.xyxy_px for box in sick.boxes], enclosing_box(sick.masks[LUNGS])
    assert (heart[2] - heart[0]) / (lungs[2] - lungs[0]) > 0.5
    usual = np.ptp(anatomy.heart()[:, 0]) / (2 * anatomy.width)
    assert 0.3 < usual < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_pneumothorax_is_darker_and_smoother_than_the_healthy_lung(seed: int) -> None:
    sick, healthy = phantom("Pneumothorax", seed=seed, size=512), phantom(seed=seed, size=512)
    rim = sick.masks["Pneumothorax"]
    assert sick.pixels[rim].mean() < healthy.pixels[rim].mean() - 1
    assert not (rim & ~sick.masks[LUNGS]).any()


@pytest.mark.parametrize(("finding", "side_px"), [("Nodule", 69), ("Mass", 124), ("Cardiomegaly", 423)])
def test_sizes_follow_the_published_boxes(finding: str, side_px: int) -> None:
    sides = []
    for seed in range(20):
        for box in phantom(finding, seed=seed).boxes:
            x_min, y_min, x_max, y_max = box.xyxy_px
            sides.append(1024 / 256 * np.sqrt((x_max - x_min) * (y_max - y_min)))
    assert np.median(sides) == pytest.approx(side_px, rel=0.15)


def test_effusion_blunts_the_angle_and_emphysema_flattens_the_dome() -> None:
    sick, healthy = phantom("Effusion", seed=2), phantom(seed=2)
    fluid = sick.masks["Effusion"]
    assert sick.pixels[fluid].mean() > 1.3 * healthy.pixels[fluid].mean()
    anatomy = Anatomy.sample(np.random.default_rng(0))
    flat = anatomy.hyperinflated(1.0)
    assert flat.dome_height < 0.5 * anatomy.dome_height
    assert flat.dome > anatomy.dome


def test_right_dome_is_higher() -> None:
    anatomies = [Anatomy.sample(np.random.default_rng(seed)) for seed in range(20)]
    assert all(anatomy.dome_y(-1) <= anatomy.dome_y(1) for anatomy in anatomies)


def test_collimated_border_is_black_without_ground_truth() -> None:
    shut = Film(collimated=(0.2, 0.0, 0.0, 0.0))
    sick = phantom("Emphysema", film=shut)
    assert not sick.pixels[:, :51].any()
    assert all(not mask[:, :51].any() for mask in sick.masks.values())


def test_unknown_finding_is_a_user_error() -> None:
    with pytest.raises(UserError, match="Fracture"):
        phantom("Fracture")


def test_renders_quickly() -> None:
    phantom(size=512)
    start = time.process_time()
    for seed in range(5):
        phantom("Effusion", seed=seed, size=512)
    assert 5 / (time.process_time() - start) > 5
