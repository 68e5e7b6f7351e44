"""Alignment metrics on tensors whose answers are known, and on cheats that must gain nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.augment.affine_exposure import random_affine
from cxr.families.base import SingleProcess
from cxr.metrics import alignment
from cxr.models.spatial_transformer import compose, identity, invert

ZOOM = torch.tensor([[[0.3, 0, 0.1], [0, 0.3, -0.2]]])


def affines(count: int, seed: int) -> Tensor:
    return random_affine(count, generator=torch.Generator().manual_seed(seed))


def images(count: int, size: int = 32) -> Tensor:
    noise = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, (size, size), mode="bilinear")


def overlap(x: Tensor, theta: Tensor, masks: Tensor | None = None) -> dict[str, float]:
    result = alignment.Overlap(32, torch.device("cpu"))
    for part in range(0, len(x), 2):
        result.add(x[part : part + 2], theta[part : part + 2])
        if masks is not None:
            result.add_masks(masks[part : part + 2], theta[part : part + 2])
    return result.results(SingleProcess())


def test_correlation_to_the_mean_equals_its_definition() -> None:
    unit = alignment.unit_vectors(images(7)).double()
    wanted = torch.stack([torch.corrcoef(torch.stack([u, unit.mean(0)]))[0, 1] for u in unit]).mean()
    assert alignment.correlation_to_mean(unit.mean(0)) == pytest.approx(wanted.item(), abs=1e-6)


def test_equal_images_correlate_fully_at_any_exposure() -> None:
    x = images(1).repeat(4, 1, 1, 1) * torch.tensor([0.3, 0.5, 0.8, 1]).reshape(4, 1, 1, 1)
    metrics = overlap(x, identity(4))
    assert metrics["correlation"] == pytest.approx(1, abs=0.01)
    assert metrics["spread"] > 0.1
    assert "iou" not in metrics


def test_spread_is_the_deviation_over_images() -> None:
    x = torch.tensor([0.2, 0.6]).reshape(2, 1, 1, 1).expand(2, 1, 32, 32)
    assert overlap(x, identity(2))["spread"] == pytest.approx(0.2, abs=1e-5)


def test_pairwise_iou_on_three_masks() -> None:
    masks = torch.zeros(3, 1, 4, dtype=torch.bool)
    masks[0, 0, :2] = masks[1, 0, 1:3] = masks[2, 0, :3] = True
    assert alignment.pairwise_iou(masks) == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)
    assert math.isnan(alignment.pairwise_iou(masks[:1]))


def test_masks_are_warped_with_their_images() -> None:
    mask = torch.zeros(32, 32)
    mask[8:20, 10:22] = 1
    poses = affines(4, 1)
    placed = alignment.warp(mask.expand(4, 1, 32, 32), invert(poses))[:, 0] > 0.5
    x = images(4)
    assert overlap(x, identity(4), placed)["iou"] < 0.8
    assert overlap(x, poses, placed)["iou"] > 0.8


def test_removing_the_mean_transform_defeats_zoom() -> None:
    theta = affines(6, 1)
    zoomed = compose(theta, ZOOM.expand(6, 2, 3))
    mean, mean_zoomed = theta.mean(0, keepdim=True), zoomed.mean(0, keepdim=True)
    torch.testing.assert_close(
        alignment.centered(zoomed, mean_zoomed), alignment.centered(theta, mean), atol=1e-5, rtol=1e-5
    )
    x = images(6)
    plain = overlap(x, alignment.centered(identity(6), identity(1)))
    cheat = overlap(x, alignment.centered(ZOOM.expand(6, 2, 3), ZOOM))
    assert cheat["correlation"] == pytest.approx(plain["correlation"], abs=1e-4)


def test_degenerate_transforms_are_distinguished() -> None:
    assert alignment.mean_scale(ZOOM).item() == pytest.approx(0.3)
    assert alignment.degenerate(0.3, 0, 0).startswith("collapsed")
    assert alignment.degenerate(2.0, 0, 0).startswith("collapsed")
    assert alignment.degenerate(float("nan"), 0, 0)
    assert alignment.degenerate(1.0, 0.3, 0).startswith("drifted")
    assert alignment.degenerate(1.0, 0, 0.25).startswith("mirrored: 25%")
    assert alignment.degenerate(1.0, 0.1, 0) == ""


def test_the_middle_of_a_shifted_frame_lies_off_by_the_shift() -> None:
    theta = identity(1)
    theta[0, :, 2] = torch.tensor([0.6, 0.8])  # of half the width
    assert alignment.middle_shift(theta).item() == pytest.approx(0.5)


def test_pose_errors_vanish_up_to_one_frame() -> None:
    pose = affines(8, 1)
    found = compose(pose, invert(ZOOM).expand(8, 2, 3))
    assert alignment.pose_errors(found, pose).max() < 1e-4
    assert alignment.pose_errors(pose, pose).max() < 1e-4


def test_pose_errors_measure_shares_of_the_width_and_zoom_gains_nothing() -> None:
    pose = affines(200, 1)
    shift = torch.zeros(200, 2, 3)
    shift[::2, 0, 2], shift[1::2, 0, 2] = 0.04, -0.04  # ±2 % of a width of 2
    errors = alignment.pose_errors(pose + shift, pose)
    assert errors.mean().item() == pytest.approx(0.02, abs=2e-3)
    zoomed = compose(pose + shift, ZOOM.expand(200, 2, 3))
    torch.testing.assert_close(alignment.pose_errors(zoomed, pose), errors, atol=1e-5, rtol=1e-3)


def test_local_correlation_ignores_local_exposure() -> None:
    x = 10 * torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(alignment.local_correlation(x, 3 * x + 7, 9), torch.ones_like(x), atol=1e-2, rtol=0)
    assert alignment.local_correlation(x, -x, 9).max() < -0.98
    assert alignment.local_correlation(x, torch.zeros_like(x), 9).abs().max() < 1e-3


def test_empty_lung_masks_do_not_count_as_agreement() -> None:
    empty = torch.zeros(3, 4, 4)
    assert alignment.pairwise_iou(empty) == 1
    assert alignment.pairwise_iou(empty, of_empty=0.0) == 0


def test_parameters_are_those_a_transform_was_made_of() -> None:
    angle = math.radians(10)
    x, y = 1.2, 0.8
    theta = torch.tensor(
        [[[x * math.cos(angle), -y * math.sin(angle), 0.1], [x * math.sin(angle), y * math.cos(angle), -0.4]]]
    )
    found = {name: of.item() for name, of in alignment.parameters(theta).items()}
    expected = {"rotation_deg": 10, "scale": math.sqrt(x * y), "stretch": 1.5, "shift_x_pct": 5, "shift_y_pct": -20}
    assert found == pytest.approx(expected, abs=1e-4)


def test_implausible_transforms_are_found_one_by_one() -> None:
    theta = identity(5)
    theta[1] *= torch.tensor([[-1.0], [1.0]])
    theta[2, :, :2] *= 1.7
    theta[3, 0, 2] = 0.5
    assert alignment.implausible(theta).tolist() == [False, True, True, True, False]


def test_correlations_to_the_mean_have_the_groups_correlation_as_mean() -> None:
    unit = alignment.unit_vectors(images(7))
    each = alignment.correlations_to_mean(unit)
    assert each.mean().item() == pytest.approx(alignment.correlation_to_mean(unit.mean(0)), abs=1e-6)


def test_pairs_of_an_image_with_itself_never_count() -> None:
    matrix = np.array([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]])
    assert alignment.pair_interval(matrix, np.arange(3), resamples=20).value == pytest.approx(0.4)
    times = np.array([[2, 3], [1, 0], [0, 0]])
    assert alignment.resampled_pair_means(matrix, times).tolist() == pytest.approx([0.2, math.nan], nan_ok=True)


def test_patients_are_resampled_with_all_their_images() -> None:
    matrix = np.full((6, 6), 0.5)
    matrix[:3, :3] = matrix[3:, 3:] = 0.9
    by_image = alignment.pair_interval(matrix, np.arange(6), resamples=500)
    by_patient = alignment.pair_interval(matrix, np.repeat([0, 1], 3), resamples=500)
    assert by_patient.value == by_image.value
    assert by_patient.low == pytest.approx(by_patient.value)  # of either patient twice: 0.9
    assert by_image.low < 0.6
