"""Measure the effect of alignment on classification: one classifier on unaligned, aligned and ECC-aligned images.

cxr study alignment  # on phantoms in poses of three strengths

cxr study alignment --preset published --archive s3://xrays/nih --aligner s3://xrays/align/checkpoint \\
    --out s3://xrays/study

`cxr benchmark align` compares aligners by the overlap of lungs; this one compares them by the AUROC of a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cxr.cli.options import ArchiveOptions
from cxr.cli.study_options import StudyOptions, StudyPreset
from cxr.families.classify import ClassifyRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """Settings of the job. The same command continues a killed study."""

    PRESETS: ClassVar[Mapping[str, StudyPreset]] = {
        "published": StudyPreset(
            "A DenseNet-121 on unaligned and aligned images of ChestX-ray14, with ImageNet weights.",
            {
                "size": 320,
                "backbone": "densenet121",
                "backbone_pretrained": "auto",
                "batch_size": 32,
                "lr": 1e-4,
            },
            archive={"stored_size": 320},
            protocol="ChestX-ray14, all 112,120 images in the official split by patient: 86,524 for training and "
            "validation, 25,596 for testing. Reported: mean AUROC .8110 on initial and .8124 on aligned images, one "
            "network each. Networks that differ only in their seed have a standard deviation of .0032, so that three "
            "seeds of each can show a gain of about .005 or more. Not run in full: about 4.5 GPU hours for nine "
            "networks, computed from 11.7 GFLOP per forward pass at 320 px, three times that per training image, "
            "76,524 images, 20 epochs and 30 TFLOP/s.",
            differences=(
                "images are 320 x 320 px, not 320 x 256",
                "epochs, learning rate and augmentation of the reported classifiers are not known",
                "alignment by ECC is compared, too; the paper does not report it",
            ),
        ),
    }

    out: str = "runs/study_alignment"
    """Folder or URI of the results: table.md, variants.csv, auroc.png, and a folder for each archive and variant."""
    poses: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths of the phantoms' poses, from 0 (upright and centered) to 2, if no archive is given."""
    seeds: int = 3
    """Number of networks per archive and variant, each with its own seed."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=96))
    recipe: ClassifyRecipe = field(default_factory=lambda: ClassifyRecipe(size=96, epochs=12))
    """Settings of all networks. `--aligner` aligns the images of one variant; by default, a small one is trained on
    the archive, or on the phantoms of the last pose."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_alignment import run_study  # Ray takes seconds to import

    return run_study(options)
