"""Measure the effect of noise removal, normalization, contrast equalization and lung crops on classification.

cxr study preprocessing  # on phantoms

cxr study preprocessing --archive s3://xrays/nih --lungs s3://xrays/lungs/checkpoint --out s3://xrays/study \\
    --backbone densenet121 --backbone-pretrained s3://models/densenet121.pth --size 224 --stored-size 256
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr.cli.options import ArchiveOptions
from cxr.families.classify import ClassifyRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study. For detection, use cxr study detection."""

    out: str = "runs/study_preprocessing"
    """Folder or URI of the results: table.md, results.csv, auroc.png, and a folder for each way to preprocess."""
    seeds: int = 3
    """Number of networks per way to preprocess, each with its own seed."""
    preprocessing: tuple[str, ...] = ("median", "nlm", "percentile", "clahe", "lung-crop")
    """Ways to preprocess images, each of which is compared with none: median, nlm, percentile, clahe, lung-crop."""
    lungs: str = ""
    """URI of the checkpoint of cxr train lungs for lung-crop, required with --archive. Without --archive, a small one
    is trained on the phantoms by default."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=96))
    recipe: ClassifyRecipe = field(default_factory=lambda: ClassifyRecipe(size=96, epochs=15, ema=0.98))
    """Settings of all networks. Those of preprocessing (denoise, normalize, equalize, lung_crop) are set by the study
    alone."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_preprocessing import run_study  # Ray takes seconds to import

    return run_study(options)
