"""The spatial transformer (Jaderberg et al. 2015, arXiv 1506.02025) and the algebra of 2 x 3 transforms.

A transform `theta_unit` (B, 2, 3) maps output points to input points, x to the right, y down, both axes
from −1 to 1 between the image's outer edges (`affine_grid` with align_corners=False).

The network's layers may run in bfloat16; all that is done with transforms is float32 (`cxr.precision`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.backbones import normalise_contrast
from cxr.precision import affine_grid, affine_points, in_float32, outside_autocast

Parameterization = Literal["similarity", "anisotropic", "affine"]
PARAMETERS: dict[Parameterization, int] = {"similarity": 4, "anisotropic": 5, "affine": 6}

MAX_ROTATION = math.radians(30)
MAX_SCALE = 2.0
MAX_SHIFT = 0.5
MAX_SHEAR = 0.3


class SpatialTransformer(nn.Module):
    """Finds the transform that brings an image into the common frame; starts as the identity.

    Args:
        trunk: contrast-normalized (B, 1, H, W), with `lungs` (B, 2, H, W), to (B, trunk.features); see
            `backbones.trunk`.
        parameterization: similarity (4 parameters), anisotropic (5: two scales) or affine (6: shear too).
        passes: how often the network is applied, each time to what it has aligned so far. The transforms are
            composed and the original is sampled once, so further passes cost no sharpness.
        lungs: shows the trunk where the lungs are, as a second channel; see `lung_field.LungField`. It is not
            trained with the rest.
    """

    def __init__(
        self,
        trunk: nn.Module,
        parameterization: Parameterization = "anisotropic",
        passes: int = 1,
        lungs: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if parameterization not in PARAMETERS or passes < 1:
            raise ValueError(f"{parameterization!r}, passes={passes}: wanted {', '.join(PARAMETERS)}, 1 pass or more")
        self.trunk = trunk
        self.head = nn.Linear(int(trunk.features), PARAMETERS[parameterization])  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.parameterization: Parameterization = parameterization
        self.passes = passes
        self.lungs = lungs.requires_grad_(False) if lungs is not None else None

    def forward(self, x_B1HW: Tensor) -> Tensor:
        """Images in [0, 1] to `theta_unit` (B, 2, 3), float32; `bounded_theta` bounds each pass."""
        shown_BCHW = self.shown(normalise_contrast(x_B1HW))
        theta = self.localize(shown_BCHW)
        for _ in range(self.passes - 1):
            theta = compose(theta, self.localize(warp(shown_BCHW, theta)))
        return theta

    def shown(self, z_B1HW: Tensor) -> Tensor:
        """What the trunk sees of contrast-normalized images: these, and the lung fields found in them."""
        return z_B1HW if self.lungs is None else torch.cat([z_B1HW, self.lungs(z_B1HW)], 1)

    def localize(self, shown_BCHW: Tensor) -> Tensor:
        """One pass. The last layer, whose outputs are coordinates, is float32 under any autocast."""
        features_BC = self.trunk(shown_BCHW)
        with outside_autocast(features_BC.device):
            return bounded_theta(self.head(features_BC.float()), self.parameterization)


@in_float32
def bounded_theta(raw_BP: Tensor, parameterization: Parameterization) -> Tensor:
    """Free numbers to transforms: 0 is the identity, no number leaves the bounds, no transform mirrors.

    Rotation within ±30°, each scale within [1/2, 2], shifts within ±1/2, shear within ±.3. The order is
    tx, ty, rotation, then the scales, then the shear:
    theta = [[sx cos, −sy sin, tx], [sx sin, sy cos, ty]] for two scales without shear.
    """
    t = torch.tanh(raw_BP)
    shift = MAX_SHIFT * t[:, 0:2]
    cos, sin = torch.cos(MAX_ROTATION * t[:, 2]), torch.sin(MAX_ROTATION * t[:, 2])
    sx = torch.pow(MAX_SCALE, t[:, 3])
    sy = sx if parameterization == "similarity" else torch.pow(MAX_SCALE, t[:, 4])
    shear = MAX_SHEAR * t[:, 5] if parameterization == "affine" else torch.zeros_like(sx)
    x_axis = torch.stack([sx * cos, sx * sin], 1)
    y_axis = torch.stack([sy * (shear * cos - sin), sy * (shear * sin + cos)], 1)
    return torch.stack([x_axis, y_axis, shift], 2)


def identity(count: int = 1, device: torch.device | str | None = None) -> Tensor:
    """`count` transforms that change nothing, (count, 2, 3) float32."""
    return torch.eye(2, 3, device=device).repeat(count, 1, 1)


@in_float32
def warp(x_BCHW: Tensor, theta_unit: Tensor, size: int | None = None) -> Tensor:
    """Sample images where `theta_unit` (B or 1, 2, 3) sends each output point; black outside; float32.

    `size` is the height and width of the output, the input's if not given.
    """
    height, width = x_BCHW.shape[-2:]
    grid = affine_grid(theta_unit.float(), size or height, size or width).expand(len(x_BCHW), -1, -1, -1)
    return F.grid_sample(x_BCHW.float(), grid, padding_mode="zeros", align_corners=False)


@in_float32
def compose(first: Tensor, second: Tensor) -> Tensor:
    """The one transform whose warp equals a warp by `first` followed by a warp by `second`.

    As maps of points: output → `second` → `first` → input.
    """
    linear = (first[..., :2, None] * second[..., None, :, :2]).sum(-2)
    return torch.cat([linear, affine_points(first, second[..., 2])[..., None]], -1)


@in_float32
def invert(theta: Tensor) -> Tensor:
    """The transform that undoes `theta`; its 2 x 2 part must not be singular."""
    (a, b, tx), (c, d, ty) = (row.unbind(-1) for row in theta.unbind(-2))
    det = a * d - b * c
    x_row = torch.stack([d, -b, b * ty - d * tx], -1)
    y_row = torch.stack([-c, a, c * tx - a * ty], -1)
    return torch.stack([x_row, y_row], -2) / det[..., None, None]


@in_float32
def corner_distance(theta_a: Tensor, theta_b: Tensor) -> Tensor:
    """(B,) mean distance between where two transforms send the four corners, as a share of the width."""
    x_axis, y_axis, shift = (theta_a - theta_b).unbind(-1)
    offsets_unit = torch.stack([shift + x * x_axis + y * y_axis for x in (1, -1) for y in (1, -1)], -2)
    return torch.sqrt(offsets_unit.square().sum(-1) + 1e-12).mean(-1) / 2


@in_float32
def frame_distance(theta_a: Tensor, theta_b: Tensor) -> Tensor:
    """(B,) how far apart two alignments of one image are: corner distance of a∘b⁻¹ from the identity.

    Measured between points of the image, hence blind to the choice of the common frame: zooming every output
    in or out changes nothing, as compose(a, g) and compose(b, g) are as far apart as a and b.
    """
    return corner_distance(compose(theta_a, invert(theta_b)), identity(1, theta_a.device))
