"""U-Nets for segmentation (Ronneberger et al. 2015, arXiv 1505.04597): on torchvision's ResNets, and a small one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.backbones import WIDTHS, conv_block, normalize_contrast
from cxr.models.segmentation_model import ImageHead, Segmenter
from cxr.models.small_unet import DEPTH, SmallUNetBody

UNetBackbone = Literal["resnet18", "resnet34", "resnet50"]
UNET_BACKBONES: tuple[UNetBackbone, ...] = get_args(UNetBackbone)


class UNet(Segmenter):
    """segmentation_models.pytorch's U-Net. Its encoder has torchvision's parameter names; no weights are downloaded.

    Args:
        backbone: a network of torchvision.
        attention: scse weighs channels and positions of the decoder's features (Roy et al. 2018, arXiv 1808.08127).

    Raises:
        ValueError: there is no such backbone or attention.
    """

    def __init__(self, backbone: UNetBackbone = "resnet34", attention: Literal["none", "scse"] = "none") -> None:
        if backbone not in UNET_BACKBONES or attention not in ("none", "scse"):
            raise ValueError(
                f"U-Net: expected backbone {', '.join(UNET_BACKBONES)} and attention none or scse, got {backbone} "
                f"and {attention}"
            )
        super().__init__()
        from segmentation_models_pytorch import Unet  # imported here because it takes seconds

        self.net = Unet(
            backbone, encoder_weights=None, decoder_attention_type=None if attention == "none" else attention
        )
        # The last block's first attention is never called, and DDP fails on parameters without gradients.
        self.net.decoder.blocks[-1].attention1 = nn.Identity()
        self.image_head = ImageHead(self.net.encoder.out_channels[-1])

    @property
    def backbone(self) -> nn.Module:
        return self.net.encoder

    def encoder_path(self) -> nn.Module:
        return self.net.encoder

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.encoder(z_BCHW)
        mask = self.net.segmentation_head(self.net.decoder(features))
        return mask, self.image_head(features[-1])


class SmallUNet(Segmenter):
    """A small U-Net for CPUs, on contrast-normalized images, with masks at full resolution.

    Its backbone is the encoder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = SmallUNetBody(deep=True)
        self.head = SubpixelHead(WIDTHS[0])
        self.image_head = ImageHead(WIDTHS[DEPTH - 1])

    @property
    def backbone(self) -> nn.Module:
        return self.body.down

    def encoder_path(self) -> nn.Module:
        return self.body.down

    def normalized(self, x_B1HW: Tensor) -> Tensor:
        return normalize_contrast(x_B1HW)

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body.encode(z_BCHW)
        return self.head(self.body.decode(features), z_BCHW), self.image_head(features[-1])


class SubpixelHead(nn.Module):
    """Features at half the image's resolution, together with the image, to logits at full resolution.

    The image enters as four channels of half its size, and four output channels are rearranged to full size (Shi et
    al. 2016, arXiv 1609.05158). Convolutions on the full grid would cost four times as much.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = conv_block(channels + 4, channels)
        self.out = nn.Conv2d(channels, 4, 1)

    def forward(self, features_BChw: Tensor, z_B1HW: Tensor) -> Tensor:
        image = F.pixel_unshuffle(z_B1HW, 2).to(features_BChw.dtype)
        return F.pixel_shuffle(self.out(self.mix(torch.cat([features_BChw, image], 1))), 2)
