"""The comparison of aligners on a few phantoms with known poses, and on transforms that must not raise the IoU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cxr import schema
from cxr.benchmarks.studies import align, align_pictures, ecc, mask_affine
from cxr.benchmarks.studies.align import BEST, CXR, ECC, GIVEN, AlignmentComparison, Masked
from cxr.benchmarks.studies.ecc import Ecc, Registered
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.models.spatial_transformer import compose, identity, invert, warp
from cxr.phantom.nlm import write_masked_phantom

COUNT, SIZE = 10, 64
ZOOM = torch.tensor([[[0.6, 0.0, 0.1], [0.0, 0.6, -0.05]]])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("montgomery"))
    write_masked_phantom(folder, COUNT, "montgomery", size=SIZE, pose=0.0, prevalence=0.0)
    return folder


@pytest.fixture(scope="module")
def images(archive: str) -> Masked:
    return align.read([archive], SIZE)[0]


@pytest.fixture(scope="module")
def poses(images: Masked) -> Tensor:
    return align.random_poses(images.image_ids, seed=1)


@pytest.fixture(scope="module")
def posed(images: Masked, poses: Tensor) -> Masked:
    return images.transformed(poses)


@pytest.fixture(scope="module")
def registered(posed: Masked) -> Registered:
    return ecc.align(posed.pixels.numpy(), Ecc())


@pytest.fixture(scope="module")
def comparison(posed: Masked, poses: Tensor, registered: Registered) -> AlignmentComparison:
    """The true poses take the place of a checkpoint's predictions."""
    best = mask_affine.align_masks(posed.masks)
    return align.overlaps(
        posed, {GIVEN: identity(COUNT), ECC: registered.theta, CXR: invert(poses), BEST: best}, {ECC: 0.1, CXR: 0.01}
    )


def test_better_transforms_have_a_higher_iou(comparison: AlignmentComparison) -> None:
    metrics = align.metrics(comparison, ["montgomery"] * COUNT)
    assert metrics["iou_ecc"] > metrics["iou_given"] + 0.1
    assert metrics["iou_cxr"] > metrics["iou_given"] + 0.2
    assert metrics["iou_best_affine"] > metrics["iou_cxr"]
    assert metrics["iou_best_affine"] > metrics["iou_ecc"]
    assert metrics["iou_cxr_montgomery"] == pytest.approx(metrics["iou_cxr"])
    assert metrics["gain_over_ecc_low"] < metrics["gain_over_ecc"] < metrics["gain_over_ecc_high"]


def test_zooming_in_does_not_raise_the_iou(posed: Masked, poses: Tensor) -> None:
    aligned = invert(poses)
    zoomed = compose(aligned, ZOOM.expand_as(aligned))
    plain, cheat = (align.overlaps(posed, {CXR: theta}) for theta in (aligned, zoomed))
    torch.testing.assert_close(plain.theta[CXR], cheat.theta[CXR], atol=1e-5, rtol=0)
    idle = align.overlaps(posed, {GIVEN: identity(COUNT), CXR: ZOOM.expand(COUNT, 2, 3)})
    torch.testing.assert_close(idle.iou[GIVEN], idle.iou[CXR], atol=0.03, rtol=0)


def test_poses_depend_only_on_seed_and_image() -> None:
    names = [f"{n}.png" for n in range(300)]
    poses = align.random_poses(names, 0)
    torch.testing.assert_close(align.random_poses(names[::-1], 0).flip(0), poses, atol=0, rtol=0)
    assert (align.random_poses(names, 1) != poses).any(1).all()
    scale = torch.linalg.det(poses[:, :, :2]).sqrt()
    turn = torch.rad2deg(torch.atan2(poses[:, 1, 0], poses[:, 0, 0]))
    shift = poses[:, :, 2] / 2
    for values, largest, middle in ((scale - 1, 0.2, 0), (turn, 15, 0), (shift, 0.1, 0)):
        assert values.abs().max() <= largest + 1e-4
        assert values.max() > 0.9 * largest
        assert values.min() < -0.9 * largest
        assert abs(float(values.mean()) - middle) < 0.1 * largest


def test_ecc_is_deterministic(posed: Masked, registered: Registered) -> None:
    again = ecc.align(posed.pixels.numpy(), Ecc())
    torch.testing.assert_close(again.theta, registered.theta, atol=0, rtol=0)
    torch.testing.assert_close(registered.theta.mean(0), identity()[0], atol=1e-4, rtol=0)


