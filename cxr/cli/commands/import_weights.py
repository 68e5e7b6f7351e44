"""Import public weights of another library as a checkpoint that is ready to score, or as initial weights.

cxr import-weights model.pt --from torchxrayvision --name densenet121-res224-all --trust --out s3://models/xrv-all

cxr import-weights rad-dino --from dinov2 --license MIT --out s3://models/rad-dino  # a folder of a model hub
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from cxr import storage
from cxr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    file: tyro.conf.Positional[str] = ""
    """Path or URI of the file of weights, or of a folder downloaded from a model hub."""
    library: Annotated[Literal["torchxrayvision", "ultralytics", "timm", "dinov2"], tyro.conf.arg(name="from")] = (
        "torchxrayvision"
    )
    """Library that the weights come from."""
    out: str = "runs/import_weights"
    """Folder or URI of the result."""
    trust: bool = False
    """Open a file that contains Python objects and not only tensors, in a separate process that runs none of the
    file's code. Do this only if you trust the file, and on a machine outside the hospital's network."""
    name: str = ""
    """TorchXRayVision's name of the weights (densenet121-res224-all), or timm's name of the network. Default:
    recognize it by the file's name and contents."""
    findings: tuple[str, ...] = ()
    """Names of the network's outputs, in order. Default: those of the file or the library."""
    size: int = 0
    """Height and width of the network's input in pixels. Default: as published."""
    license: str = ""
    """SPDX identifier of the weights' license. Default: the library's; timm's weights have no common license."""
    source_url: str = ""
    """URL from which the file was downloaded, for the record."""


def main(options: Options) -> dict[str, Any]:
    if not options.file:
        raise UserError("expected the path or URI of a file of weights, got none")
    storage.check_readable(options.file)
    if options.size < 0:
        raise UserError(f"size: expected 0 or more pixels, got {options.size}")

    from cxr.families import public_weights  # torch takes seconds to import

    if options.trust:
        print(f"note: {options.file} is trusted: Python objects in it are opened in a separate process", flush=True)
    opened = public_weights.open_file(options.file, trust=options.trust)
    imported = public_weights.import_weights(
        options.library,
        opened,
        options.out,
        name=options.name,
        findings=options.findings,
        size=options.size,
        license=options.license,
        source_url=options.source_url,
    )
    print(f"{opened.name}: {imported.fit.summary()}")
    if imported.findings:
        print(f"findings: {', '.join(imported.findings)}")
    print(f"{imported.kind}: {imported.uri} (license {imported.origin['license']})", flush=True)
    return {imported.kind: imported.uri, "findings": list(imported.findings), "origin": dict(imported.origin)}
