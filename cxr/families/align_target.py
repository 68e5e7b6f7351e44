"""What an aligner aligns images to: the saved target, the images' lungs, and the features of the perceptual loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import storage
from cxr.errors import UserError
from cxr.families import lung_pretraining
from cxr.imaging.lung_bbox import MARGIN, lung_square
from cxr.models import perceptual, pretrained, weight_files
from cxr.models.backbones import normalize_contrast
from cxr.models.perceptual import FeatureKind
from cxr.models.small_unet import LungField

LARGEST_LUNG_SIZE = 160  # px of the images on which the shipped lung network was trained


def read_target(uri: str) -> Tensor:
    """A target (H, W) that `AlignTask.save_pictures` wrote as target.pt.

    Raises:
        UserError: there is nothing at the URI, or no target.
    """
    target = weight_files.load(storage.read_bytes(uri), uri)
    if not isinstance(target, Tensor) or target.ndim != 2:
        raise UserError(
            f"expected a target, a tensor (height, width) as saved in target.pt, at {uri}, got something else"
        )
    return target


@torch.no_grad()
def lung_crops(lungs: LungField, x_B1HH: Tensor) -> Tensor:
    """Transforms (B, 2, 3) that crop square images in [0, 1] to the square around their lungs, with `MARGIN`.

    Images whose lungs are implausible (see `imaging.lung_bbox`) are not cropped.
    """
    size = min(x_B1HH.shape[-1], LARGEST_LUNG_SIZE)
    small = F.interpolate(x_B1HH, (size, size), mode="bilinear", antialias=True)
    masks_BHH = (lungs(normalize_contrast(small)) > 0.5)[:, 0].cpu().numpy()
    theta = []
    for square in (lung_square(mask_HH, MARGIN) for mask_HH in masks_BHH):
        x, y = (2 * start + square.side - size for start in (square.x, square.y))
        theta.append([[square.side, 0, x], [0, square.side, y]])
    return torch.tensor(theta, dtype=torch.float32, device=x_B1HH.device) / size


def feature_network(kind: FeatureKind, source: str, last: int, first: int) -> nn.Module:
    """The frozen network of a perceptual loss that returns its layers `first` to `last`.

    Args:
        source: URI of its weights; not used by `local`. `pretrained.AUTO`, for `lungs`: the shipped lung network.
    """
    if kind == "local":
        return perceptual.build("local", None, last, first)
    shipped = kind == "lungs" and source == pretrained.AUTO
    state = lung_pretraining.load_weights(lung_pretraining.SHIPPED) if shipped else pretrained.from_uri(source)
    return perceptual.build(kind, state, last, first)