def test_ecc_returns_the_identity_if_it_fails() -> None:
    blank = np.zeros((3, 32, 32), np.uint8)
    registered = ecc.align(blank, Ecc())
    assert registered.failures > 0
    torch.testing.assert_close(registered.theta, identity(3), atol=1e-6, rtol=0)


def test_transforms_convert_to_opencv(posed: Masked, poses: Tensor) -> None:
    import cv2

    picture = np.random.default_rng(0).random((SIZE, SIZE), np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    theirs = cv2.warpAffine(picture, ecc.to_pixels(poses[0], SIZE), (SIZE, SIZE), flags=flags)
    ours = warp(torch.from_numpy(picture)[None, None], poses[:1])[0, 0].numpy()
    assert np.abs(theirs - ours).mean() < 0.01  # OpenCV's weights have 5 bits
    torch.testing.assert_close(ecc.to_unit(ecc.to_pixels(poses[0], SIZE), SIZE), poses[0], atol=1e-5, rtol=0)


def test_the_interval_excludes_pairs_of_an_image_with_itself() -> None:
    better, worse = torch.full((6, 6), 0.7), torch.full((6, 6), 0.5)
    better.fill_diagonal_(1)
    assert align.gain_interval(better, worse, 0) == pytest.approx((0.2, 0.2), abs=1e-6)


def test_images_without_masks_or_pixels_are_left_out_with_a_note(archive: str, tmp_path: Path) -> None:
    write_masked_phantom(str(tmp_path), 4, "shenzhen", size=SIZE)
    masks = sorted((tmp_path / "mask").iterdir())
    masks[0].unlink()
    masks[1].write_bytes(b"?")
    both, notes = align.read([archive, str(tmp_path)], SIZE, limit=3)
    assert both.sources == ["montgomery"] * 3 + ["shenzhen"]
    assert ["2 of 3 images left out" in note for note in notes] == [True]
    masks[2].unlink()
    masks[3].unlink()
    with pytest.raises(UserError, match="expected at least 2 images with a lung mask, got 0"):
        align.read([str(tmp_path)], SIZE)


def test_halves_share_no_image_and_do_not_depend_on_the_others(archive: str, images: Masked) -> None:
    development, test = (set(align.read([archive], SIZE, half=half)[0].image_ids) for half in ("development", "test"))
    assert not development & test
    assert development | test == set(images.image_ids)
    few = align.read([archive], SIZE, limit=2, half="development")[0].image_ids
    assert few == [image_id for image_id in images.image_ids if image_id in development][:2]


def test_a_checkpoint_is_compared(posed: Masked, poses: Tensor, tmp_path: Path) -> None:
    recipe = AlignRecipe(size=32, backbone="conv3")
    task = recipe.task(recipe.network(()))
    checkpoint.save(tmp_path / "kept", recipe, task, task.network.state_dict(), findings=(), metrics={})
    aligner = checkpoint.load(str(tmp_path / "kept"))
    comparison = align.compare(posed, aligner, Ecc(rounds=((ecc.Stage(16, False),),)))
    torch.testing.assert_close(comparison.iou[CXR], comparison.iou[GIVEN])  # an untrained network moves nothing
    assert min(comparison.seconds.values()) > 0
    pictures = align_pictures.save_pictures(posed, comparison, str(tmp_path))
    assert all(Path(uri).stat().st_size > 1000 for uri in pictures)
    rows = align.transforms(posed, comparison, poses).to_pylist()
    assert [row[schema.IMAGE_ID] for row in rows] == posed.image_ids
    np.testing.assert_allclose(rows[3]["theta_given_unit"], [1, 0, 0, 0, 1, 0])
    np.testing.assert_allclose(rows[3]["pose_unit"], poses[3].flatten())


def test_only_an_aligner_large_enough_will_do(posed: Masked, tmp_path: Path) -> None:
    recipe = AlignRecipe(size=128, backbone="conv3")
    task = recipe.task(recipe.network(()))
    checkpoint.save(tmp_path, recipe, task, task.network.state_dict(), findings=(), metrics={})
    aligner = checkpoint.load(str(tmp_path))
    with pytest.raises(UserError, match="expected stored images of at least size=128 px"):
        align.predict(aligner, posed.pixels)
    other = type("Other", (AlignRecipe,), {"family": "other", "score_columns": schema.REJECTS})()
    with pytest.raises(UserError, match=r"expected a checkpoint of family .align."):
        align.predict(replace(aligner, recipe=other), posed.pixels)
