"""Contrast-induced attention (Liu et al., ICCV 2019): locates findings by comparison with normal X-rays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.classifier import Classifier, load_body
from cxr.models.mil_loss import log_absent, unlikely_bias
from cxr.models.pretrained import Fit
from cxr.models.spatial_transformer import SpatialTransformer, identity
from cxr.precision import affine_points, in_float32

ContrastBackbone = Literal["resnet18", "resnet34", "resnet50"]
CONTRAST_BACKBONES: tuple[ContrastBackbone, ...] = get_args(ContrastBackbone)
ContrastStages = Literal[3, 4]
HEAD_WIDTH = 512
LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


class ContrastAttention(nn.Module):
    """Aligned images (B, 1, H, W) in [0, 1] to logits of findings in each cell, (B, K, grid, grid).

    Every image, with findings or without, is compared with an image without findings. If F are its features and N
    those of the other image, A = max over channels of |F − N|, scaled to [0, 1], and the head sees A · F. In
    training, N are the features of one other image. In use, N is `mean_negative`, the mean over training images
    without findings, which is why all images must be aligned to the same frame.

    Args:
        backbone: a ResNet of torchvision.
        grid: cells per side; features of another size are pooled or interpolated.
        stages: number of stages of the backbone; 4 reduce an image by 32, 3 by 16.
        aligner: predicts the transform into the common frame; not trained with the rest.

    Raises:
        ValueError: there is no such backbone or number of stages, or the grid has no cells.
    """

    mean_negative: Tensor
    thresholds: Tensor

    def __init__(
        self,
        backbone: ContrastBackbone,
        findings: Sequence[str],
        grid: int,
        stages: ContrastStages = 4,
        aligner: SpatialTransformer | None = None,
    ) -> None:
        super().__init__()
        if backbone not in CONTRAST_BACKBONES or stages not in get_args(ContrastStages) or grid < 1:
            raise ValueError(
                f"expected backbone {', '.join(CONTRAST_BACKBONES)}, 3 or 4 stages and a grid of at least 1, got "
                f"{backbone}, {stages} and {grid}"
            )
        self.findings, self.grid = tuple(findings), grid
        self.backbone = _headless(backbone, stages)
        channels = _channels(self.backbone)
        self.head = nn.Sequential(
            nn.Conv2d(channels, HEAD_WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(HEAD_WIDTH, len(self.findings), 1)
        )
        nn.init.constant_(self.head[2].bias, unlikely_bias(grid))  # pyright: ignore[reportArgumentType]
        self.aligner = aligner.requires_grad_(False).eval() if aligner is not None else None
        self.register_buffer("mean_negative", torch.zeros(channels, grid, grid))
        self.register_buffer("thresholds", torch.full((len(self.findings),), 0.5, dtype=torch.float64))

    def train(self, mode: bool = True) -> ContrastAttention:
        super().train(mode)
        if self.aligner is not None:
            self.aligner.eval()
        return self

    def forward(self, x_B1HW: Tensor) -> Tensor:
        """Logits as in use: compared with the mean of the images without findings."""
        return self.located(self.features(x_B1HW), self.mean_negative)

    def theta(self, x_B1HW: Tensor) -> Tensor:
        """`theta_unit` (B, 2, 3), from the common frame to the given images; the identity without an aligner."""
        with torch.no_grad():
            return identity(x_B1HW.shape[0], x_B1HW.device) if self.aligner is None else self.aligner(x_B1HW)

    def features(self, x_B1HW: Tensor) -> Tensor:
        """(B, channels, grid, grid), without negative values."""
        x = self.backbone.contract.apply(x_B1HW)
        for layer in self.layers():
            x = layer(x)
        return resized(x, self.grid)

    def layers(self) -> list[nn.Module]:
        """The layers of the backbone, in order."""
        return [self.backbone.body.get_submodule(name) for name in LAYERS]

    def located(self, own_BCPP: Tensor, other_BCPP: Tensor) -> Tensor:
        """Logits from an image's features and those of an image without findings; one (C, grid, grid) may serve
        all."""
        return self.head(contrast(own_BCPP, other_BCPP) * own_BCPP)


def contrast(own_BCPP: Tensor, other_BCPP: Tensor) -> Tensor:
    """Attention (B, 1, P, P), float32: 0 where the features differ least and 1 where they differ most."""
    apart = (own_BCPP.float() - other_BCPP.float()).abs().amax(1, keepdim=True)
    low, high = apart.amin((2, 3), keepdim=True), apart.amax((2, 3), keepdim=True)
    return (apart - low) / (high - low + 1e-6)


def probabilities(logits_BKPP: Tensor) -> Tensor:
    """(B, K) probability that an image shows a finding: 1 − ∏(1 − p_j)."""
    return -torch.expm1(log_absent(logits_BKPP))


def resized(features_BCHW: Tensor, grid: int) -> Tensor:
    """Features on another grid: pooled to a coarser one, interpolated to a finer one."""
    side = features_BCHW.shape[-1]
    if side == grid:
        return features_BCHW
    if side > grid:
        return F.adaptive_avg_pool2d(features_BCHW, grid)
    return F.interpolate(features_BCHW, size=(grid, grid), mode="bilinear")


@in_float32
def warp_boxes(boxes_BN4: Tensor, theta: Tensor) -> Tensor:
    """Boxes in the output of `warp` by `theta` (B, 2, 3) to the axis-aligned hulls of where it samples the input.

    Boxes are x_min, y_min, x_max, y_max as fractions (0–1) of the output; the results are fractions of the input, not
    clipped to it. Use `spatial_transformer.invert(theta)` for the opposite direction. NaN stays NaN.
    """
    x0, y0, x1, y1 = (2 * boxes_BN4 - 1).unbind(-1)
    corners_BN42 = torch.stack([torch.stack([x, y], -1) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], -2)
    moved_BN42 = affine_points(theta[:, None, None].to(boxes_BN4), corners_BN42)
    return (torch.cat([moved_BN42.amin(-2), moved_BN42.amax(-2)], -1) + 1) / 2


def load_backbone(network: ContrastAttention, state: Mapping[str, Tensor]) -> Fit:
    """Load torchvision's state dict, or that of a network that contains a Classifier; raises as `load_body`."""
    return load_body(network.backbone, state)


def _headless(name: ContrastBackbone, stages: ContrastStages) -> Classifier:
    classifier = Classifier(name, 1)
    classifier.body.fc = nn.Identity()
    if stages < 4:
        classifier.body.layer4 = nn.Identity()
    return classifier


def _channels(backbone: Classifier) -> int:
    """Number of channels of the backbone's features."""
    return max(layer.out_channels for layer in backbone.body.modules() if isinstance(layer, nn.Conv2d))
