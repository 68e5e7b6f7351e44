"""Images with their boxes varied together as Ultralytics' trainer does: mosaic, affine, mixup, brightness, flip.

The formulas are those of `ultralytics.data.augment` (v8_transforms), done on a whole batch on its device. One thing
differs: pixels lie at the centers of their areas, as boxes have it, where Ultralytics' images are half a pixel off
their boxes. The caller draws the other images of a mosaic or mixup, which Ultralytics takes from the batches that it
loaded last. Of gray images, the jitter of hue, saturation and value is that of the value alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.precision import affine_grid, affine_points

GRAY = 114 / 255  # around images
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
    def combines(self) -> bool:
        """Whether images are shown beside, or in, others."""
        return max(self.mosaic, self.mixup) > 0

    @property
    def moves(self) -> bool:
        """Whether pixels change their places other than by a flip."""
        return max(self.mosaic, self.rotation_deg, self.translate, self.scale, self.shear_deg) > 0


Partners = Callable[[int], tuple[Tensor, Tensor]]
"""So many images (N, 1, H, W), drawn evenly and independently, and their boxes (N, M, 5)."""


def varied(
    x_B1HW: Tensor, boxes_BM5: Tensor, variation: MosaicVariation, partners: Partners | None = None
) -> tuple[Tensor, Tensor]:
    """Square images in [0, 1], and their boxes: [index, x_min, y_min, x_max, y_max] as shares, NaN for no box.

    Returns as many images, and boxes (B, N, 5); N grows with mosaic and mixup: to a multiple of what it was. Draws
    from PyTorch's generator for the CPU; nothing waits for the images' device.

    A box of which too little is shown is left out. One with an index below 0 marks a region rather than something to
    find, and stays as long as anything of it is shown.

    Args:
        partners: draws the images that are shown beside or in others; left out, from the batch.
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
        x, boxes = _mixed(x, boxes, _moved(mixed, x))
    if variation.value > 0:
        x = (x * (1 + variation.value * _moved(_signed(len(x)), x)).view(-1, 1, 1, 1)).clamp(0, 1)
    if variation.flip > 0:
        flipped = _moved(torch.rand(len(x)) < variation.flip, x)
        x, boxes = torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x), _mirrored(boxes, flipped)
    return x, boxes


def _moved(drawn: Tensor, like: Tensor) -> Tensor:
    """What was drawn on the CPU, on the device of the images."""
    return drawn.to(like.device, non_blocking=True)


def _signed(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape) - 1


def _from_batch(x: Tensor, boxes: Tensor) -> Partners:
    def drawn(count: int) -> tuple[Tensor, Tensor]:
        index = _moved(torch.randint(len(x), (count,)), x)
        return x[index], boxes[index]

    return drawn


@dataclass(frozen=True)
class _Sheet:
    """Four images side by side, less GRAY, of which a mosaic shows the part around the point where they meet.

    Ultralytics puts four images on a canvas of twice the size so that they meet in a random place. Here they always
    meet in the middle, and the canvas is what moves: no image has to be cut, and no cut has to be known on the host.

    Args:
        x: (B, 1, 2 size, 2 size); 0 wherever the canvas shows nothing.
        boxes: (B, N, 5) in pixels of the sheet, cut off at the canvas.
        corner: (B, 2) x and y of the canvas's upper left corner on the sheet, whole pixels, on the CPU.
    """

    x: Tensor
    boxes: Tensor
    corner: Tensor


