"""U-Nets (Ronneberger et al. 2015, arXiv 1505.04597): on torchvision's ResNets, and a small one for CPUs."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models.backbones import WIDTHS, conv_block, normalise_contrast
from cxr.models.small_unet import DEPTH, SmallUNetBody
from cxr.models.smp_unet import ImageHead, Segmenter

UnetEncoder = Literal["resnet18", "resnet34", "resnet50"]
UNET_ENCODERS: tuple[UnetEncoder, ...] = get_args(UnetEncoder)


class UNet(Segmenter):
    """segmentation_models.pytorch's U-Net; its encoder keeps torchvision's names of weights, none is ever fetched.

    Args:
        encoder: network of torchvision.
        attention: "scse" weighs channels and places of the decoder's features (Roy et al. 2018, arXiv 1808.08127).

    Raises:
        ValueError: no such encoder or attention.
    """

    def __init__(self, encoder: UnetEncoder = "resnet34", attention: Literal["none", "scse"] = "none") -> None:
        if encoder not in UNET_ENCODERS or attention not in ("none", "scse"):
            raise ValueError(
                f"U-Net with encoder {encoder!r}, attention {attention!r}: wanted one of {', '.join(UNET_ENCODERS)}; "
                f"none or scse"
            )
        super().__init__()
        from segmentation_models_pytorch import Unet  # here, for it takes seconds to import

        self.net = Unet(
            encoder, encoder_weights=None, decoder_attention_type=None if attention == "none" else attention
        )
        self.net.decoder.blocks[-1].attention1 = nn.Identity()  # never called; parameters without gradients stop DDP
        self.image_head = ImageHead(self.net.encoder.out_channels[-1])

    @property
    def backbone(self) -> nn.Module:
        return self.net.encoder

    def path(self) -> nn.Module:
        return self.net.encoder

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.encoder(z_BCHW)
        mask = self.net.segmentation_head(self.net.decoder(features))
        return mask, self.image_head(features[-1])


class SmallUNet(Segmenter):
    """An hourglass on images normalized in contrast, with outlines of full resolution: for CPUs.

    Its `backbone` are the blocks that shrink the image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.field = SmallUNetBody(deep=True)
        self.head = SharpHead(WIDTHS[0])
        self.image_head = ImageHead(WIDTHS[DEPTH - 1])

    @property
    def backbone(self) -> nn.Module:
        return self.field.down

    def path(self) -> nn.Module:
        return self.field.down

    def normalized(self, x_B1HW: Tensor) -> Tensor:
        return normalise_contrast(x_B1HW)

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features = self.field.features(z_BCHW)
        return self.head(self.field.merged(features), z_BCHW), self.image_head(features[-1])


class SharpHead(nn.Module):
    """Features of half an image's resolution, and the image, to logits of its full resolution.

    The image goes in as four channels of half its size, and four channels come out that make one of its size (Shi et
    al. 2016, arXiv 1609.05158): convolutions on the full grid would cost four times as much.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = conv_block(channels + 4, channels)
        self.out = nn.Conv2d(channels, 4, 1)

    def forward(self, features_BChw: Tensor, z_B1HW: Tensor) -> Tensor:
        fine = F.pixel_unshuffle(z_B1HW, 2).to(features_BChw.dtype)
        return F.pixel_shuffle(self.out(self.mix(torch.cat([features_BChw, fine], 1))), 2)
