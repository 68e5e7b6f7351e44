"""Measure how fast ONNX Runtime predicts on one CPU thread, beside PyTorch, for each family.

python jobs/benchmark_onnx.py --out runs/benchmark_onnx
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cxr import schema, storage
from cxr.errors import UserError
from cxr.export import onnx
from cxr.families import RECIPES, recipe_type
from cxr.reporting.tables import markdown
from cxr.runtime.job import run_job

HEAD = ("family", "input", "batch", "PyTorch", "ONNX Runtime", "speed-up", "largest difference")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    families: tuple[str, ...] = tuple(RECIPES)
    """Families to measure, each with its default settings and random weights, on images of noise."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Numbers of images that are predicted together."""
    rounds: int = 5
    """Number of measurements. In each, PyTorch and ONNX Runtime run once, one after the other; medians are
    reported."""
    out: str = "runs/benchmark_onnx"
    """Folder or URI of the result: OUT/onnx.md."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or min(self.batch_sizes, default=1) < 1:
            raise UserError("expected rounds and batch sizes of at least 1: correct them")


def main(options: Options) -> dict[str, Any]:
    onnx.require_packages()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, metrics = [], dict[str, float]()
    for family in options.families:
        recipe = recipe_type(family)()
        network = recipe.network(schema.FINDINGS)
        randomize(network, torch.rand(4, 1, recipe.size, recipe.size))
        model = onnx.to_onnx(recipe, network, recipe.size).SerializeToString()
        running = onnx.session(model, threads=1)
        difference = max(onnx.differences(model, recipe, network).values())
        for batch in options.batch_sizes:
            pixels = torch.randint(0, 256, (batch, recipe.size, recipe.size)).to(torch.uint8)

            @torch.inference_mode()
            def by_torch(recipe: Any = recipe, network: Any = network, pixels: torch.Tensor = pixels) -> None:
                recipe.predict(network, {schema.PIXELS: pixels})

            def by_onnx(running: Any = running, pixels: torch.Tensor = pixels) -> None:
                running.run(None, {schema.PIXELS: pixels.numpy()})

            by_torch(), by_onnx()  # the first call chooses kernels and allocates memory
            times = [(cpu_seconds(by_torch), cpu_seconds(by_onnx)) for _ in range(options.rounds)]
            torch_ms, onnx_ms = (1000 * statistics.median(column) / batch for column in zip(*times, strict=True))
            speedup = statistics.median(of_torch / of_onnx for of_torch, of_onnx in times)
            cells = (f"{torch_ms:,.1f} ms", f"{onnx_ms:,.1f} ms", f"{speedup:.2f}", f"{difference:.0e}")
            rows.append([family, f"{recipe.size} px", str(batch), *cells])
            metrics |= {f"torch_ms/{family}/{batch}": torch_ms, f"onnx_ms/{family}/{batch}": onnx_ms}
            print("  ".join(rows[-1]), flush=True)
    table = markdown(HEAD, rows)
    uri = storage.join(storage.normalize(options.out), "onnx.md")
    storage.write_text(uri, table)
    return {"metrics": metrics, "report": uri}


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


def cpu_seconds(call: Callable[[], None]) -> float:
    """CPU time of a call, which depends less on other processes than the time on the clock."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


if __name__ == "__main__":
    run_job(main, Options)
