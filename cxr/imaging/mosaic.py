"""Images with their boxes varied together as Ultralytics' trainer does: mosaic, affine, mixup, brightness, flip.

The formulas are those of `ultralytics.data.augment` (v8_transforms), done on a whole batch on its device. Two things
differ: the other images of a mosaic or mixup come from the same batch, and pixels lie at the centres of their areas,
as boxes have it, where Ultralytics' images are half a pixel off their boxes. Of grey images, the jitter of hue,
saturation and value is that of the value alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = 114 / 255  # around images
MIXED = 32.0  # of the beta distribution from which mixup draws shares
_SMALLEST_PX, _LEAST_AREA, _LONGEST = 2, 0.1, 100  # what must be left of a box: sides, share of its area, their ratio


@dataclass(frozen=True)
class MosaicVariation:
    """How far images may vary; names and defaults are Ultralytics', in the house's units.

    Raises:
        ValueError: a setting that means nothing.
    """

    mosaic: float = 1.0
    """Share of images made of four."""
    mixup: float = 0.0
    """Share of images mixed with another."""
    rotation_deg: float = 0.0
    translate: float = 0.1
    """Largest shift, as a share of the width."""
    scale: float = 0.5
    """Largest enlargement and reduction: factors lie within 1 ± scale."""
    shear_deg: float = 0.0
    flip: float = 0.5
    """Share of images mirrored, left to right."""
    value: float = 0.4
    """Largest change of brightness: factors lie within 1 ± value."""

    def __post_init__(self) -> None:
        shares = (self.mosaic, self.mixup, self.flip, self.value, self.translate)
        if not all(0 <= share <= 1 for share in shares) or not 0 <= self.scale < 1:
            raise ValueError(f"{self}: wanted shares from 0 to 1, scale below 1")
        if not 0 <= self.rotation_deg <= 180 or not 0 <= self.shear_deg < 90:
            raise ValueError(f"{self}: wanted rotation_deg from 0 to 180, shear_deg from 0 up to 90")

    @property
    def moves(self) -> bool:
        """Whether pixels change their places other than by a flip."""
        return max(self.mosaic, self.rotation_deg, self.translate, self.scale, self.shear_deg) > 0


def varied(x_B1HW: Tensor, boxes_BM5: Tensor, variation: MosaicVariation) -> tuple[Tensor, Tensor]:
    """Square images in [0, 1], and their boxes: [index, x_min, y_min, x_max, y_max] as shares, NaN for no box.

    Returns as many images, and boxes (B, N, 5); N grows with mosaic and mixup. Draws from PyTorch's generator for the
    CPU; nothing waits for the images' device.
    """
    x, boxes = x_B1HW, boxes_BM5
    if variation.moves:
        x, boxes = _affine(*_canvas(x, boxes, variation.mosaic), variation)
    if variation.mixup > 0:
        x, boxes = _mixed(x, boxes, variation.mixup)
    if variation.value > 0:
        x = (x * (1 + variation.value * _signed(len(x)).to(x.device)).view(-1, 1, 1, 1)).clamp(0, 1)
    if variation.flip > 0:
        flipped = (torch.rand(len(x)) < variation.flip).to(x.device)
        x, boxes = torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x), _mirrored(boxes, flipped)
    return x, boxes


def _signed(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape) - 1


def _canvas(x: Tensor, boxes: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Canvases of twice the size, less GREY: each image with three others around a point, or alone in the middle.

    Boxes are in pixels of the canvas, those of all its images one after another, cut off at its border.
    """
    count, size = len(x), x.shape[-1]
    partner = torch.cat([torch.arange(count)[:, None], torch.randint(count, (count, 3))], 1)
    corner = _corners(count, size, share)
    canvas = x.new_zeros(count, 1, 2 * size, 2 * size)
    less = x - GREY
    for i, (sources, places) in enumerate(zip(partner.tolist(), corner.tolist(), strict=True)):
        for source, (left, top) in zip(sources, places, strict=True):
            low, high = (max(0, left), max(0, top)), (min(2 * size, left + size), min(2 * size, top + size))
            if high[0] > low[0] and high[1] > low[1]:
                part = less[source, 0, low[1] - top : high[1] - top, low[0] - left : high[0] - left]
                canvas[i, 0, low[1] : high[1], low[0] : high[0]] = part
    moved = boxes[partner.to(x.device)]
    shift = corner.to(x.device, boxes.dtype).repeat(1, 1, 2)[:, :, None]
    moved[..., 1:] = (moved[..., 1:] * size + shift).clamp(0, 2 * size)
    return canvas, moved.flatten(1, 2)


