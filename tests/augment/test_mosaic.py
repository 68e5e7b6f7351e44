"""Mosaic, affine and mixup: pixels and boxes stay aligned, and formulas match Ultralytics'."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cxr.augment import mosaic
from cxr.augment.mosaic import GRAY, MosaicVariation, augment_with_boxes
from cxr.models.yolo import ultralytics

STILL = MosaicVariation(mosaic=0, translate=0, scale_jitter=0, flip=0, hsv_v=0)
SIZE = 64


def framed(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Black images, each with one white box."""
    rng = np.random.default_rng(seed)
    x, boxes = torch.zeros(count, 1, SIZE, SIZE), torch.full((count, 3, 5), math.nan)
    for i in range(count):
        left, top = rng.integers(2, 30, 2)
        wide, high = rng.integers(16, 32, 2)
        x[i, 0, top : top + high, left : left + wide] = 1
        boxes[i, 0] = torch.tensor([i, *(v / SIZE for v in (left, top, left + wide, top + high))])
    return x, boxes


def test_no_variation_leaves_images_unchanged() -> None:
    x, boxes = framed()
    found, kept = augment_with_boxes(x, boxes, STILL)
    assert torch.equal(found, x)
    assert torch.equal(kept.nan_to_num(-1), boxes.nan_to_num(-1))


