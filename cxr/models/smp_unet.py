"""What all segmentation networks have in common: what they take and give, weights from outside, a frozen backbone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.classifier import IMAGENET_MEAN, IMAGENET_STD
from cxr.models.state_dicts import matching

MULTIPLE = 32  # the largest stride of all backbones
LEAST = 64  # pixels to a side that give each of them something to see


class Segmenter(nn.Module):
    """X-rays (B, 1, H, W) in [0, 1], of any size, to mask logits (B, 1, H, W) and the image's logit (B,), float32.

    The second says whether there is anything to find in the image at all. Images whose sides are no multiples of 32
    px, or below 64, are continued to the right and below by their last pixels; the masks are cut to size again.

    A subclass gives `backbone`, `path` and `segment`; it sees three equal channels, normalized by `mean` and `std`
    as the backbone's weights expect.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.frozen = False
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """The part whose weights come from elsewhere, under torchvision's names."""
        raise NotImplementedError

    def path(self) -> nn.Module:
        """The convolutions down to the coarsest output, for `architecture`."""
        raise NotImplementedError

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images, sides multiples of 32, to logits as `forward` gives them, of any precision."""
        raise NotImplementedError

    def normalized(self, x_B1HW: Tensor) -> Tensor:
        return (x_B1HW.expand(-1, 3, -1, -1) - self.mean) / self.std

    def forward(self, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x_B1HW.shape[-2:]
        more = (0, _rounded(width) - width, 0, _rounded(height) - height)
        whole = F.pad(x_B1HW, more, mode="replicate") if any(more) else x_B1HW
        mask, image = self.segment(self.normalized(whole))
        return mask[..., :height, :width].float(), image.float()

    def freeze_backbone(self, frozen: bool = True) -> None:
        """Keep the backbone as it is: no gradient, no dropout, batch norms by their running statistics; or let go."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if self.frozen:
            self.backbone.train(False)
        return self

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Load torchvision's state dict of the backbone's classifier, or that of a network that holds the backbone.

        Raises:
            ValueError: the weights are not of this backbone.
        """
        own = self.backbone.state_dict()
        self.backbone.load_state_dict(own | matching(own, state, "the backbone"))


class ImageHead(nn.Module):
    """Features (B, C, h, w), by their mean and their maximum over the image, to one logit (B,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, 1)

    def forward(self, features_BChw: Tensor) -> Tensor:
        return self.linear(torch.cat([features_BChw.mean((2, 3)), features_BChw.amax((2, 3))], 1)).squeeze(1)


def _rounded(side: int) -> int:
    return max(LEAST, -(-side // MULTIPLE) * MULTIPLE)
