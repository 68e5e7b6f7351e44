"""Compare localization from image-level labels with maps of several backbone stages and of the last one only.

cxr study localization  # multiscale and last, on phantoms with small and large findings

cxr study localization --preset published --archive s3://xrays/nih --out s3://xrays/study
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cxr.cli.options import ArchiveOptions
from cxr.cli.study_options import StudyOptions, StudyPreset
from cxr.families.localize import LocalizeRecipe
from cxr.families.presets import PRESETS
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """Settings of the job. The same command continues a killed study."""

    PRESETS: ClassVar[Mapping[str, StudyPreset]] = {
        "published": StudyPreset.of(
            PRESETS["localize"]["published"],
            "Sedai et al. 2018: maps of all stages of a DenseNet-121 and of its last stage, images of 512 px.",
            study={"variants": ("multiscale", "last"), "seeds": 5},
            cost="Not run in full: about 13 GPU hours for ten networks, computed from 29.6 GFLOP per forward pass, "
            "three times that per training image, 76,524 images, 20 epochs and 30 TFLOP/s.",
        ),
    }

    out: str = "runs/study_localization"
    """Folder or URI of the results: table.md, networks.csv, accuracy.png, and a folder for each network."""
    variants: tuple[str, ...] = ("multiscale", "last")
    """Variants to compare: multiscale; logits (with --combine-stages logits); uniform (with --stage-weights uniform);
    last; or multiscale or last with -mean, -max or -lse for another pooling."""
    seeds: int = 5
    """Number of networks per variant, each with its own seed. With few networks, a single one that does not learn a
    finding dominates the mean. A larger number with the same --out trains only the missing networks."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200, stored_size=192))
    recipe: LocalizeRecipe = field(default_factory=lambda: LocalizeRecipe(epochs=30))
    """Settings of all networks. Variants set cam_stages; those of several stages also set stage_weights, logits sets
    combine_stages, and those with -mean, -max or -lse set pooling."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_localization import run_study  # Ray takes seconds to import

    return run_study(options)
