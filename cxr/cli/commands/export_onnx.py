"""Export a checkpoint of any family as an ONNX file, and compare its predictions with PyTorch's.

cxr export onnx --checkpoint runs/localize/checkpoint --stored-size 512 --out runs/export
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr import storage
from cxr.families.checkpoint_files import read_about


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    checkpoint: str = ""
    """Folder or URI of a checkpoint. Default: train an aligner for a minute on a small phantom archive."""
    stored_size: int = 0
    """Height and width, in pixels, of the images that the ONNX graph takes; it resizes them to the network's input.
    0: the size of the network's input."""
    prepared_images: bool = False
    """Also export a checkpoint whose images must be aligned, cropped to the lungs or enhanced first. The file does
    not contain these steps: the program that uses it must do them."""
    out: str = "runs/export"
    """Folder or URI of the result: OUT/model.onnx."""


def main(options: Options) -> dict[str, Any]:
    if options.checkpoint:
        read_about(options.checkpoint)

    from cxr.export import onnx  # torch takes seconds to import
    from cxr.families import checkpoint

    onnx.require_packages()
    out = storage.normalize(options.out)
    saved = checkpoint.load(options.checkpoint or _demo_checkpoint(out))
    model = onnx.export(saved, options.stored_size, prepared=options.prepared_images)
    uri = storage.join(out, "model.onnx")
    storage.write_bytes(uri, model)
    differences = onnx.differences(model, saved.recipe, saved.network)
    for name, difference in differences.items():
        print(f"{name}: largest difference from PyTorch {difference:.1g}")
    for step in onnx.preparation(saved):
        print(f"note: your program must prepare images: {step}")
    print(f"model: {uri} ({len(model) / 1e6:.1f} MB)", flush=True)
    return {"model": uri, "checkpoint": saved.uri, "metrics": {f"difference/{k}": v for k, v in differences.items()}}


def _demo_checkpoint(out: str) -> str:
    from cxr.cli.phantoms import some_phantoms
    from cxr.cli.training_jobs import demo_aligner_checkpoint

    return demo_aligner_checkpoint(some_phantoms(out), out)
