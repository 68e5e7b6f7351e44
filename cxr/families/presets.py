"""Named settings of each family: `--preset NAME` in jobs, `preset(AecnnRecipe, "demo")` in Python."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from cxr import storage
from cxr.errors import UserError
from cxr.families.checkpoint_files import ABOUT

if TYPE_CHECKING:
    from cxr.families.base import SomeRecipe

HELP_WIDTH = 110  # characters of a line
RECIPE_FILE = "recipe.json"  # in OUT of a job that trains: the recipe that was used


@dataclass(frozen=True)
class Preset:
    """Settings in which a recipe differs from its family's defaults, and options of the job that go with them."""

    description: str
    settings: Mapping[str, Any]
    archive: Mapping[str, Any] = field(default_factory=dict)
    """Options of `cxr.cli.options.ArchiveOptions`."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Options of `cxr.training.options.RunOptions`."""
    protocol: str = ""
    """Of a preset that follows a paper: data set, splits, and the score that the paper reports."""
    differences: Sequence[str] = ()
    """Everything in which the preset is known to differ from the paper, a clause each."""

    def details(self) -> list[str]:
        """What the preset says of its paper, in paragraphs."""
        protocol = [self.protocol] if self.protocol else []
        head = ["Differs from the paper:"] if self.differences else []
        return [*protocol, *head, *(f"- {difference}" for difference in self.differences)]


