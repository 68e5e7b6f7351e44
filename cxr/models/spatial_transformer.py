"""The spatial transformer (Jaderberg et al. 2015, arXiv 1506.02025) and the algebra of 2 x 3 transforms.

A transform `theta_unit` (B, 2, 3) maps output points to input points, x to the right, y down, both axes
from −1 to 1 between the image's outer edges (`affine_grid` with align_corners=False).

The network's layers may run in bfloat16; everything that involves transforms runs in float32 (`cxr.precision`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.backbones import normalize_contrast
from cxr.precision import affine_grid, affine_points, in_float32, outside_autocast

Parameterization = Literal["similarity", "anisotropic", "affine"]
PARAMETERS: dict[Parameterization, int] = {"similarity": 4, "anisotropic": 5, "affine": 6}

MAX_ROTATION = math.radians(30)
MAX_SCALE = 2.0
MAX_TRANSLATION = 0.5
MAX_SHEAR = 0.3


class SpatialTransformer(nn.Module):
    """Predicts the transform that brings an image into the common frame; starts as the identity.

    Args:
        backbone: contrast-normalized images (B, 1, H, W), or with `lungs` (B, 2, H, W), to (B, backbone.features);
            see `backbones.make_backbone`.
        parameterization: similarity (4 parameters), anisotropic (5: two scales) or affine (6: also shear).
        iterations: number of times that the network is applied, each time to the image aligned so far. The transforms
            are composed and the original is sampled once, so that more iterations do not blur the image.
        lungs: a `small_unet.LungField` whose lung map is a second input channel. It is not trained with the rest.
        reduction: factor by which image and lung map are reduced before the backbone sees them. Each pixel of a
            reduced map is the fraction of its area that shows lung, so that hardly any precision is lost.

    Raises:
        ValueError: there is no such parameterization, or `iterations` or `reduction` is below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        parameterization: Parameterization = "anisotropic",
        iterations: int = 1,
        lungs: nn.Module | None = None,
        reduction: int = 1,
    ) -> None:
        super().__init__()
        if parameterization not in PARAMETERS or iterations < 1 or reduction < 1:
            raise ValueError(
                f"expected parameterization {', '.join(PARAMETERS)}, and iterations and reduction of at least 1, got "
                f"{parameterization}, {iterations} and {reduction}"
            )
        self.backbone = backbone
        features = int(backbone.features)  # pyright: ignore[reportArgumentType]
        self.head = nn.Linear(features, PARAMETERS[parameterization])
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.parameterization: Parameterization = parameterization
        self.iterations, self.reduction = iterations, reduction
        self.lungs = lungs.requires_grad_(False) if lungs is not None else None

    def forward(self, x_B1HW: Tensor) -> Tensor:
        """Images in [0, 1] to `theta_unit` (B, 2, 3), float32. `bounded_theta` bounds each iteration's transform."""
        z_BCHW = self.input_channels(normalize_contrast(x_B1HW))
        if self.reduction > 1:
            z_BCHW = F.avg_pool2d(z_BCHW, self.reduction)
        theta = self.localize(z_BCHW)
        for _ in range(self.iterations - 1):
            theta = compose(theta, self.localize(warp(z_BCHW, theta)))
        return theta

    def input_channels(self, z_B1HW: Tensor) -> Tensor:
        """Contrast-normalized images with, as a second channel, the lung fields predicted in them, if any."""
        return z_B1HW if self.lungs is None else torch.cat([z_B1HW, self.lungs(z_B1HW)], 1)

    def localize(self, z_BCHW: Tensor) -> Tensor:
        """One iteration's transform. The last layer outputs coordinates and so runs in float32 under any autocast."""
        features_BC = self.backbone(z_BCHW)
        with outside_autocast(features_BC.device):
            return bounded_theta(self.head(features_BC.float()), self.parameterization)


