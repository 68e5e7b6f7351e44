"""Random augmentation of images together with their masks, on the training device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.augment.affine_exposure import random_affine, random_exposure
from cxr.precision import affine_grid

UNKNOWN = 255  # pixel value of unknown masks, as `data.batch.NO_MASK`


@dataclass(frozen=True)
class Variation:
    """Ranges of augmentation, sampled for each image separately. `STILL` changes nothing.

    Raises:
        ValueError: a setting is out of range.
    """

    flip: float = 0.5
    """Probability of mirroring an image left to right."""
    rotation_deg: float = 10.0
    max_zoom: float = 1.1
    """Largest factor by which either axis is enlarged or reduced."""
    translate: float = 0.05
    """Largest translation, as a fraction of the width."""
    elastic: float = 0.01
    """Largest standard deviation of a smooth displacement, as a fraction of the width."""
    cells: int = 6
    """Control points per side of the smooth displacement."""
    gamma: float = 1.3
    contrast: float = 0.2
    brightness: float = 0.1
    noise: float = 0.02
    """Largest standard deviation of Gaussian noise."""

    def __post_init__(self) -> None:
        geometry = self.flip, self.rotation_deg, self.translate, self.elastic
        amounts = *geometry, self.contrast, self.brightness, self.noise
        if min(amounts) < 0 or self.flip > 1 or min(self.max_zoom, self.gamma) < 1 or self.cells < 2:
            raise ValueError(
                f"expected no negative value, flip <= 1, max_zoom >= 1, gamma >= 1 and cells >= 2, got {self}"
            )

    @property
    def moves(self) -> bool:
        """Whether pixels move in other ways than by a flip."""
        return self.rotation_deg > 0 or self.max_zoom > 1 or self.translate > 0 or self.elastic > 0

    @property
    def exposes(self) -> bool:
        """Whether gray values change."""
        return self.gamma > 1 or self.contrast > 0 or self.brightness > 0 or self.noise > 0


STILL = Variation(
    flip=0, rotation_deg=0, max_zoom=1, translate=0, elastic=0, gamma=1, contrast=0, brightness=0, noise=0
)


def augment_with_masks(
    x_B1HW: Tensor, mask_B1HW: Tensor, variation: Variation, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Augment images in [0, 1] and their masks: both move alike, only the images' gray values change.

    Masks remain 0 or 1 in their dtype; a mask that contains 255 is unknown and is returned unchanged. Areas from
    outside the image are black and 0 in the mask. `generator` belongs to the CPU; the host never waits for the
    device.
    """
    x, mask = x_B1HW, mask_B1HW
    if variation.flip > 0:
        flipped = _uniform(len(x), x.device, generator) < variation.flip
        x, mask = torch.where(flipped, x.flip(-1), x), torch.where(flipped, mask.flip(-1), mask)
    if variation.moves:
        x, mask = _sample(x, mask, _random_grid(x, variation, generator))
    if variation.exposes:
        x = random_exposure(
            x,
            gamma=variation.gamma,
            contrast=variation.contrast,
            brightness=variation.brightness,
            noise=variation.noise,
            generator=generator,
        )
    return x, mask


def random_displacement(
    shape: torch.Size, cells: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """(B, H, W, 2) smooth random fields with standard deviation 1 at `cells` x `cells` points and 0 at the edges."""
    inner = torch.randn(shape[0], 2, cells, cells, generator=generator)
    coarse = F.pad(inner, (1, 1, 1, 1)).to(device, non_blocking=True)
    return F.interpolate(coarse, shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def _random_grid(x: Tensor, variation: Variation, generator: torch.Generator | None) -> Tensor:
    """Sampling grid (B, H, W, 2) in `grid_sample`'s coordinates."""
    theta = random_affine(
        len(x),
        rotation_deg=variation.rotation_deg,
        max_zoom=variation.max_zoom,
        translate=variation.translate,
        device=x.device,
        generator=generator,
    )
    grid = affine_grid(theta, *x.shape[-2:])
    if variation.elastic == 0:
        return grid
    strength = 2 * variation.elastic * _uniform(len(x), x.device, generator)  # the width is 2
    return grid + strength * random_displacement(x.shape, variation.cells, x.device, generator)


def _sample(x: Tensor, mask: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    unknown = (mask == UNKNOWN).flatten(1).any(1).view(-1, 1, 1, 1)
    pair = torch.cat([x, mask.to(x.dtype)], 1)
    images, coverage = F.grid_sample(pair, grid, padding_mode="zeros", align_corners=False).split(1, 1)
    return images, torch.where(unknown, mask, (coverage >= 0.5).to(mask.dtype))


def _uniform(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.rand(count, 1, 1, 1, generator=generator).to(device, non_blocking=True)
