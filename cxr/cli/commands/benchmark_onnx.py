"""Measure how fast ONNX Runtime predicts on one CPU thread, compared with PyTorch, for each family.

cxr benchmark onnx --families classify detect --out runs/benchmark_onnx
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr import storage
from cxr.errors import UserError
from cxr.families import RECIPES, recipe_type
from cxr.reporting.tables import markdown

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
            raise UserError(
                "expected --rounds and --batch-sizes of 1 or more, got less: raise the one that is below 1"
            )


def main(options: Options) -> dict[str, Any]:
    recipes = [recipe_type(family)() for family in options.families]  # raises where there is no such family

    from cxr.benchmarks.throughput import onnx_predictions

    rows, metrics = [], dict[str, float]()
    for recipe in recipes:
        for speed in onnx_predictions.measure(recipe, options.batch_sizes, options.rounds):
            name = f"{recipe.family}/{speed.batch}"
            metrics |= {f"torch_ms/{name}": speed.torch_ms, f"onnx_ms/{name}": speed.onnx_ms}
            times = (f"{speed.torch_ms:,.1f} ms", f"{speed.onnx_ms:,.1f} ms", f"{speed.speedup:.2f}")
            rows.append([recipe.family, f"{recipe.size} px", str(speed.batch), *times, f"{speed.difference:.0e}"])
            print("  ".join(rows[-1]), flush=True)
    uri = storage.join(storage.normalize(options.out), "onnx.md")
    storage.write_text(uri, markdown(HEAD, rows))
    return {"metrics": metrics, "report": uri}