PRESETS: dict[str, dict[str, Preset]] = {
    "align": {
        "demo": Preset(
            "A small aligner that two CPU cores train in about a minute.",
            {"size": 64, "epochs": 4, "backbone": "conv3"},
        ),
        "fast": Preset("Smaller images and fewer epochs, for searches on CPUs.", {"size": 96, "epochs": 12}),
        # The spatial transformer (Jaderberg et al. 2015) as trained for chest X-rays: ResNet-18 with ImageNet
        # weights, a hidden layer of 256, one transform of five parameters (tx, ty, sx, sy, rotation), images of 320 x
        # 320 px, aligned images 320 px high and 256 px wide. The loss is the mean of 15 times the squared difference
        # of the pixels and the squared differences of the features (Johnson et al. 2016) in VGG16's relu2_2 and the
        # three deeper layers: of five terms, hence weights of 15/5 and 4/5. AdamW, 1e-4, linear decay over 20 epochs.
        # Unlike there,
        # - the target is the mean of all training images, not of 1,000; the square around their lungs is found by a
        #   network trained on phantoms, and sampled with different scales for height and width;
        # - images are normalized by their local contrast, for the network (there: ImageNet's mean and standard
        #   deviation), for the loss of the pixels and, scaled to ImageNet's statistics, for VGG16;
        # - the five parameters are bounded: rotation 30 degrees, scales 1/2 to 2, translation half of the width;
        # - the loss is computed on the image as stored, sampled once through the product of the augmentation's and
        #   the predicted transform, so that exposure affects only the network's input, and nothing is blurred twice;
        # - the augmentation's limits are this family's (15 degrees, zoom 1.25 with a factor for each axis, shift
        #   10 %, contrast 30 %, brightness 0.1), and it changes every image; the publication's are not known;
        # - the batch size (16) and the order of height and width of the output are not known either;
        # - there is no second loss network: a DenseNet-121 trained on X-rays, given by --feature-network densenet121
        #   --first-feature-layer 1 --feature-layers 3 --feature-pretrained URI, replaces VGG16, and --target features
        #   is the publication's other target, but of whole images;
        # - the epoch with the highest correlation of the aligned validation images is kept;
        # - without ImageNet weights, ResNet-18 starts from random weights, and feature_network=local replaces VGG16.
        "published": Preset(
            "ResNet-18 and a VGG16 perceptual loss, images of 320 px; ImageNet weights if they can be downloaded.",
            {
                "size": 320,
                "output_width": 256,
                "lr": 1e-4,
                "weight_decay": 1e-4,
                "decay": "linear",
                "clip": 0.0,
                "backbone": "resnet18",
                "backbone_pretrained": "auto",
                "pooling": "mean",
                "iterations": 1,
                "lungs": False,
                "target": "lung_crops",
                "feature_network": "vgg16",
                "first_feature_layer": 2,
                "feature_layers": 4,
                "pixel_weight": 15 / 5,
                "feature_weight": 4 / 5,
                "structure_weight": 0.0,
                "equivariance_weight": 0.0,
                "identity_weight": 0.0,
                "gamma": 1.0,
                "noise": 0.0,
            },
            archive={"stored_size": 320},
        ),
    },
    "aecnn": {
        # Ranjan et al. 2018: mean AUROC .8241 on ChestX-ray14 with DenseNet-201, and 35.8 dB on patches. Unlike
        # there, learning rates warm up and then follow a cosine instead of falling to a tenth every 5 epochs, the
        # optimizer is AdamW, gradients are clipped, the stages share one batch size, and batch norm adapts
        # throughout.
        "published": Preset(
            "Ranjan et al. 2018 with DenseNet-201, on images of 1024 px; ImageNet weights if they can be downloaded.",
            {
                "size": 1024,
                "crop": 896,
                "patch": 128,
                "compressor": "published",
                "clip_latent": False,
                "backbone": "densenet201",
                "backbone_pretrained": "auto",
                "batch_size": 8,
                "epochs": 15,
                "classifier_epochs": 15,
                "autoencoder_epochs": 5,
                "lr": 1e-4,
                "classifier_lr": 1e-4,
                "autoencoder_lr": 1e-3,
                "weight_decay": 1e-5,
                "tta_crops": "ten",
            },
            archive={"stored_size": 1024},
        ),
        "demo": Preset(
            "A small codec and ResNet-18 that two CPU cores train in a few minutes.",
            {
                "backbone": "resnet18",
                "stem_stride": 2,
                "classifier_epochs": 2,
                "autoencoder_epochs": 3,
                "epochs": 2,
                "depth": 1,
                "width": 16,
            },
        ),
        "fast": Preset(
            "Images of 128 px and fewer epochs, for searches on CPUs.",
            {"size": 128, "batch_size": 32, "classifier_epochs": 3, "autoencoder_epochs": 1, "epochs": 6},
        ),
    },
    "attend": {
        "published": Preset(
            "Backbone and image size of Liu et al. 2019; add --aligner CHECKPOINT to align the images.",
            {"size": 512, "backbone": "resnet50", "backbone_stages": 4, "backbone_pretrained": "IMAGENET1K_V1"},
            archive={"stored_size": 512},
        ),
    },
    "classify": {
        "demo": Preset(
            "The small backbone with log-sum-exp pooling on 4,000 phantoms, for two CPU cores and ten minutes.",
            {"epochs": 14, "batch_size": 32, "lr": 3e-3, "head": "lse", "ema": 0.99},
            archive={"phantoms": 4000, "stored_size": 192},
        ),
        # Rajpurkar et al. 2017 (arXiv 1711.05225), version 3: mean AUROC .841 on ChestX-ray14, with their own random
        # split by patient (70 % train, 10 % val, 20 % test; not the official one) and an unweighted cross-entropy of
        # all 14 findings. Images of 224 px, ImageNet's weights and normalization, horizontal flips, Adam without
        # weight decay, batches of 16. Unlike there, the learning rate warms up and then follows a cosine instead of
        # falling to a tenth whenever the validation loss stops falling, and gradients are clipped.
        "densenet121-chexnet": Preset(
            "CheXNet (Rajpurkar et al. 2017): DenseNet-121, 224 px; ImageNet weights if they can be downloaded.",
            {
                "size": 224,
                "backbone": "densenet121",
                "backbone_pretrained": "auto",
                "batch_size": 16,
                "lr": 1e-3,
                "weight_decay": 0.0,
                "rotation_deg": 0.0,
                "max_zoom": 1.0,
                "translate": 0.0,
                "exposure": 0.0,
            },
            archive={"stored_size": 256},
        ),
        # Fine-tuning as in Liu et al. 2022 (arXiv 2201.03545, table 6): layer-wise learning rate decay .8 and
        # weight decay; their drop path is left out.
        "convnext": Preset(
            "ConvNeXt-Tiny with layer-wise learning rate decay; ImageNet weights if they can be downloaded.",
            {
                "size": 224,
                "epochs": 10,
                "backbone": "convnext_tiny",
                "backbone_pretrained": "auto",
                "batch_size": 32,
                "lr": 5e-4,
                "layer_decay": 0.8,
                "weight_decay": 0.05,
                "ema": 0.999,
                "warmup": 0.1,
            },
            archive={"stored_size": 256},
        ),
        # Oquab et al. 2023 (arXiv 2304.07193): a linear layer on frozen features.
        "vit-dinov2-frozen": Preset(
            "A linear layer on a frozen DINOv2 ViT-B/14; give its weights with --backbone-pretrained.",
            {
                "size": 224,
                "epochs": 10,
                "backbone": "timm:vit_base_patch14_dinov2",
                "input": "dinov2",
                "backbone_pretrained": "auto",
                "freeze_backbone": True,
                "batch_size": 64,
                "lr": 1e-3,
            },
            archive={"stored_size": 256},
        ),
    },
    "detect": {
        "demo": Preset(
            "The smallest network with AdamW and without mosaic, for a few hundred images on CPUs.",
            {
                "size": 256,
                "epochs": 20,
                "batch_size": 8,
                "optimizer": "adamw",
                "lr": 0.001,
                "mosaic": 0.0,
                "close_mosaic": 0,
                "scale_jitter": 0.3,
            },
        ),
        "ultralytics": Preset(
            "YOLOv5m with the settings of Ultralytics, for long training runs on many images of 640 px.",
            {"architecture": "yolov5m"},
            archive={"stored_size": 640},
        ),
    },
    "localize": {
        "published": Preset(
            "Sedai et al. 2018: DenseNet-121, average pooling, images of 512 px.",
            {"size": 512, "backbone": "densenet121", "backbone_pretrained": "IMAGENET1K_V1", "pooling": "mean"},
            archive={"stored_size": 512},
        ),
    },
    "lungs": {
        "demo": Preset(
            "A small U-Net on images of 96 px, for two CPU cores and a minute.",
            {"size": 96, "epochs": 12, "warmup_size": 0, "warmup_epochs": 0, "batch_size": 8, "ema": 0.9},
        ),
        "reported": Preset(
            "The 100 epochs behind the lung figures in the documentation.", {"epochs": 50, "warmup_epochs": 50}
        ),
    },
    "pneumothorax": {
        "demo": Preset(
            "A small U-Net on images of 256 px, for CPUs.", {"size": 256, "architecture": "small_unet", "lr": 2e-3}
        ),
        "siim": Preset(
            "Settings of the winners of SIIM-ACR 2019: U-Net, 512 px, decreasing fraction of positives, averaging.",
            {
                "size": 512,
                "architecture": "unet",
                "lr": 5e-4,
                "positive_fraction_start": 0.8,
                "positive_fraction_end": 0.4,
            },
            archive={"stored_size": 512},
            run={"average_checkpoints": 3},
        ),
    },
}