@pytest.mark.parametrize(
    "changes",
    [
        {"translate": 0.2},
        {"scale_jitter": 0.5},
        {"flip": 1.0},
        {"mosaic": 1.0},
        {"mosaic": 0.5, "scale_jitter": 0.4, "flip": 0.5},
    ],
)
def test_boxes_enclose_their_objects(changes: dict[str, float]) -> None:
    torch.manual_seed(0)
    x, boxes = augment_with_boxes(*framed(24), replace(STILL, **changes))
    shown = 0
    for image, listed in zip(x[:, 0], boxes, strict=True):
        white, marked = image > 0.8, torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for _, *edges in listed[~listed[:, 0].isnan()].tolist():
            left, top, right, bottom = (round(edge * SIZE) for edge in edges)
            inside = image[top + 1 : bottom - 1, left + 1 : right - 1]
            assert (inside > 0.99).all(), "a box holds nothing but what it marks"
            marked[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
            shown += 1
        lost = (white & ~marked).sum()
        assert lost <= 0.1 * 32 * 32 + 2 * SIZE, "what no box marks is a rest that was too small to keep"
    assert shown > 12


def test_a_rotated_box_is_the_bounding_box_of_its_corners() -> None:
    torch.manual_seed(0)
    x, boxes = augment_with_boxes(*framed(), replace(STILL, rotation_deg=45.0))
    for image, listed in zip(x[:, 0], boxes, strict=True):
        rows, columns = torch.nonzero(image > 0.5, as_tuple=True)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (listed[0, 1:] * SIZE).tolist() == pytest.approx([v.item() for v in seen], abs=1.5)


def test_a_mosaic_shows_four_images_around_a_point_starting_with_its_own() -> None:
    torch.manual_seed(0)
    gray = torch.linspace(0.1, 0.9, 8)
    x = gray.view(-1, 1, 1, 1).expand(8, 1, SIZE, SIZE)
    whole = torch.cat([torch.arange(8.0)[:, None], torch.tensor([0.0, 0, 1, 1]).expand(8, 4)], 1)[:, None]
    sheet = mosaic._sheet(x, whole, 1.0, mosaic._from_batch(x, whole))
    for i, (image, listed) in enumerate(zip(sheet.x[:, 0] + GRAY, sheet.boxes, strict=True)):
        assert listed[0, 0] == i
        meeting = listed[0, 3:].long() - sheet.corner[i]
        assert ((meeting >= SIZE // 2) & (meeting <= 3 * SIZE // 2)).all()
        covered = torch.zeros(2 * SIZE, 2 * SIZE, dtype=torch.bool)
        for index, left, top, right, bottom in listed.long().tolist():
            assert torch.allclose(image[top:bottom, left:right], gray[index])
            assert not covered[top:bottom, left:right].any()
            covered[top:bottom, left:right] = True
        assert torch.allclose(image[~covered], torch.tensor(GRAY))


@pytest.mark.parametrize("size", [640, 1024])
def test_boxes_after_mosaic_are_exact_to_a_hundredth_of_a_pixel_under_autocast(size: int) -> None:
    """All images have the same boxes, so that the choice of partners does not matter."""
    settings = replace(STILL, mosaic=1.0, rotation_deg=10.0, translate=0.1, scale_jitter=0.5, shear_deg=5.0)
    rng, count = np.random.default_rng(0), 8
    edges = np.sort(rng.uniform(0, 1, (12, 2, 2)).astype(np.float32), 1).reshape(12, 4)
    given = torch.from_numpy(np.column_stack([np.arange(12), edges]).astype(np.float32)).expand(count, -1, -1)
    x = torch.zeros(count, 1, size, size)
    torch.manual_seed(0)
    corner = mosaic._sheet(x, given, 1.0, mosaic._from_batch(x, given)).corner.double().numpy()
    forward = mosaic._random_affine(count, size, settings)[0].numpy()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = augment_with_boxes(x, given, settings)
    places = size * np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float64)
    tiled = edges.astype(np.float64).reshape(1, 12, 2, 2) * size + places[:, None, None]
    tiled = tiled[None] - corner[:, None, None, None]  # (image, tile, box, corner, x and y), on the canvas
    tiled = tiled.clip(0, 2 * size).reshape(count, 48, 2, 2)
    corners = np.stack([tiled[:, :, [0, 1, 1, 0], 0], tiled[:, :, [0, 0, 1, 1], 1]], -1)
    moved = np.einsum("bij,bncj->bnci", forward[:, :2, :2], corners) + forward[:, None, None, :2, 2]
    hull = np.concatenate([moved.min(2), moved.max(2)], -1).clip(0, size)
    kept = ~found[..., 0].isnan().numpy()
    assert 50 < kept.sum() < kept.size - 50
    assert np.abs(found[..., 1:].double().numpy() * size - hull)[kept].max() < 0.01


def test_partners_come_from_the_caller() -> None:
    torch.manual_seed(0)
    x, boxes = framed(8)
    asked = []

    def partners(count: int) -> tuple[Tensor, Tensor]:
        asked.append(count)
        return torch.full((count, 1, SIZE, SIZE), 0.5), boxes.new_full((count, boxes.shape[1], 5), 77)

    _, listed = augment_with_boxes(x, boxes, replace(STILL, mosaic=1.0), partners)
    assert asked == [8, 8, 8]
    assert augment_with_boxes(x, boxes, STILL, partners)[1].shape == boxes.shape
    assert len(asked) == 3, "nobody is drawn who is not shown"
    asked.clear()
    _, listed = augment_with_boxes(x, boxes, replace(STILL, mixup=0.5), partners)
    mixed = (listed[..., 0] == 77).any(1)
    assert asked == [int(mixed.sum())]
    assert 0 < asked[0] < 8


def test_mixup_adds_the_boxes_of_the_partner() -> None:
    torch.manual_seed(0)
    x, boxes = augment_with_boxes(*framed(), replace(STILL, mixup=1.0))
    assert boxes.shape == (6, 6, 5)
    for image, listed in zip(x[:, 0], boxes, strict=True):
        one, other = (listed[at, 1:].mul(SIZE).round().long().tolist() for at in (0, 3))
        for left, top, right, bottom in (one, other):
            assert image[top:bottom, left:right].min() > 0.25, "shares lie around one half"
    assert 0.3 < (x[x > 0]).min() < (x[x < 1]).max() < 0.7


def test_brightness_is_multiplicative() -> None:
    torch.manual_seed(0)
    x, _ = augment_with_boxes(
        torch.full((200, 1, 2, 2), 0.5), torch.full((200, 1, 5), math.nan), replace(STILL, hsv_v=0.4)
    )
    assert x.min() == pytest.approx(0.3, abs=0.01)
    assert x.max() == pytest.approx(0.7, abs=0.01)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> object:
    """Ultralytics' transform with the same settings and random numbers as `_random_affine`."""
    augment = ultralytics("data.augment")
    torch.manual_seed(1)
    u = (2 * torch.rand(1, 6) - 1)[0].tolist()
    drawn = iter([0.0, 0.0, *u])
    monkeypatch.setattr(
        augment.random, "uniform", lambda low, high: (low + high) / 2 + (high - low) / 2 * next(drawn)
    )
    return augment.RandomPerspective(degrees=20, translate=0.1, scale=0.5, shear=10, size=(SIZE, SIZE))


def test_the_affine_transform_equals_that_of_ultralytics(theirs) -> None:
    settings = MosaicVariation(rotation_deg=20, translate=0.1, scale_jitter=0.5, shear_deg=10)
    torch.manual_seed(1)
    forward, factor = mosaic._random_affine(1, SIZE, settings)
    matrix, scale = theirs._compute_affine_matrix(np.zeros((2 * SIZE, 2 * SIZE)), (SIZE, SIZE))
    np.testing.assert_allclose(forward[0].numpy(), matrix, atol=1e-4)
    assert factor.item() == pytest.approx(scale)


def test_boxes_are_transformed_and_dropped_as_by_ultralytics(theirs) -> None:
    torch.manual_seed(1)
    forward, factor = mosaic._random_affine(1, SIZE, MosaicVariation(rotation_deg=20, shear_deg=10))
    edges = [(a, b) for a, b in itertools.product(range(0, 2 * SIZE, 9), repeat=2) if b > a]
    given = torch.tensor([[0, x0, y0, x1, y1] for x0, x1 in edges[::3] for y0, y1 in edges[::3]]).float()
    ours = mosaic._transform_boxes(given[None], forward.float(), factor.float(), SIZE)[0]
    moved = theirs.apply_bboxes(given[:, 1:].numpy(), forward[0].numpy()).clip(0, SIZE)
    kept = theirs.box_candidates(given[:, 1:].numpy().T * factor.item(), moved.T)
    assert 0.1 < kept.mean() < 0.9
    assert (~ours[:, 0].isnan()).tolist() == kept.tolist()
    np.testing.assert_allclose(ours[kept, 1:].numpy() * SIZE, moved[kept], atol=1e-2)


@pytest.mark.parametrize(
    "wrong", [{"mosaic": 1.5}, {"scale_jitter": 1.0}, {"rotation_deg": -1.0}, {"shear_deg": 90.0}]
)
def test_settings_out_of_range_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MosaicVariation(**wrong)
