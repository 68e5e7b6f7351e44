"""A checkpoint of family `lungs` without training, whose weights segment bright pixels as lung."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cxr.families import checkpoint
from cxr.families.lungs import LungsRecipe
from cxr.models.segmentation_model import SegmentationModel
from cxr.models.unet import SmallUNet

NOWHERE, EVERYWHERE = -1e3, 1e3  # logits added to all pixels


def save_finder(folder: Path, *, size: int = 64, bias: float = 0.0, aligner: str = "") -> str:
    """Write the checkpoint; returns its URI. The mask is sharp to about two of the network's `size` pixels."""
    recipe = LungsRecipe(size=size, warmup_size=0, warmup_epochs=0, aligner=aligner)
    network = recipe.network(())
    assert isinstance(network, SegmentationModel)
    assert isinstance(network.segmenter, SmallUNet)
    _mark_bright(network.segmenter, bias)
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=(), metrics={})
    return str(folder)


@torch.no_grad()
def _mark_bright(unet: SmallUNet, bias: float) -> None:
    """The finest features carry brightness in two channels, one group of the norms; the decoder passes these on."""
    body, head = unet.body, unet.head
    for layer in (*body.modules(), *head.modules()):
        if isinstance(layer, nn.Conv2d):
            layer.weight.zero_()
    first, last, mix = (block.get_submodule("0") for block in (body.down[0], body.up[-1], head.mix))
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    assert isinstance(mix, nn.Conv2d)
    first.weight[:2, 0, 1, 1] = 1
    last.weight[:2, last.in_channels - first.out_channels, 1, 1] = 1
    mix.weight[:2, 0, 1, 1] = 1
    head.out.weight[:, 0] = 8
    assert head.out.bias is not None
    head.out.bias.fill_(-8 * 0.7 + bias)
