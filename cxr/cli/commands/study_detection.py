"""Compare detectors: preprocessing, ensemble size, box fusion, and a filter for normal images.

cxr study detection  # on phantoms

cxr study detection --preset published --archive s3://xrays/vindr-cxr --lungs s3://xrays/lungs/checkpoint \\
    --out s3://xrays/study
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cxr.cli.options import ArchiveOptions
from cxr.cli.study_options import StudyOptions, StudyPreset
from cxr.families.detect import DetectRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """Settings of the job. The same command continues a killed study."""

    PRESETS: ClassVar[Mapping[str, StudyPreset]] = {
        "published": StudyPreset(
            "VinBigData's challenge (2020): ensembles of YOLOv5, lung crops and CLAHE at 512 px, a filter for "
            "normal images.",
            {"size": 512, "architecture": "yolov5m"},
            archive={"stored_size": 512},
            study={
                "members": 5,
                "preprocessing": ("lung-crop", "clahe"),
                "classifier": "densenet121-chexnet",
            },
            protocol="VinDr-CXR (PhysioNet): 15,000 images with the boxes of three readers for training and "
            "validation, the official 3,000 for testing. Reported on the challenge's test images: .154 to .269 for "
            "one YOLOv5, .201 to .269 with the filter, .29 for ensembles, .321 for the winners. Not run in full: "
            "about 20 GPU hours for the 15 detectors, computed from 41 GFLOP per forward pass at 512 px, three times "
            "that per training image, 12,000 images, 100 epochs and 30 TFLOP/s.",
            differences=(
                "YOLOv5 has Ultralytics' anchor-free head (YOLOv5u), not the anchors of 2020",
                "boxes of three readers are fused by WBF before training, and members differ by seed, not by fold",
                "random initial weights unless --pretrained names weights trained on COCO",
                "test boxes are VinDr-CXR's consensus of five readers and its 22 findings instead of the hidden "
                "14 of the challenge",
                "no test-time augmentation, no pseudo-labels and no networks other than YOLOv5",
                "image sizes, epochs and augmentation of the challenge's entries differ and are only partly known",
                "the filter is a DenseNet-121 with two classes, trained on the same images without folds",
            ),
        ),
    }

    out: str = "runs/study_detection"
    """Folder or URI of the results: table.md, results.csv, map.png, and a folder for each way to preprocess."""
    members: int = 3
    """Number of networks per way to preprocess, each with its own seed, compared alone and as ensembles."""
    preprocessing: tuple[str, ...] = ("clahe", "lung-crop")
    """Ways to preprocess images, besides none: median, nlm, percentile, clahe, lung-crop."""
    lungs: str = ""
    """URI of the checkpoint of cxr train lungs for lung-crop, required with --archive. Without --archive, a small one
    is trained on the phantoms by default."""
    classifier: str = ""
    """Preset of family classify for the filter (normal images); none: no filter. Default: the settings of cxr train
    classify."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=400, stored_size=128))
    recipe: DetectRecipe = field(
        default_factory=lambda: DetectRecipe(
            size=128,
            epochs=16,
            batch_size=8,
            optimizer="adamw",
            lr=0.001,
            mosaic=0.0,
            close_mosaic=0,
            scale_jitter=0.3,
        )
    )
    """Settings of all networks. Those of preprocessing (denoise, normalize, equalize, lung_crop) are set by the study
    alone."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.study_detection import run_study  # Ray takes seconds to import

    return run_study(options)
