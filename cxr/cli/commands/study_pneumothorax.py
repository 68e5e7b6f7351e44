"""Compare U-Nets and fully convolutional networks that segment pneumothorax: Dice, speed, size, receptive field.

cxr study pneumothorax --networks unet-resnet18 fcn8s-resnet18  # two of them, on a phantom archive

cxr study pneumothorax --preset published --archive s3://xrays/siim --out s3://xrays/study
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cxr.cli.options import ArchiveOptions
from cxr.cli.study_options import SegmentationNetworks, StudyOptions, StudyPreset
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Options(SegmentationNetworks, StudyOptions):
    """Settings of the job. The same command continues a killed study."""

    PRESETS: ClassVar[Mapping[str, StudyPreset]] = {
        "published": StudyPreset(
            "U-Nets and the networks of Long et al. 2015 on SIIM-ACR, images of 512 px, with ImageNet weights.",
            {"size": 512, "backbone_pretrained": "auto", "fully_connected": True, "epochs": 20},
            archive={"stored_size": 512},
            study={"networks": (), "seeds": 3},
            protocol="SIIM-ACR: 12,047 labeled images, split by the list of test images of the PNG release, or by a "
            "hash of the image id. Reported: a Dice of .843 and an IoU of .826 for a U-Net on a ResNet (Jakhar et "
            "al. 2019), a Dice of .868 on the private test images for the winners' ensemble. Long et al. report no "
            "results on X-rays; the table has theirs on PASCAL VOC (20 classes and background). Not run in full: "
            "about 19 GPU hours for 69 networks, computed from 1,337 GFLOP for one forward pass through all 23 "
            "kinds together, three times that per training image, 8,400 images, 20 epochs and 30 TFLOP/s.",
            differences=(
                "the test images are part of the labeled images, not those of the challenge",
                "all networks have the same loss, optimizer, augmentation and schedule, those of this family; `cxr "
                "train pneumothorax --help` lists how they differ from Long et al. (preset fcn8s-vgg16) and from "
                "the winners (preset siim)",
                "three networks of each kind, which differ by seed, without folds; the only test-time augmentation "
                "is the mirror image",
                "networks are trained in one stage, not as FCN-32s, then FCN-16s, then FCN-8s",
                "the settings of Jakhar et al. are not known",
            ),
        ),
    }

    out: str = "runs/study_pneumothorax"
    """Folder or URI of the results: table.md, networks.csv, dice.png, and a folder for each network."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=128))
    recipe: PneumothoraxRecipe = field(
        default_factory=lambda: PneumothoraxRecipe(size=128, epochs=8, fully_connected=False)
    )
    """Settings of all networks, except those in their names: architecture, backbone, attention."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.phantoms import siim_phantoms  # torch and Ray take seconds to import
    from cxr.cli.study_segmentation import run_study

    return run_study(options, siim_phantoms)