@in_float32
def bounded_theta(raw_BP: Tensor, parameterization: Parameterization) -> Tensor:
    """Unbounded numbers to bounded transforms: 0 is the identity, and no transform mirrors.

    Rotation is within ±30°, each scale within [1/2, 2], the translation within ±1/2, the shear within ±.3. The order
    is tx, ty, rotation, scales, shear. With two scales and no shear,
    theta = [[sx cos, −sy sin, tx], [sx sin, sy cos, ty]].
    """
    t = torch.tanh(raw_BP)
    translation = MAX_TRANSLATION * t[:, 0:2]
    cos, sin = torch.cos(MAX_ROTATION * t[:, 2]), torch.sin(MAX_ROTATION * t[:, 2])
    sx = torch.pow(MAX_SCALE, t[:, 3])
    sy = sx if parameterization == "similarity" else torch.pow(MAX_SCALE, t[:, 4])
    shear = MAX_SHEAR * t[:, 5] if parameterization == "affine" else torch.zeros_like(sx)
    x_axis = torch.stack([sx * cos, sx * sin], 1)
    y_axis = torch.stack([sy * (shear * cos - sin), sy * (shear * sin + cos)], 1)
    return torch.stack([x_axis, y_axis, translation], 2)


def identity(count: int = 1, device: torch.device | str | None = None) -> Tensor:
    """`count` identity transforms, (count, 2, 3) float32."""
    return torch.eye(2, 3, device=device).repeat(count, 1, 1)


@in_float32
def warp(x_BCHW: Tensor, theta_unit: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
    """Sample images at the points to which `theta_unit` (B or 1, 2, 3) maps the output's; black outside; float32.

    `size` is the height and width of the output, one number for both if it is square; by default those of the input.
    """
    height, width = (size, size) if isinstance(size, int) else size or x_BCHW.shape[-2:]
    grid = affine_grid(theta_unit.float(), height, width).expand(x_BCHW.shape[0], -1, -1, -1)
    return F.grid_sample(x_BCHW.float(), grid, padding_mode="zeros", align_corners=False)


@in_float32
def compose(first: Tensor, second: Tensor) -> Tensor:
    """The transform whose warp equals a warp by `first` followed by a warp by `second`.

    As a map of points: output → `second` → `first` → input.
    """
    linear = (first[..., :2, None] * second[..., None, :, :2]).sum(-2)
    return torch.cat([linear, affine_points(first, second[..., 2])[..., None]], -1)


@in_float32
def invert(theta: Tensor) -> Tensor:
    """The inverse of `theta`, whose 2 x 2 part must not be singular."""
    (a, b, tx), (c, d, ty) = (row.unbind(-1) for row in theta.unbind(-2))
    det = a * d - b * c
    x_row = torch.stack([d, -b, b * ty - d * tx], -1)
    y_row = torch.stack([-c, a, c * tx - a * ty], -1)
    return torch.stack([x_row, y_row], -2) / det[..., None, None]


@in_float32
def corner_distance(theta_a: Tensor, theta_b: Tensor) -> Tensor:
    """(B,) mean distance between the images of the four corners under two transforms, as a fraction of the width."""
    x_axis, y_axis, translation = (theta_a - theta_b).unbind(-1)
    offsets_unit = torch.stack([translation + x * x_axis + y * y_axis for x in (1, -1) for y in (1, -1)], -2)
    return torch.sqrt(offsets_unit.square().sum(-1) + 1e-12).mean(-1) / 2


@in_float32
def frame_distance(theta_a: Tensor, theta_b: Tensor) -> Tensor:
    """(B,) distance between two alignments of one image: the corner distance of a∘b⁻¹ from the identity.

    It is measured between points of the image, so it does not depend on the common frame: compose(a, g) and
    compose(b, g) are as far apart as a and b, so zooming all outputs changes nothing.
    """
    return corner_distance(compose(theta_a, invert(theta_b)), identity(1, theta_a.device))
