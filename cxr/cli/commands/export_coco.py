"""Write predicted boxes and masks of a run as COCO JSON, for labeling tools and evaluation programs.

cxr export coco --run runs/score --out runs/export
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr.cli.exports import ExportOptions, export_coco
from cxr.errors import UserError
from cxr.wording import counted


@dataclass(frozen=True, kw_only=True)
class Options(ExportOptions):
    """Settings of the job."""

    min_score: float = 0.0
    """Minimum score of the boxes and masks to export, from 0 to 1."""
    out: str = "runs/export"
    """Folder or URI of the result: OUT/coco.json."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise UserError(f"--min-score: expected 0 to 1, got {self.min_score:g}")


def main(options: Options) -> dict[str, Any]:
    uri, counts = export_coco(options.open_run(), options.out, options.split, options.min_score)
    images = counted(counts["images"], "image")
    print(f"{images}, boxes and masks: {counts['annotations']:,}; left out because of an error: {counts['errors']:,}")
    print(f"COCO JSON: {uri}")
    return {"coco": uri, "metrics": counts}
