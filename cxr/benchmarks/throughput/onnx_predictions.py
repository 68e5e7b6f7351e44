"""Predictions by ONNX Runtime and by PyTorch on one CPU thread: their time and their difference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cxr import schema
from cxr.export import onnx
from cxr.families.base import Recipe

CALIBRATED = 4  # images from which batch norms take their statistics


@dataclass(frozen=True)
class Speed:
    """CPU time of one image, in milliseconds: medians over the rounds."""

    batch: int
    torch_ms: float
    onnx_ms: float
    speedup: float  # median over the rounds of PyTorch's time divided by ONNX Runtime's
    difference: float  # largest difference of the outputs, see `export.onnx.differences`


def measure(recipe: Recipe, batch_sizes: Sequence[int], rounds: int) -> Iterator[Speed]:
    """Compare predictions of a network with random weights for images of its input size, for each batch size.

    In each round, both run once, one after the other. The CPU time of this process is counted, which depends less on
    other processes than the time on the clock. Sets the number of PyTorch's threads to 1.

    Raises:
        UserError: the packages of the extra `onnx` are missing.
    """
    onnx.require_packages()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = recipe.network(schema.FINDINGS)
    randomize(network, torch.rand(CALIBRATED, 1, recipe.size, recipe.size))
    model = onnx.to_onnx(recipe, network, recipe.size).SerializeToString()
    difference = max(onnx.differences(model, recipe, network).values())
    running = onnx.session(model, threads=1)
    for batch in batch_sizes:
        pixels = torch.randint(0, 256, (batch, recipe.size, recipe.size)).to(torch.uint8)
        by_torch = torch.inference_mode()(lambda pixels=pixels: recipe.predict(network, {schema.PIXELS: pixels}))
        by_onnx = lambda pixels=pixels: running.run(None, {schema.PIXELS: pixels.numpy()})  # noqa: E731
        by_torch()  # the first call chooses kernels and allocates memory
        by_onnx()
        times = [(_cpu_seconds(by_torch), _cpu_seconds(by_onnx)) for _ in range(rounds)]
        torch_ms, onnx_ms = (1000 * statistics.median(column) / batch for column in zip(*times, strict=True))
        speedup = statistics.median(of_torch / of_onnx for of_torch, of_onnx in times)
        yield Speed(batch, torch_ms, onnx_ms, speedup, difference)


@torch.no_grad()
def randomize(network: nn.Module, x_B1HW: Tensor) -> None:
    """Give weights that start at zero random values, and batch norms the statistics of these images.

    Otherwise the outputs of a new network would be nearly constant, and comparing them would show nothing.
    """
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(x_B1HW)
    network.eval()


def _cpu_seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin
