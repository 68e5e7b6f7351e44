"""Backbones of image classifiers, from torchvision and timm, behind one interface.

A backbone turns images into features in its own layout, and features into one vector per image (`pool`) or one vector
per position (`cells`). The parameters of `body` have the names of the library that it comes from, so that the
library's weights fit.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from cxr.errors import UserError
from cxr.models.multiscale_cam import SMALL_WIDTHS, SmallResNet
from cxr.models.receptive_field import ReceptiveField, receptive_fields

SMALL = "small"  # a ResNet with a quarter of a million parameters, for CPUs
TIMM = "timm:"
EVA_X = {  # EVA-X (Yao et al. 2024): EVA-02 with patches of 16 instead of 14 pixels
    "eva_x_tiny_patch16": "eva02_tiny_patch14_224",
    "eva_x_small_patch16": "eva02_small_patch14_224",
    "eva_x_base_patch16": "eva02_base_patch14_224",
}
TORCHVISION = (
    "convnext",
    "densenet",
    "efficientnet",
    "inception",
    "mobilenet",
    "regnet",
    "resnet",
    "resnext",
    "swin",
    "wide_resnet",
)
"""Beginnings of the names of torchvision's networks that can be backbones."""
INCEPTION = (  # the blocks of InceptionV3 after the first, in order
    *("Conv2d_2a", "Conv2d_2b", "Conv2d_3b", "Conv2d_4a"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


class ImageBackbone(nn.Module, ABC):
    """Normalized images (B, channels, H, W) to features; see the module's docstring."""

    body: nn.Module
    width: int
    """Length D of the vectors of `pool` and `cells`."""
    matcher: Any
    """The layers of `body` in timm's notation: regular expressions for the names of their parameters."""
    receptive_field: ReceptiveField | None = None
    """The receptive field of the first cell. None: the cells are tiles of the image."""

    @abstractmethod
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features in the backbone's own layout."""

    @abstractmethod
    def pool(self, features: Tensor) -> Tensor:
        """(B, D) one vector per image, pooled as the backbone was trained to."""

    @abstractmethod
    def cells(self, features: Tensor) -> Tensor:
        """(B, D, h, w) one vector per position."""

    @abstractmethod
    def as_map(self, positions: Tensor) -> Tensor:
        """Features, or the input of `last_mixing`, as (B, C, h, w)."""

    @property
    def last_mixing(self) -> nn.Module | None:
        """The module that mixes positions into the class token for the last time; None: `pool` averages positions."""
        return None

    def layer_of(self) -> dict[str, int]:
        """The index of the layer of each parameter of `body`, from 0 at the input."""
        from timm.models import group_parameters  # imported here because it takes seconds

        return dict(group_parameters(self.body, self.matcher, reverse=True))


def image_backbone(name: str, channels: int, size: int, *, pools: bool = True) -> ImageBackbone:
    """A backbone with random weights.

    Args:
        name: `small`, a name of torchvision (`densenet121`), or timm:NAME (`timm:vit_small_patch14_dinov2`).
        channels: number of channels of the images.
        size: height and width of the images in pixels, on which position embeddings depend.
        pools: whether `pool` will be called; if not, `cells` will.

    Raises:
        UserError: there is no such network, or patches of its size do not fill the images.
    """
    check_backbone(name)
    if name.startswith(TIMM):
        backbone = TimmBackbone(name.removeprefix(TIMM), channels, size, pools=pools)
    else:
        backbone = TorchvisionBackbone(name, channels)
    with suppress(Exception):  # not every network can be traced; those that cannot, such as transformers, have tiles
        backbone.receptive_field = receptive_fields(backbone)[0]
    return backbone


def check_backbone_name(name: str) -> None:
    """Raise UserError if the name cannot be that of a backbone. Imports neither torchvision nor timm."""
    if not (name == SMALL or name.startswith((TIMM, *TORCHVISION))) or name == TIMM:
        raise UserError(
            f"backbone: expected {SMALL}, {TIMM}NAME, or a network of torchvision whose name begins with "
            f"{', '.join(TORCHVISION)}; got {name}"
        )


def check_backbone(name: str) -> None:
    """Raise UserError if there is no such backbone. Imports torchvision or timm, which takes seconds."""
    check_backbone_name(name)
    if name.startswith(TIMM):
        _check_in_timm(name.removeprefix(TIMM))
    elif name != SMALL:
        from torchvision import models

        if name not in models.list_models(module=models):
            raise UserError(
                f"backbone: torchvision has no network {name}; `torchvision.models.list_models()` lists the names"
            )


def _check_in_timm(name: str) -> None:
    import timm

    if name not in EVA_X and not timm.is_model(name):
        raise UserError(f"backbone: timm has no network {name}; `timm.list_models()` lists the names")


class TorchvisionBackbone(ImageBackbone):
    """A network of torchvision without its classifier, or `small`."""

    MATCHERS: ClassVar[dict[str, Any]] = {
        "densenet": {
            "stem": r"^features\.(?:conv0|norm0)\.",
            "blocks": [
                (r"^features\.denseblock(\d+)\.denselayer(\d+)", None),
                (r"^features\.transition(\d+)", (99999,)),  # to timm: part of the layer before
                (r"^features\.norm5", (99999,)),
            ],
        },
        "features": {
            "stem": r"^features\.0\.",
            "blocks": [(r"^features\.(\d+)\.(\d+)", None), (r"^features\.(\d+)", (0,)), (r"", (99999,))],
        },
        "inception": {"stem": r"^Conv2d_1a", "blocks": [(rf"^{name}", (n,)) for n, name in enumerate(INCEPTION)]},
        "regnet": {"stem": r"^stem", "blocks": r"^trunk_output\.block(\d+)\.block\d+-(\d+)"},
        "resnet": {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)\.(\d+)"},
    }

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.body, self.width = (SmallResNet(), SMALL_WIDTHS[-1]) if name == SMALL else _without_classifier(name)
        _set_channels(self.body, channels)
        if hasattr(self.body, "features"):
            self.kind = "densenet" if name.startswith("densenet") else "features"
        else:
            kinds = {"trunk_output": "regnet", "Mixed_5b": "inception"}
            self.kind = next((kind for name, kind in kinds.items() if hasattr(self.body, name)), "resnet")
        self.matcher = self.MATCHERS[self.kind]
        self.normalizes_pooled = name.startswith("convnext")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        body: Any = self.body
        if self.kind == "densenet":
            return F.relu(body.features(x_BCHW))
        if self.kind == "features":  # a Swin transformer's features are (B, h, w, C)
            features = body.features(x_BCHW)
            return body.permute(body.norm(features)) if hasattr(body, "permute") else features
        if self.kind == "regnet":
            return body.trunk_output(body.stem(x_BCHW))
        if self.kind == "inception":
            for layer in itertools.takewhile(lambda layer: layer is not body.avgpool, body.children()):
                x_BCHW = layer(x_BCHW)
            return x_BCHW
        x_BCHW = body.maxpool(body.relu(body.bn1(body.conv1(x_BCHW))))
        return body.layer4(body.layer3(body.layer2(body.layer1(x_BCHW))))

    def pool(self, features: Tensor) -> Tensor:
        mean_BC = features.mean((2, 3))
        return self.normalized(mean_BC[:, :, None, None])[:, :, 0, 0] if self.normalizes_pooled else mean_BC

    def cells(self, features: Tensor) -> Tensor:
        return self.normalized(features) if self.normalizes_pooled else features

    def normalized(self, features_BChw: Tensor) -> Tensor:
        """ConvNeXt's norm between pooling and its classifier."""
        return self.body.get_submodule("classifier")(features_BChw)

    def as_map(self, positions: Tensor) -> Tensor:
        return positions


def _without_classifier(name: str) -> tuple[nn.Module, int]:
    """A network of torchvision without its last layers, and the number of its last feature channels."""
    from torchvision import models  # imported here because it takes seconds

    # Without its second classifier, and without its slow initialization, which weights replace.
    settings = {"aux_logits": False, "init_weights": False} if name.startswith("inception") else {}
    body = models.get_model(name, weights=None, **settings)
    for last in ("classifier", "fc", "head"):
        if hasattr(body, last):
            old = body.get_submodule(last)
            linear = next(module for module in old.modules() if isinstance(module, nn.Linear))
            setattr(body, last, old[:1] if name.startswith("convnext") else nn.Identity())  # pyright: ignore[reportIndexIssue]
            return body, linear.in_features
    raise UserError(f"backbone: {name} has no classifier that could be replaced; use another network")


def _set_channels(body: nn.Module, channels: int) -> None:
    """Give the first convolution this number of input channels."""
    name, first = next((name, module) for name, module in body.named_modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == channels:
        return
    parent, _, last = name.rpartition(".")
    stem = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # pyright: ignore[reportArgumentType]
        first.stride,  # pyright: ignore[reportArgumentType]
        first.padding,  # pyright: ignore[reportArgumentType]
        bias=first.bias is not None,
    )
    setattr(body.get_submodule(parent), last, stem)


def timm_network(name: str, **settings: Any) -> nn.Module:
    """A network of timm, or one of `EVA_X`, with random weights and without a classifier.

    Raises:
        UserError: there is no such network.
        TypeError: the network does not have one of the settings.
    """
    import timm  # imported here because it takes seconds

    _check_in_timm(name)
    if name in EVA_X:
        name, settings = EVA_X[name], {"patch_size": 16, "ref_feat_shape": (14, 14), **settings}
    return timm.create_model(name, pretrained=False, num_classes=0, **settings)


class TimmBackbone(ImageBackbone):
    """A network of timm without its classifier. Its features are (B, C, h, w), (B, h, w, C) or tokens (B, N, C)."""

    def __init__(self, name: str, channels: int, size: int, *, pools: bool) -> None:
        super().__init__()
        settings: dict[str, Any] = {"in_chans": channels}
        try:
            body: Any = timm_network(name, img_size=size, **settings)
        except TypeError:  # networks without position embeddings take any size
            body = timm_network(name, **settings)
        _check_patches(body, name, size)
        self.class_token = pools and getattr(body, "global_pool", "") == "token"
        try:
            if not pools:
                body.reset_classifier(0, "")  # then `forward_head` only normalizes
            self.body, self.width = body, body.head_hidden_size
            self.matcher = body.group_matcher(coarse=False)
        except (AssertionError, AttributeError) as error:  # a few networks have another interface than most
            raise UserError(f"backbone: {TIMM}{name} cannot be used ({error}); use another network") from error

    def forward(self, x_BCHW: Tensor) -> Tensor:
        body: Any = self.body
        return body.forward_features(x_BCHW)

    def pool(self, features: Tensor) -> Tensor:
        body: Any = self.body
        return body.forward_head(features, pre_logits=True)

    def cells(self, features: Tensor) -> Tensor:
        return self.as_map(self.pool(features))

    def as_map(self, positions: Tensor) -> Tensor:
        if positions.ndim == 3:
            side = math.isqrt(positions.shape[1])  # some networks add their class token only before the last blocks
            return positions[:, positions.shape[1] - side**2 :].mT.unflatten(2, (side, side))
        channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        return positions.permute(0, 3, 1, 2) if channels_last else positions

    @property
    def last_mixing(self) -> nn.Module | None:
        blocks: Any = getattr(self.body, "blocks", None)
        return blocks[-1] if self.class_token and blocks is not None else None


def _check_patches(body: Any, name: str, size: int) -> None:
    """Raise UserError if a vision transformer would not see the right and lower edge, which fill no whole patch."""
    patch = getattr(getattr(body, "patch_embed", None), "patch_size", 1)
    patch = max(patch) if isinstance(patch, tuple) else patch
    if size % patch and body.feature_info[-1]["reduction"] == patch:  # otherwise, patches overlap or are padded
        below = size - size % patch
        raise UserError(
            f"size: expected a multiple of {patch} px, the size of the patches of {name}, got {size} px: use "
            f"{f'{below} or ' if below else ''}{below + patch}"
        )
