"""Depth, stride and receptive field of convolutional networks, including the receptive field's position.

Computed layer by layer as in Araujo et al. 2019, "Computing receptive fields of convolutional neural networks":
after layers with kernel k_l, stride s_l, dilation d_l and padding p_l, output 0 depends on the input from
−Σ p_l · j_l to Σ ((k_l − 1) d_l − p_l) · j_l, where j_l is the product of the strides before layer l.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

# After these layers there is no grid of equal receptive fields, or it is not computed here.
_GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_END = (nn.Linear, nn.ConvTranspose2d, nn.Upsample)
_END_FUNCTIONS = (F.interpolate, F.conv2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.conv_transpose2d)


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of a layer's first output. Positions are pixel indices; those in the padding are negative.

    `stride` is the distance between neighboring outputs in pixels, `depth` the number of convolutions on the longest
    path.
    """

    first: int = 0
    last: int = 0
    stride: int = 1
    depth: int = 0

    @property
    def size(self) -> int:
        """Side of the receptive field in pixels."""
        return self.last - self.first + 1

    @property
    def center(self) -> float:
        """Center of the first output's receptive field; that of output i lies i strides further."""
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class ArchitectureSummary:
    """The columns of the table of networks in Long et al. 2015."""

    parameters: int
    convolutions: int
    receptive_field_px: int
    stride_px: int


def summarize_architecture(network: nn.Module, path: nn.Module) -> ArchitectureSummary:
    """Parameters of `network`; depth, receptive field and stride of `path`, its convolutions to the coarsest output.

    Raises:
        ValueError: see `receptive_fields`.
    """
    end = receptive_fields(path)[-1]
    parameters = sum(values.numel() for values in network.parameters())
    return ArchitectureSummary(parameters, end.depth, end.size, end.stride)


def receptive_fields(path: nn.Module) -> list[ReceptiveField]:
    """The receptive field of each tensor that a module with one input returns. Runs no layer, on any device.

    Where branches meet, the receptive field is the union of theirs. A branch that pools globally, as in squeeze and
    excitation, depends on the whole image everywhere and is not counted.

    Raises:
        ValueError: a layer has a non-square kernel, branches of different strides meet, or an output comes after a
            layer that is not supported: linear, upsampling or global pooling.
    """
    graph = fx.Tracer().trace(path)
    known: dict[fx.Node, ReceptiveField] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = ReceptiveField()
        elif node.op == "output":
            if missing := [end for end in node.all_input_nodes if end not in known]:
                raise ValueError(
                    f"{missing[0]} is not supported: it comes after global pooling; end the path before it"
                )
            return [known[end] for end in node.all_input_nodes]
        elif _pools_globally(node, path):
            continue
        elif before := [known[other] for other in node.all_input_nodes if other in known]:
            known[node] = _after_node(node, path, _union(before))
    raise AssertionError("a graph without an output")


def _pools_globally(node: fx.Node, path: nn.Module) -> bool:
    return node.op == "call_module" and isinstance(path.get_submodule(str(node.target)), _GLOBAL)


def _after_node(node: fx.Node, path: nn.Module, before: ReceptiveField) -> ReceptiveField:
    layer = path.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(layer, _END) or node.target in _END_FUNCTIONS:
        raise ValueError(f"{node.target} ({layer or 'a function'}) is not supported: end the path before it")
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return _after_layer(layer, before)
    return before


def _after_layer(layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d, before: ReceptiveField) -> ReceptiveField:
    kernel, stride, dilation, padding = _geometry(layer)
    span = (kernel - 1) * dilation
    return ReceptiveField(
        before.first - padding * before.stride,
        before.last + (span - padding) * before.stride,
        before.stride * stride,
        before.depth + isinstance(layer, nn.Conv2d),
    )


def _geometry(layer: nn.Module) -> Iterator[int]:
    """Kernel, stride, dilation and padding, each the same in both directions."""
    for name in ("kernel_size", "stride", "dilation", "padding"):
        value: Any = getattr(layer, name, 1)  # AvgPool2d has no dilation
        if isinstance(value, str):  # "same" or "valid"
            value = _named_padding(layer, value)
        if isinstance(value, tuple):
            if len(set(value)) > 1:
                raise ValueError(f"{layer}: expected the same {name} in both directions, got {value}")
            value = value[0]
        yield value


def _named_padding(layer: Any, name: str) -> tuple[int, ...]:
    if name == "valid":
        return (0, 0)
    return tuple(
        (kernel - 1) * dilation // 2 for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
    )


def _union(branches: list[ReceptiveField]) -> ReceptiveField:
    if len({branch.stride for branch in branches}) > 1:
        raise ValueError(f"expected branches of equal stride, got {branches}")
    first, last = min(branch.first for branch in branches), max(branch.last for branch in branches)
    return ReceptiveField(first, last, branches[0].stride, max(branch.depth for branch in branches))