def _sheet(x: Tensor, boxes: Tensor, share: float, partners: Partners) -> _Sheet:
    """Each image with three others, or alone in the middle of its canvas."""
    count, size = len(x), x.shape[-1]
    shown = [(x, boxes), *(partners(count) if share > 0 else (x, boxes) for _ in range(3))]
    sheet = x.new_empty(count, 2, size, 2, size)
    places = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for (right, down), (image, _) in zip(places, shown, strict=True):
        sheet[:, down, :, right] = image[:, 0] - GRAY
    meet = (size / 2 + size * torch.rand(count, 2)).long()  # on the canvas
    mosaic = (torch.rand(count) < share)[:, None]
    low = torch.where(mosaic, size - meet, -(size // 2))
    high = torch.where(mosaic, low + 2 * size, size)
    edges = _moved(torch.stack([low, high], 1), x)
    at = torch.arange(2 * size, device=x.device)
    shown_B2S = (at >= edges[:, 0, :, None]) & (at < edges[:, 1, :, None])
    sheet = sheet.view(count, 1, 2 * size, 2 * size)
    sheet.mul_(shown_B2S[:, 0, None, None, :]).mul_(shown_B2S[:, 1, None, :, None])
    moved = torch.stack([listed for _, listed in shown], 1)
    shift = torch.tensor(places).mul(size).repeat(1, 2)[:, None]
    limits = edges.repeat(1, 1, 2)[:, :, None, None].to(boxes.dtype)
    moved[..., 1:] = (moved[..., 1:] * size + _moved(shift, x)).clamp(limits[:, 0], limits[:, 1])
    return _Sheet(sheet, moved.flatten(1, 2), low)


def _affine(sheet: _Sheet, variation: MosaicVariation) -> tuple[Tensor, Tensor]:
    """The middle of each canvas, turned, scaled, sheared and shifted; boxes as shares again, without what is lost."""
    size = sheet.x.shape[-1] // 2
    forward, factor = _random_affine(len(sheet.x), size, variation)
    forward = forward @ _shift(-sheet.corner)
    unit = torch.tensor([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1]]).double()  # to pixels
    back = torch.tensor([[1 / size, 0, -1], [0, 1 / size, -1], [0, 0, 1]]).double()  # pixels of the sheet to [-1, 1]
    theta = _moved((back @ torch.linalg.inv(forward) @ unit)[:, :2].float(), sheet.x)
    grid = affine_grid(theta, size, size)
    x = F.grid_sample(sheet.x, grid, padding_mode="zeros", align_corners=False) + GRAY
    forward, factor = _moved(forward.float(), sheet.x), _moved(factor.float(), sheet.x)
    return x, _moved_boxes(sheet.boxes, forward, factor, size)


def _random_affine(count: int, size: int, variation: MosaicVariation) -> tuple[Tensor, Tensor]:
    """(count, 3, 3) from pixels of the canvas to pixels of the image, and each one's factor of scale (count,)."""
    u = _signed(count, 6).double()
    angle, factor = math.radians(variation.rotation_deg) * u[:, 0], 1 + variation.scale * u[:, 1]
    tan = torch.tan(math.radians(variation.shear_deg) * u[:, 2:4])
    shift = (0.5 + variation.translate * u[:, 4:]) * size
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = factor * torch.cos(angle), factor * torch.sin(angle)
    turned = _matrices(cos, sin, zero, -sin, cos, zero)
    sheared = _matrices(one, tan[:, 0], zero, tan[:, 1], one, zero)
    return _shift(shift) @ sheared @ turned @ _shift(torch.full_like(shift, -size)), factor


def _shift(by_B2: Tensor) -> Tensor:
    """(B, 3, 3) float64."""
    x, y = by_B2.double().unbind(1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices(one, zero, x, zero, one, y)


def _matrices(*values: Tensor) -> Tensor:
    upper = torch.stack(values, 1).view(-1, 2, 3)
    return torch.cat([upper, upper.new_tensor([0, 0, 1]).expand(len(upper), 1, 3)], 1)


def _moved_boxes(boxes: Tensor, forward: Tensor, factor: Tensor, size: int) -> Tensor:
    """The boxes around the moved corners, cut off at the border; NaN where too little is left of one."""
    x0, y0, x1, y1 = boxes[..., 1:].unbind(-1)
    corners = torch.stack([torch.stack([x, y], -1) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], -2)
    corners = affine_points(forward[:, None, None, :2], corners)
    found = torch.cat([corners.amin(2), corners.amax(2)], -1).clamp(0, size)
    wide, high = (found[..., 2:] - found[..., :2]).unbind(-1)
    before = (boxes[..., 3] - boxes[..., 1]) * (boxes[..., 4] - boxes[..., 2]) * factor[:, None] ** 2
    kept = (wide > _SMALLEST_PX) & (high > _SMALLEST_PX) & (wide * high > _LEAST_AREA * before)
    kept &= (before > 0) & (wide < _LONGEST * high) & (high < _LONGEST * wide)
    kept |= (boxes[..., 0] < 0) & (wide > 0) & (high > 0)
    moved = torch.cat([boxes[..., :1], found / size], -1)
    return torch.where(kept[..., None], moved, math.nan)


def _mixed(x: Tensor, boxes: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """The images without the last ones, which are mixed into those numbered `mixed`, one into each; boxes too."""
    count = len(x) - len(mixed)
    shown, added = x[:count].clone(), torch.full_like(boxes[:count], math.nan)
    weight = _moved(torch.distributions.Beta(MIXED, MIXED).sample((len(mixed), 1, 1, 1)), x)
    shown[mixed] = torch.lerp(x[count:], shown[mixed], weight)
    added[mixed] = boxes[count:]
    return shown, torch.cat([boxes[:count], added], 1)


def _mirrored(boxes: Tensor, flipped: Tensor) -> Tensor:
    mirror = torch.stack([boxes[..., 0], 1 - boxes[..., 3], boxes[..., 2], 1 - boxes[..., 1], boxes[..., 4]], -1)
    return torch.where(flipped.view(-1, 1, 1), mirror, boxes)
