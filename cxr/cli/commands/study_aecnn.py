"""Compare an AE-CNN with the same classifier on resized and on uncompressed images: mean AUROC over several seeds.

cxr study aecnn  # on a phantom archive

cxr study aecnn --preset published --archive s3://xrays/nih --out s3://xrays/study
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cxr.cli.options import ArchiveOptions
from cxr.cli.study_options import StudyOptions, StudyPreset
from cxr.families.aecnn import AecnnRecipe
from cxr.families.presets import PRESETS
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """Settings of the job. The same command continues a killed study."""

    PRESETS: ClassVar[Mapping[str, StudyPreset]] = {
        "published": StudyPreset.of(
            PRESETS["aecnn"]["published"],
            "Ranjan et al. 2018: latents of 224 px, resized images of 224 px and uncompressed ones of 896 px.",
            study={"seeds": 5},
            cost="Not run in full: about 50 GPU hours for 15 networks, computed from 8.6 GFLOP per forward pass at "
            "224 px and 137 at 896 px, three times that per training image, 76,524 images, 30 epochs and 30 TFLOP/s.",
        ),
    }

    out: str = "runs/study_aecnn"
    """Folder or URI of the results: table.md, results.csv, auroc.png, and a folder for each recipe."""
    seeds: int = 3
    """Number of networks per recipe, each with its own seed."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=128))
    recipe: AecnnRecipe = field(default_factory=lambda: AecnnRecipe(size=128, compression=4))
    """Settings of the AE-CNN. The other recipes differ only in --compressor, and skip the autoencoder stage."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_aecnn import run_study  # Ray takes seconds to import

    return run_study(options)
