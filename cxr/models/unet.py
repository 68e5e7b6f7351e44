"""U-Nets (Ronneberger et al. 2015, arXiv 1505.04597): on torchvision's ResNets, and a small one for CPUs."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from cxr.models.backbones import WIDTHS, normalise_contrast
from cxr.models.lung_field import DEPTH, LungField
from cxr.models.segmenter import ImageHead, Segmenter

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
    """The network that finds lung fields, of half a million parameters, on images normalised in contrast.

    Its `backbone` are the blocks that shrink the image; a lung network's or an aligner's state dict has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.field = LungField()
        self.image_head = ImageHead(WIDTHS[DEPTH - 1])

    @property
    def backbone(self) -> nn.Module:
        return self.field.down

    def path(self) -> nn.Module:
        return self.field.down

    def normalised(self, x_B1HW: Tensor) -> Tensor:
        return normalise_contrast(x_B1HW)

    def segment(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features = self.field.features(z_BCHW)
        return self.field.decoded(features, z_BCHW.shape[-2:]), self.image_head(features[-1])
