"""Settings of classifiers for the random augmentation of whole images, and their use."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cxr.augment.affine_exposure import random_affine, random_exposure
from cxr.augment.crops import random_flips
from cxr.errors import UserError
from cxr.families.base import Recipe
from cxr.models.spatial_transformer import warp


@dataclass(frozen=True, kw_only=True)
class ImageAugmentationRecipe(Recipe):
    """Random geometry and exposure of images without boxes or masks."""

    flip: float = 0.5
    """Augmentation: probability of a horizontal flip."""
    rotation_deg: float = 5.0
    """Augmentation: maximum rotation in degrees."""
    max_zoom: float = 1.1
    """Augmentation: maximum zoom factor of each axis, in and out. 1: no zoom."""
    translate: float = 0.05
    """Augmentation: maximum translation, as a fraction of the width."""
    exposure: float = 0.5
    """Augmentation: strength of changes in exposure and noise, from 0 to 1. 1: gamma up to 1.5, contrast by 30 %,
    brightness by 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip", "translate", "exposure"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if not 1 <= self.max_zoom < math.inf:
            raise UserError(f"max_zoom: expected a factor of 1 or more, got {self.max_zoom}")
        if not 0 <= self.rotation_deg <= 180:
            raise UserError(f"rotation_deg: expected an angle from 0 to 180, got {self.rotation_deg}")

    def augment_images(self, x_B1HW: Tensor) -> Tensor:
        """Randomly changed images; both are float32 in [0, 1]."""
        if self.rotation_deg or self.max_zoom != 1 or self.translate:
            transforms = random_affine(
                len(x_B1HW),
                rotation_deg=self.rotation_deg,
                max_zoom=self.max_zoom,
                translate=self.translate,
                device=x_B1HW.device,
            )
            x_B1HW = warp(x_B1HW, transforms)
        if self.flip:
            x_B1HW = random_flips(x_B1HW, self.flip)
        if self.exposure:
            x_B1HW = random_exposure(
                x_B1HW,
                gamma=1 + 0.5 * self.exposure,
                contrast=0.3 * self.exposure,
                brightness=0.1 * self.exposure,
                noise=0.02 * self.exposure,
            )
        return x_B1HW
