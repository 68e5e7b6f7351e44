"""The input contract of a network: channels, value range, normalization, size and crop rule, saved with its weights.

Weights are useless with other inputs than those they were trained with, and nothing fails: a network for values in
[-1024, 1024] gives plausible, wrong scores for values in [0, 1]. All networks here take gray values in [0, 1]
(B, 1, H, W) and apply their contract themselves, so that callers cannot get it wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from cxr.errors import UserError

CropRule = Literal["letterbox", "center"]
Resampling = Literal["area", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class InputContract:
    """What the first layer of a network expects.

    A gray value g in [0, 1] becomes `low + (high - low) · g`, for `range` (low, high). It is copied to all channels,
    and each channel has its `mean` subtracted and is divided by its `std`, which are in units of the range.

    Raises:
        UserError: a value is invalid.
    """

    size: int = 256
    """Height and width of the network's input in pixels."""
    channels: Literal[1, 3] = 1
    """Number of input channels. Three channels are three copies of the gray image before normalization."""
    range: tuple[float, float] = (0.0, 1.0)
    """Values of black and white before normalization."""
    mean: tuple[float, ...] = (0.0,)
    """Value subtracted from each channel."""
    std: tuple[float, ...] = (1.0,)
    """Value by which each channel is divided."""
    crop: CropRule = "letterbox"
    """letterbox: the whole image, with black bars beside its short side. center: the largest centered square. A lung
    crop or an aligner takes the place of either."""
    resampling: Resampling = "area"
    """How originals are resized. area: mean over the area of a pixel. gaussian: Gaussian filter with a standard
    deviation of (factor - 1) / 2 pixels, then linear interpolation, as scikit-image does."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"input size: expected 1 or more pixels, got {self.size}")
        if self.channels not in (1, 3):
            raise UserError(f"input channels: expected 1 or 3, got {self.channels}")
        if len(self.range) != 2 or not _finite(self.range) or self.range[0] >= self.range[1]:
            raise UserError(f"input range: expected two numbers, the smaller one first, got {self.range}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels or not _finite(values):
                raise UserError(
                    f"input {name}: expected one number for each of {self.channels} channels, got {values}"
                )
        if min(self.std) <= 0:
            raise UserError(f"input std: expected positive numbers, got {self.std}")
        if self.crop not in get_args(CropRule):
            raise UserError(f"input crop: expected one of {', '.join(get_args(CropRule))}, got {self.crop}")
        if self.resampling not in get_args(Resampling):
            raise UserError(
                f"input resampling: expected one of {', '.join(get_args(Resampling))}, got {self.resampling}"
            )
        if (self.crop, self.resampling) == ("letterbox", "gaussian"):
            raise UserError("input resampling: gaussian needs crop=center, got crop=letterbox")

    @property
    def bits(self) -> Literal[8, 32]:
        """Bits of a gray value when an original is scored.

        Values from Gaussian resampling are not rounded: even rounding to 16 bits changed probabilities by 3e-4.
        """
        return 32 if self.resampling == "gaussian" else 8

    def apply(self, x_B1HW: Tensor) -> Tensor:
        """Gray values (B, 1, H, W) in [0, 1] as the network's input, float32 (B, channels, H, W).

        Height and width are left alone. Uses no tensors besides `x_B1HW`, so that the host never waits for a GPU.
        """
        low, high = self.range
        x_B1HW = x_B1HW.float()
        if (low, high) != (0.0, 1.0):
            x_B1HW = x_B1HW * (high - low) + low
        by_channel = [(x_B1HW - mean) / std for mean, std in zip(self.mean, self.std, strict=True)]
        return torch.cat(by_channel, 1) if self.channels > 1 else by_channel[0]

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The contract that `to_dict` described.

        Raises:
            UserError: a value is missing, unknown or invalid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise UserError(
                f"input contract: expected {', '.join(sorted(names))}, got {', '.join(sorted(values)) or 'nothing'}"
            )
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)

    def differences(self, other: InputContract) -> list[str]:
        """A description of each value in which `other` differs."""
        own, others = self.to_dict(), other.to_dict()
        return [f"{name}: {own[name]} and {others[name]}" for name in own if own[name] != others[name]]


def _finite(values: tuple[float, ...]) -> bool:
    return all(math.isfinite(value) for value in values)


UNIT = InputContract()
IMAGENET = InputContract(size=224, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

CONTRACTS: Mapping[str, InputContract] = {
    "unit": UNIT,
    "imagenet": IMAGENET,  # torchvision's and most of timm's weights
    "inception": InputContract(size=299, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),  # Szegedy et al. 2016
    "dinov2": IMAGENET.replace(size=518),  # Oquab et al. 2023: ImageNet's normalization, last trained at 518 px
    "rad-dino": InputContract(  # Perez-Garcia et al. 2024, preprocessor_config.json of microsoft/rad-dino
        size=518, channels=3, mean=(0.5307,) * 3, std=(0.2583,) * 3, crop="center"
    ),
    "eva-x": InputContract(  # Yao et al. 2024, classification/utils/datasets.py of github.com/hustvl/EVA-X
        size=224, channels=3, mean=(0.49185243,) * 3, std=(0.28509309,) * 3
    ),
    "clip": InputContract(  # Radford et al. 2021, clip.py of github.com/openai/CLIP
        size=224,
        channels=3,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    "torchxrayvision": InputContract(  # Cohen et al. 2022, XRayCenterCrop and XRayResizer
        size=224, range=(-1024.0, 1024.0), crop="center", resampling="gaussian"
    ),
}
"""Contracts of well-known weights, each at the size at which they are usually used."""


def named(name: str, size: int = 0) -> InputContract:
    """A contract of `CONTRACTS`, at `size` pixels or at its usual size.

    Raises:
        UserError: there is no such contract.
    """
    if name not in CONTRACTS:
        raise UserError(f"input: expected one of {', '.join(CONTRACTS)}, got {name!r}")
    return CONTRACTS[name].replace(size=size) if size else CONTRACTS[name]
