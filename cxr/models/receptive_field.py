"""What a convolutional network is by its layers: depth, stride and receptive field, and where that lies.

Computed layer by layer as in Araujo et al. 2019, "Computing receptive fields of convolutional neural networks":
behind layers of kernel k_l, stride s_l, dilation d_l and padding p_l, output 0 sees the input from
−Σ p_l · j_l to Σ ((k_l − 1) d_l − p_l) · j_l, where j_l is the product of the strides before layer l.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

# Whatever these give is no grid of fields of one size any more, or one that is not followed here.
_END = (nn.Linear, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ConvTranspose2d, nn.Upsample)
_END_FUNCTIONS = (F.interpolate, F.conv2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.conv_transpose2d)


@dataclass(frozen=True)
class ReceptiveField:
    """What the first output of a layer sees of the image. Positions are indices of pixels; padding is below 0.

    `stride` is the distance of neighboring outputs in pixels, `depth` the convolutions on the longest way there.
    """

    first: int = 0
    last: int = 0
    stride: int = 1
    depth: int = 0

    @property
    def size(self) -> int:
        """The receptive field, pixels to a side."""
        return self.last - self.first + 1

    @property
    def center(self) -> float:
        """Of the first output; the i-th one's lies i strides further."""
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Architecture:
    """A network as Long et al. 2015 tabulate theirs: all its parameters, and its path to the coarsest output."""

    parameters: int
    convolutions: int
    receptive_field_px: int
    stride_px: int


def architecture(network: nn.Module, path: nn.Module) -> Architecture:
    """Parameters of `network`; depth, receptive field and stride of `path`, the part of it that is convolutional.

    Raises:
        ValueError: see `reaches`.
    """
    end = reaches(path)[-1]
    parameters = sum(values.numel() for values in network.parameters())
    return Architecture(parameters, end.depth, end.size, end.stride)


def reaches(path: nn.Module) -> list[ReceptiveField]:
    """The reach of each tensor that a module of one input returns. Nothing is computed: any device will do.

    Branches that meet see together what each of them sees.

    Raises:
        ValueError: a layer has oblong kernels, branches of two strides meet, or what is returned comes from
            behind a layer that is not followed: one that is linear, enlarges, or pools all there is.
    """
    graph = fx.Tracer().trace(path)
    known: dict[fx.Node, ReceptiveField] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = ReceptiveField()
        elif node.op == "output":
            return [known[end] for end in node.all_input_nodes]
        elif before := [known[other] for other in node.all_input_nodes if other in known]:
            known[node] = _through(node, path, _joined(before))
    raise AssertionError("a graph without an output")


def _through(node: fx.Node, path: nn.Module, before: ReceptiveField) -> ReceptiveField:
    layer = path.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(layer, _END) or node.target in _END_FUNCTIONS:
        raise ValueError(f"{node.target} ({layer or 'a function'}) is not followed: end the path before it")
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return _behind(layer, before)
    return before


def _behind(layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d, before: ReceptiveField) -> ReceptiveField:
    kernel, stride, dilation, padding = _geometry(layer)
    span = (kernel - 1) * dilation
    return ReceptiveField(
        before.first - padding * before.stride,
        before.last + (span - padding) * before.stride,
        before.stride * stride,
        before.depth + isinstance(layer, nn.Conv2d),
    )


def _geometry(layer: nn.Module) -> Iterator[int]:
    """Kernel, stride, dilation and padding before the image."""
    for name in ("kernel_size", "stride", "dilation", "padding"):
        value: Any = getattr(layer, name, 1)  # AvgPool2d has no dilation
        if isinstance(value, str):  # "same" or "valid"
            value = _named_padding(layer, value)
        if isinstance(value, tuple):
            if len(set(value)) > 1:
                raise ValueError(f"{layer}: {name} is not the same both ways")
            value = value[0]
        yield value


def _named_padding(layer: Any, name: str) -> tuple[int, ...]:
    if name == "valid":
        return (0, 0)
    return tuple(
        (kernel - 1) * dilation // 2 for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
    )


def _joined(branches: list[ReceptiveField]) -> ReceptiveField:
    if len({branch.stride for branch in branches}) > 1:
        raise ValueError(f"branches of different strides meet: {branches}")
    first, last = min(branch.first for branch in branches), max(branch.last for branch in branches)
    return ReceptiveField(first, last, branches[0].stride, max(branch.depth for branch in branches))