def _corners(count: int, size: int, share: float) -> Tensor:
    """(count, 4, 2) x and y on the canvas of four images' upper left corners; what is not shown lies outside."""
    middle = (size / 2 + size * torch.rand(count, 1, 2)).long()
    around = middle - size * torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]])
    alone = torch.tensor([[size // 2] * 2] + [[2 * size] * 2] * 3)
    return torch.where((torch.rand(count) < share).view(-1, 1, 1), around, alone)


def _affine(canvas: Tensor, boxes: Tensor, variation: MosaicVariation) -> tuple[Tensor, Tensor]:
    """The middle of each canvas, turned, scaled, sheared and shifted; boxes as shares again, without what is lost."""
    size = canvas.shape[-1] // 2
    forward, factor = _random_affine(len(canvas), size, variation)
    unit = torch.tensor([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1]])  # of grid_sample to pixels
    back = torch.tensor([[1 / size, 0, -1], [0, 1 / size, -1], [0, 0, 1]])  # pixels of the canvas to grid_sample's
    theta = (back @ torch.linalg.inv(forward) @ unit)[:, :2].to(canvas)
    with torch.autocast(canvas.device.type, enabled=False):
        grid = F.affine_grid(theta, [len(canvas), 1, size, size], align_corners=False)
        x = F.grid_sample(canvas, grid, padding_mode="zeros", align_corners=False) + GREY
    return x, _moved_boxes(boxes, forward.to(boxes), factor.to(boxes), size)


def _random_affine(count: int, size: int, variation: MosaicVariation) -> tuple[Tensor, Tensor]:
    """(count, 3, 3) from pixels of the canvas to pixels of the image, and each one's factor of scale (count,)."""
    u = _signed(count, 6)
    angle, factor = math.radians(variation.rotation_deg) * u[:, 0], 1 + variation.scale * u[:, 1]
    tan = torch.tan(math.radians(variation.shear_deg) * u[:, 2:4])
    shift = (0.5 + variation.translate * u[:, 4:]) * size
    zero, one = torch.zeros(count), torch.ones(count)
    cos, sin = factor * torch.cos(angle), factor * torch.sin(angle)
    centred = _matrices(one, zero, -size * one, zero, one, -size * one)
    turned = _matrices(cos, sin, zero, -sin, cos, zero)
    sheared = _matrices(one, tan[:, 0], zero, tan[:, 1], one, zero)
    shifted = _matrices(one, zero, shift[:, 0], zero, one, shift[:, 1])
    return shifted @ sheared @ turned @ centred, factor


def _matrices(*values: Tensor) -> Tensor:
    upper = torch.stack(values, 1).view(-1, 2, 3)
    return torch.cat([upper, torch.tensor([0.0, 0.0, 1.0]).expand(len(upper), 1, 3)], 1)


def _moved_boxes(boxes: Tensor, forward: Tensor, factor: Tensor, size: int) -> Tensor:
    """The boxes around the moved corners, cut off at the border; NaN where too little is left of one."""
    x, y = boxes[..., [1, 3, 1, 3]], boxes[..., [2, 4, 4, 2]]
    corners = torch.stack([x, y, torch.ones_like(x)], -1).flatten(1, 2) @ forward[:, :2].mT
    corners = corners.view(*x.shape, 2)
    found = torch.cat([corners.amin(2), corners.amax(2)], -1).clamp(0, size)
    wide, high = (found[..., 2:] - found[..., :2]).unbind(-1)
    before = (boxes[..., 3] - boxes[..., 1]) * (boxes[..., 4] - boxes[..., 2]) * factor[:, None] ** 2
    kept = (wide > _SMALLEST_PX) & (high > _SMALLEST_PX) & (wide * high > _LEAST_AREA * before)
    kept &= (before > 0) & (wide < _LONGEST * high) & (high < _LONGEST * wide)
    moved = torch.cat([boxes[..., :1], found / size], -1)
    return torch.where(kept[..., None], moved, math.nan)


def _mixed(x: Tensor, boxes: Tensor, share: float) -> tuple[Tensor, Tensor]:
    count = len(x)
    other = torch.randint(count, (count,)).to(x.device)
    chosen = (torch.rand(count) < share).to(x.device)
    weight = torch.distributions.Beta(MIXED, MIXED).sample((count,)).to(x)
    weight = torch.where(chosen, weight, 1.0).view(-1, 1, 1, 1)
    added = torch.where(chosen.view(-1, 1, 1), boxes[other], math.nan)
    return torch.lerp(x[other], x, weight), torch.cat([boxes, added], 1)


def _mirrored(boxes: Tensor, flipped: Tensor) -> Tensor:
    mirror = torch.stack([boxes[..., 0], 1 - boxes[..., 3], boxes[..., 2], 1 - boxes[..., 1], boxes[..., 4]], -1)
    return torch.where(flipped.view(-1, 1, 1), mirror, boxes)