def presets_help(presets: Mapping[str, Preset]) -> str:
    """Presets with what they say, for `--help`."""
    width, lines = max(map(len, presets), default=0), ["Presets:"]
    for name, preset in presets.items():
        lines.append(f"  {name:<{width}}  {preset.description}")
        for text in preset.details():
            below = " " * (width + 4)
            hanging = below + "  " * text.startswith("- ")
            lines += textwrap.wrap(text, HELP_WIDTH, initial_indent=below, subsequent_indent=hanging)
    return "\n".join(lines)


def find_preset(family: str, name: str) -> Preset:
    """The preset of a family.

    Raises:
        UserError: the family has no preset of this name.
    """
    presets = PRESETS[family]
    if name not in presets:
        raise UserError(f"--preset: expected one of {', '.join(presets)} for family {family}, got {name}")
    return presets[name]


def preset(recipe_type: type[SomeRecipe], name: str) -> SomeRecipe:
    """A recipe with the settings of a preset, and the family's defaults for all others."""
    return recipe_type(**find_preset(recipe_type.family, name).settings)


def read_recipe(recipe_type: type[SomeRecipe], uri: str) -> SomeRecipe:
    """The recipe at `uri`: a JSON or YAML file of settings, a `result.json`, or the folder of a checkpoint.

    Settings that the file does not name have the family's defaults.

    Raises:
        UserError: there is no such file, it contains no settings, or they are of another family.
    """
    uri = storage.normalize(uri)
    about = storage.join(uri, ABOUT)
    data = storage.read_bytes(about if storage.exists(about) else uri)
    try:
        content = yaml.safe_load(data)  # JSON, too, is YAML
    except yaml.YAMLError as error:
        raise UserError(f"--recipe {uri}: expected JSON or YAML, got a file that is neither") from error
    if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
        content = content["recipe"]  # of checkpoint.json or result.json
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--recipe {uri}: expected settings by name, a result.json or a checkpoint")
    known = {"family", *(f.name for f in dataclasses.fields(recipe_type))}
    if unknown := set(content) - known:
        raise UserError(
            f"--recipe {uri}: family {recipe_type.family} has no setting {', '.join(sorted(unknown))}; see --help"
        )
    usual = {f.name: f.default for f in dataclasses.fields(recipe_type)}
    try:  # YAML 1.1 reads 1e-4, without a point, as a text
        numbers = {name: float(value) for name, value in content.items() if isinstance(usual.get(name), float)}
        return recipe_type.from_dict(content | numbers)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--recipe {uri}: a setting has a value of the wrong type: {error}") from error
