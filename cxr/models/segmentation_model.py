"""What all segmentation networks share: inputs and outputs, a backbone that can be frozen, and the mask rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models import pretrained
from cxr.models.input_contract import IMAGENET, InputContract
from cxr.models.pretrained import Fit

MULTIPLE = 32  # largest stride of all backbones
MIN_SIDE = 64  # pixels; smaller images leave too few cells at stride 32


class Segmenter(nn.Module):
    """X-rays (B, 1, H, W) in [0, 1] of any size to mask logits (B, 1, H, W) and image logits (B,), float32.

    The image logit says whether the image shows the target at all. Images whose sides are not multiples of 32 px, or
    are below 64 px, are extended to the right and at the bottom by repeating the last pixels; masks are cropped back.

    Subclasses define `backbone`, `encoder_path` and `segment`. They see three channels, normalized as the backbone's
    pretrained weights expect (`contract`).
    """

    def __init__(self, contract: InputContract = IMAGENET) -> None:
        super().__init__()
        self.frozen, self.contract = False, contract

    @property
    def backbone(self) -> nn.Module:
        """The part that can be pretrained; its parameters have torchvision's names."""
        raise NotImplementedError

    def encoder_path(self) -> nn.Module:
        """The convolutions down to the coarsest features, for `receptive_field.summarize_architecture`."""
        raise NotImplementedError

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images, whose sides are multiples of 32, to logits as in `forward`, in any precision."""
        raise NotImplementedError

    def normalized(self, x_B1HW: Tensor) -> Tensor:
        return self.contract.apply(x_B1HW)

    def forward(self, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x_B1HW.shape[-2:]
        padding = (0, _padded(width) - width, 0, _padded(height) - height)
        whole = F.pad(x_B1HW, padding, mode="replicate") if any(padding) else x_B1HW
        mask, image = self.segment(self.normalized(whole))
        return mask[..., :height, :width].float(), image.float()

    def freeze_backbone(self, frozen: bool = True) -> None:
        """Freeze the backbone (no gradients, no dropout, batch norms use their running statistics), or unfreeze
        it."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if self.frozen:
            self.backbone.train(False)
        return self

    def load_backbone(self, state: Mapping[str, Tensor]) -> Fit:
        """Load a state dict of torchvision's classifier, or of any network that contains this backbone.

        Raises:
            ValueError: the weights do not fit this backbone.
        """
        return pretrained.load(self.backbone, state, "the backbone")


class ImageHead(nn.Module):
    """One logit (B,) from features (B, C, h, w), by their mean and their maximum over the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, 1)

    def forward(self, features_BChw: Tensor) -> Tensor:
        return self.linear(torch.cat([features_BChw.mean((2, 3)), features_BChw.amax((2, 3))], 1)).squeeze(1)


class SegmentationModel(nn.Module):
    """A segmenter together with the rule that turns its probabilities into masks.

    Args:
        rule: (top, min_area, bottom) of `metrics.segmentation.mask_thresholds.MaskRule`. A buffer, because training
            may choose it.
    """

    rule: Tensor

    def __init__(self, segmenter: Segmenter, rule: Sequence[float]) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.register_buffer("rule", torch.tensor(rule, dtype=torch.float64))

    def forward(self, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """X-rays (B, 1, H, W) in [0, 1] to mask logits (B, 1, H, W) and image logits (B,)."""
        return self.segmenter(x_B1HW)

    def probabilities(self, x_B1HW: Tensor, *, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Probabilities of pixels (B, H, W) and images (B,), float32.

        With `mirrored`, each is the mean over the image and its mirror image.
        """
        mask, image = (logits.sigmoid() for logits in self(x_B1HW))
        if mirrored:
            flipped_mask, flipped_image = (logits.sigmoid() for logits in self(x_B1HW.flip(-1)))
            mask, image = (mask + flipped_mask.flip(-1)) / 2, (image + flipped_image) / 2
        return mask[:, 0], image


def _padded(side: int) -> int:
    return max(MIN_SIDE, -(-side // MULTIPLE) * MULTIPLE)
