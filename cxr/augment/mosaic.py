"""Augment images with their boxes like Ultralytics' trainer: mosaic, affine, mixup, brightness, flip.

The formulas are those of `ultralytics.data.augment` (v8_transforms), applied to whole batches on their device, with
three differences. Pixels and boxes use the same coordinates, whereas Ultralytics' images are shifted by half a pixel
against their boxes. The caller samples the other images of a mosaic or mixup, which Ultralytics takes from recently
loaded batches. Images are gray, so the jitter of hue, saturation and value reduces to the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.precision import affine_grid, affine_points

GRAY = 114 / 255  # fill value around images
MIXED = 32.0  # both parameters of the beta distribution of mixup weights
_SMALLEST_PX, _LEAST_AREA, _LONGEST = (
    2,
    0.1,
    100,
)  # a box is kept with longer sides, a larger fraction of its area and a smaller aspect ratio


@dataclass(frozen=True)
class MosaicVariation:
    """Ranges of augmentation, with Ultralytics' defaults in this package's units.

    Raises:
        ValueError: a setting is out of range.
    """

    mosaic: float = 1.0
    """Probability of a mosaic of four images."""
    mixup: float = 0.0
    """Probability of blending an image with another one (mixup)."""
    rotation_deg: float = 0.0
    translate: float = 0.1
    """Largest translation, as a fraction of the width."""
    scale_jitter: float = 0.5
    """Zoom factors are within 1 ± this value."""
    shear_deg: float = 0.0
    flip: float = 0.5
    """Probability of mirroring an image left to right."""
    hsv_v: float = 0.4
    """Brightness factors are within 1 ± this value."""

    def __post_init__(self) -> None:
        shares = (self.mosaic, self.mixup, self.flip, self.hsv_v, self.translate)
        if not all(0 <= share <= 1 for share in shares) or not 0 <= self.scale_jitter < 1:
            raise ValueError(
                f"expected probabilities, hsv_v and translate from 0 to 1 and scale_jitter from 0 to below 1, got "
                f"{self}"
            )
        if not 0 <= self.rotation_deg <= 180 or not 0 <= self.shear_deg < 90:
            raise ValueError(f"expected rotation_deg from 0 to 180 and shear_deg from 0 to below 90, got {self}")

    @property
    def combines(self) -> bool:
        """Whether images are combined with others."""
        return max(self.mosaic, self.mixup) > 0

    @property
    def moves(self) -> bool:
        """Whether pixels move in other ways than by a flip."""
        return max(self.mosaic, self.rotation_deg, self.translate, self.scale_jitter, self.shear_deg) > 0


Partners = Callable[[int], tuple[Tensor, Tensor]]
"""Samples N images (N, 1, H, W), uniformly and independently, and their boxes (N, M, 5)."""


def augment_with_boxes(
    x_B1HW: Tensor, boxes_BM5: Tensor, variation: MosaicVariation, partners: Partners | None = None
) -> tuple[Tensor, Tensor]:
    """Augment square images in [0, 1] and their boxes [index, x_min, y_min, x_max, y_max] in fractions; NaN: no box.

    Returns as many images, and boxes (B, N, 5), where mosaic and mixup multiply N. Samples from PyTorch's CPU
    generator; the host never waits for the device.

    Boxes of which too little remains visible are dropped. A box with a negative index marks a region rather than an
    object, and is kept as long as any part of it is visible.

    Args:
        partners: samples the images that are combined with those of the batch; by default, from the batch itself.
    """
    partners = partners or _from_batch(x_B1HW, boxes_BM5)
    x, boxes, mixed = x_B1HW, boxes_BM5, torch.zeros(0, dtype=torch.long)
    if variation.mixup > 0:
        mixed = torch.nonzero(torch.rand(len(x)) < variation.mixup)[:, 0]  # on the CPU
        more, listed = partners(len(mixed))
        x, boxes = torch.cat([x, more]), torch.cat([boxes, listed])
    if variation.moves:
        x, boxes = _affine(_sheet(x, boxes, variation.mosaic, partners), variation)
    if variation.mixup > 0:
        x, boxes = _mixup(x, boxes, _to_device(mixed, x))
    if variation.hsv_v > 0:
        x = (x * (1 + variation.hsv_v * _to_device(_signed(len(x)), x)).view(-1, 1, 1, 1)).clamp(0, 1)
    if variation.flip > 0:
        flipped = _to_device(torch.rand(len(x)) < variation.flip, x)
        x, boxes = torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x), _mirror_boxes(boxes, flipped)
    return x, boxes


def _to_device(sampled: Tensor, like: Tensor) -> Tensor:
    """Copy a tensor sampled on the CPU to the device of the images, asynchronously."""
    return sampled.to(like.device, non_blocking=True)


def _signed(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape) - 1


def _from_batch(x: Tensor, boxes: Tensor) -> Partners:
    def sample(count: int) -> tuple[Tensor, Tensor]:
        index = _to_device(torch.randint(len(x), (count,)), x)
        return x[index], boxes[index]

    return sample


@dataclass(frozen=True)
class _Sheet:
    """Four tiled images, minus GRAY; a mosaic shows a window around the point where they meet.

    Ultralytics places four images on a canvas of twice the size so that they meet at a random point. Here they always
    meet in the middle of the sheet and the canvas moves instead, so that no image needs to be cropped and the host
    needs no crop sizes.

    Args:
        x: (B, 1, 2 size, 2 size); 0 outside the canvas.
        boxes: (B, N, 5) in pixels of the sheet, clipped to the canvas.
        corner: (B, 2) x and y of the canvas's upper left corner on the sheet, in whole pixels, on the CPU.
    """

    x: Tensor
    boxes: Tensor
    corner: Tensor


def _sheet(x: Tensor, boxes: Tensor, share: float, partners: Partners) -> _Sheet:
    """Tile each image with three others, or center it alone on its canvas."""
    count, size = len(x), x.shape[-1]
    tiles = [(x, boxes), *(partners(count) if share > 0 else (x, boxes) for _ in range(3))]
    sheet = x.new_empty(count, 2, size, 2, size)
    positions = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for (right, down), (image, _) in zip(positions, tiles, strict=True):
        sheet[:, down, :, right] = image[:, 0] - GRAY
    meet = (size / 2 + size * torch.rand(count, 2)).long()  # on the canvas
    mosaic = (torch.rand(count) < share)[:, None]
    low = torch.where(mosaic, size - meet, -(size // 2))
    high = torch.where(mosaic, low + 2 * size, size)
    edges = _to_device(torch.stack([low, high], 1), x)
    pixel = torch.arange(2 * size, device=x.device)
    visible_B2S = (pixel >= edges[:, 0, :, None]) & (pixel < edges[:, 1, :, None])
    sheet = sheet.view(count, 1, 2 * size, 2 * size)
    sheet.mul_(visible_B2S[:, 0, None, None, :]).mul_(visible_B2S[:, 1, None, :, None])
    tile_boxes = torch.stack([image_boxes for _, image_boxes in tiles], 1)
    shift = torch.tensor(positions).mul(size).repeat(1, 2)[:, None]
    limits = edges.repeat(1, 1, 2)[:, :, None, None].to(boxes.dtype)
    tile_boxes[..., 1:] = (tile_boxes[..., 1:] * size + _to_device(shift, x)).clamp(limits[:, 0], limits[:, 1])
    return _Sheet(sheet, tile_boxes.flatten(1, 2), low)


def _affine(sheet: _Sheet, variation: MosaicVariation) -> tuple[Tensor, Tensor]:
    """Rotate, scale, shear and shift the center of each canvas; boxes become fractions again, lost ones NaN."""
    size = sheet.x.shape[-1] // 2
    forward, factor = _random_affine(len(sheet.x), size, variation)
    forward = forward @ _shift(-sheet.corner)
    unit = torch.tensor([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1]]).double()  # to pixels
    back = torch.tensor([[1 / size, 0, -1], [0, 1 / size, -1], [0, 0, 1]]).double()  # pixels of the sheet to [-1, 1]
    theta = _to_device((back @ torch.linalg.inv(forward) @ unit)[:, :2].float(), sheet.x)
    grid = affine_grid(theta, size, size)
    x = F.grid_sample(sheet.x, grid, padding_mode="zeros", align_corners=False) + GRAY
    forward, factor = _to_device(forward.float(), sheet.x), _to_device(factor.float(), sheet.x)
    return x, _transform_boxes(sheet.boxes, forward, factor, size)


def _random_affine(count: int, size: int, variation: MosaicVariation) -> tuple[Tensor, Tensor]:
    """(count, 3, 3) transforms from pixels of the canvas to pixels of the image, and their scale factors (count,)."""
    u = _signed(count, 6).double()
    angle, factor = math.radians(variation.rotation_deg) * u[:, 0], 1 + variation.scale_jitter * u[:, 1]
    tan = torch.tan(math.radians(variation.shear_deg) * u[:, 2:4])
    shift = (0.5 + variation.translate * u[:, 4:]) * size
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = factor * torch.cos(angle), factor * torch.sin(angle)
    rotation = _matrices(cos, sin, zero, -sin, cos, zero)
    shear = _matrices(one, tan[:, 0], zero, tan[:, 1], one, zero)
    return _shift(shift) @ shear @ rotation @ _shift(torch.full_like(shift, -size)), factor


def _shift(by_B2: Tensor) -> Tensor:
    """(B, 3, 3) float64 translations."""
    x, y = by_B2.double().unbind(1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices(one, zero, x, zero, one, y)


def _matrices(*values: Tensor) -> Tensor:
    upper = torch.stack(values, 1).view(-1, 2, 3)
    return torch.cat([upper, upper.new_tensor([0, 0, 1]).expand(len(upper), 1, 3)], 1)


def _transform_boxes(boxes: Tensor, forward: Tensor, factor: Tensor, size: int) -> Tensor:
    """Bounding boxes of the transformed corners, clipped to the image; NaN if too little of a box remains."""
    x0, y0, x1, y1 = boxes[..., 1:].unbind(-1)
    corners = torch.stack([torch.stack([x, y], -1) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], -2)
    corners = affine_points(forward[:, None, None, :2], corners)
    clipped = torch.cat([corners.amin(2), corners.amax(2)], -1).clamp(0, size)
    wide, high = (clipped[..., 2:] - clipped[..., :2]).unbind(-1)
    before = (boxes[..., 3] - boxes[..., 1]) * (boxes[..., 4] - boxes[..., 2]) * factor[:, None] ** 2
    keep = (wide > _SMALLEST_PX) & (high > _SMALLEST_PX) & (wide * high > _LEAST_AREA * before)
    keep &= (before > 0) & (wide < _LONGEST * high) & (high < _LONGEST * wide)
    keep |= (boxes[..., 0] < 0) & (wide > 0) & (high > 0)
    transformed = torch.cat([boxes[..., :1], clipped / size], -1)
    return torch.where(keep[..., None], transformed, math.nan)


def _mixup(x: Tensor, boxes: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Blend the last images into those with the indices `mixed`, one into each, and return the others with their
    boxes."""
    count = len(x) - len(mixed)
    blended, added = x[:count].clone(), torch.full_like(boxes[:count], math.nan)
    weight = _to_device(torch.distributions.Beta(MIXED, MIXED).sample((len(mixed), 1, 1, 1)), x)
    blended[mixed] = torch.lerp(x[count:], blended[mixed], weight)
    added[mixed] = boxes[count:]
    return blended, torch.cat([boxes[:count], added], 1)


def _mirror_boxes(boxes: Tensor, flipped: Tensor) -> Tensor:
    mirror = torch.stack([boxes[..., 0], 1 - boxes[..., 3], boxes[..., 2], 1 - boxes[..., 1], boxes[..., 4]], -1)
    return torch.where(flipped.view(-1, 1, 1), mirror, boxes)
