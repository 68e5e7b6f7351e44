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
        head = ["Differs from the published work:"] if self.differences else []
        return [*protocol, *head, *(f"- {difference}" for difference in self.differences)]


PRESETS: dict[str, dict[str, Preset]] = {
    "align": {
        "demo": Preset(
            "A small aligner that two CPU cores train in about a minute.",
            {"size": 64, "epochs": 4, "backbone": "conv3"},
        ),
        "fast": Preset("Smaller images and fewer epochs, for searches on CPUs.", {"size": 96, "epochs": 12}),
        # Jaderberg et al. 2015; the perceptual loss is that of Johnson et al. 2016. Its loss is a mean of five terms.
        "published": Preset(
            "ResNet-18 and a VGG16 perceptual loss, images of 320 px; ImageNet weights if they can be downloaded.",
            {
                "size": 320,
                "output_width": 256,
                "epochs": 20,
                "lr": 1e-4,
                "weight_decay": 1e-4,
                "decay": "linear",
                "clip": 0.0,
                "backbone": "resnet18",
                "backbone_pretrained": "auto",
                "pooling": "mean",
                "iterations": 1,
                "reduction": 1,
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
            protocol="ChestX-ray14, images of 320 x 320 px, aligned images 320 px high and 256 px wide. ResNet-18 "
            "with ImageNet weights predicts one transform of five parameters. The loss is the mean of 15 times the "
            "squared difference of the pixels and of the squared differences of features in four layers of VGG16, "
            "from relu2_2 on. AdamW, 1e-4, linear decay over 20 epochs. Reported: a DenseNet-121 has a mean AUROC of "
            ".8110 on initial and .8124 on aligned images.",
            differences=(
                "the target is the mean of all training images, not of 1,000, each cropped to its lungs by a network "
                "trained on phantoms, with different scales for height and width",
                "images are normalized by their local contrast: for the network (instead of ImageNet's mean and "
                "standard deviation), for the pixel loss and, scaled to ImageNet's statistics, for VGG16",
                "the five parameters are bounded: rotation 30 degrees, scales 1/2 to 2, translation half of the "
                "width",
                "the loss is computed on the stored image, which is resampled once by the product of the "
                "augmentation's and the predicted transform, so that exposure affects only the network's input",
                "the limits of the augmentation are this family's (15 degrees, zoom 1.25 per axis, shift 10 %, "
                "contrast 30 %, brightness .1), and every image is augmented; the paper's are not known",
                "the batch size (16) and the order of height and width of the output are not known, either",
                "there is no second loss network: --feature-network densenet121 --first-feature-layer 1 "
                "--feature-layers 3 --feature-pretrained URI replaces VGG16 with a DenseNet-121 trained on X-rays",
                "the paper's other target, the features of the lung-cropped mean, is --target features here, on "
                "whole images",
                "the epoch with the highest correlation of the aligned validation images is kept",
                "without ImageNet weights, ResNet-18 starts from random weights, and --feature-network local "
                "replaces VGG16",
            ),
        ),
    },
    "aecnn": {
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
            protocol="ChestX-ray14 with its official test images (25,596); 76,524 images for training and 10,000 for "
            "validation. Reported: mean AUROC .8241 with DenseNet-201, .8226 with DenseNet-121, .8220 for a "
            "DenseNet-121 without the codec, and 35.8 dB on patches.",
            differences=(
                "one of the codec's 32 channels is initialized to resizing, not randomly",
                "latents are rounded to 8 bits in training, too, and gradients pass through the rounding",
                "clipping to [0, 1] blocks only gradients that drive a clipped value further outside; those of the "
                "paper's clipped ReLU are 0 there",
                "learning rates have a warmup and cosine decay instead of falling to a tenth every 5 epochs, and the "
                "optimizer is AdamW instead of Adam",
                "gradients are clipped at a norm of 1",
                "layers compute in bfloat16, where the hardware supports it",
                "the classifier stage trains on crops of 896 px that are averaged over 4 x 4 pixels and rotated as "
                "in the joint stage, instead of images resized to 256 px, cropped to 224 px and only flipped",
                "the autoencoder stage has its own schedule: 5 epochs from 1e-3, with four patches of each image in "
                "each of four steps",
                "all stages share the batch size of 8",
                "the ten crops are cut from the latent of the whole image, not encoded one by one",
                "batch norm statistics are updated throughout; the published run froze them after the first epoch by "
                "mistake (--batchnorm-calibration-epochs 1)",
                "validation images are chosen by a hash of the patient, about a tenth of the official train_val list",
            ),
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
            protocol="ChestX-ray14, five folds of the images with boxes, with all others for training. Reported: "
            "mean accuracy of eight findings of .53, .39 and .12 at T(IoU) = .3, .5 and .7. No code was published; "
            "this implementation follows the paper's text as far as it was available.",
            differences=(
                "the factors of the cells are not rescaled to [.98, 1]; losses are sums of logarithms, and a finding "
                "with a box weighs as much as one with a label (the paper's 5 is .1 here)",
                "in scoring, an image is compared with the mean features of training images without findings, not "
                "with one such image",
                "the aligner is that of family align, not one trained towards the mean of 500 normal images",
                "without --aligner, images are not aligned",
                "half of the images of an epoch have a finding",
                "the cells' maps are thresholded at half of their maximum to obtain boxes (--box-threshold-mode)",
                "the optimizer (AdamW from 5e-4 along a cosine, 12 epochs of batches of 16, gradients clipped), the "
                "augmentation and bfloat16 are this family's",
                "the official split has no training images with boxes; see docs/how-to/localization.md for folds",
            ),
        ),
    },
    "classify": {
        "demo": Preset(
            "The small backbone with log-sum-exp pooling on 4,000 phantoms, for two CPU cores and ten minutes.",
            {"epochs": 14, "batch_size": 32, "lr": 3e-3, "head": "lse", "ema": 0.99},
            archive={"phantoms": 4000, "stored_size": 192},
        ),
        # Rajpurkar et al. 2017 (arXiv 1711.05225), version 3.
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
            protocol="ChestX-ray14, split at random by patient: 70 % for training, 10 % for validation, 20 % for "
            "testing. Reported: mean AUROC .841.",
            differences=(
                "the split is the official one, unless a table of labels has another",
                "the learning rate warms up and follows a cosine over 20 epochs, instead of falling to a tenth when "
                "the validation loss stops falling",
                "gradients are clipped at a norm of 1",
                "layers compute in bfloat16 on GPUs",
                "images are resized to 256 px first, and then to 224 px on the device",
                "the epoch with the highest mean AUROC is kept, not the one with the lowest loss",
            ),
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
        # Szegedy et al. 2016 (arXiv 1512.00567), with the normalization and the size of its ImageNet weights.
        "inception-v3-frozen": Preset(
            "A linear layer on a frozen InceptionV3, 299 px; ImageNet weights if they can be downloaded.",
            {
                "size": 299,
                "epochs": 10,
                "backbone": "inception_v3",
                "input": "inception",
                "backbone_pretrained": "auto",
                "freeze_backbone": True,
                "batch_size": 64,
                "lr": 1e-3,
            },
            archive={"stored_size": 320},
        ),
        # He et al. 2016 (arXiv 1512.03385).
        "resnet50-frozen": Preset(
            "A linear layer on a frozen ResNet-50, 224 px; ImageNet weights if they can be downloaded.",
            {
                "size": 224,
                "epochs": 10,
                "backbone": "resnet50",
                "backbone_pretrained": "auto",
                "freeze_backbone": True,
                "batch_size": 64,
                "lr": 1e-3,
            },
            archive={"stored_size": 320},
        ),
        # Oquab et al. 2023 (arXiv 2304.07193): a linear layer on frozen features.
        "vit-dinov2-frozen": Preset(
            "A linear layer on a frozen DINOv2 ViT-B/14; name its weights with --backbone-pretrained.",
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
            protocol="The published YOLOv5 results on VinBigData's hidden test images are .154 to .269 (mAP at IoU > "
            ".4) for one network.",
            differences=(
                "the head is the anchor-free one of YOLOv5u, not the anchors of 2020, and its losses are CIoU, "
                "cross-entropy and distribution focal loss, without an objectness loss",
                "the number of accumulated batches is constant; Ultralytics increases it during the warmup",
                "partners of mosaic and mixup come from a window of 64 images, not from all",
                "images are grayscale, so hue and saturation are not augmented",
                "findings without a known box are masked, not trained as background",
                "classification layers of pretrained weights are not loaded if the number of findings differs",
                "initial weights are random, unless --pretrained names some",
            ),
        ),
    },
    "localize": {
        "published": Preset(
            "Sedai et al. 2018: DenseNet-121, average pooling, images of 512 px.",
            {
                "size": 512,
                "backbone": "densenet121",
                "backbone_pretrained": "IMAGENET1K_V1",
                "pooling": "mean",
                "combine_stages": "logits",
                "stage_weight_gain": 10.0,
                "tune_boxes": False,
                "lr": 2e-3,
            },
            archive={"stored_size": 512},
            protocol="ChestX-ray14, 112,000 images, trained on labels only. The paper reports gains for nodules and "
            "masses over using only the last stage. Only its abstract and quotations in other papers were available; "
            "the rest is a reconstruction.",
            differences=(
                "maps are scaled by two numbers per stage and finding, which are measured on validation images, not "
                "by each image's own range",
                "the learning rate of the stages' weights (the paper's relevance) is ten times that of other weights",
                "maps are thresholded at half of their maximum to obtain boxes; for Wang et al.'s thresholds 60 and "
                "180, use --box-threshold-mode wang",
                "the optimizer (AdamW from 2e-3 along a cosine, 20 epochs of batches of 16, gradients clipped), the "
                "augmentation (flips, rotation, zoom, translation, exposure) and bfloat16 on GPUs are this family's; "
                "the paper's were not available",
                "the split is the official one",
            ),
        ),
    },
    "lungs": {
        "demo": Preset(
            "A small U-Net on images of 96 px, for two CPU cores and a minute.",
            {"size": 96, "epochs": 12, "warmup_size": 0, "warmup_epochs": 0, "batch_size": 8, "ema": 0.9},
        ),
        "reported": Preset(
            "The 100 epochs of the lung segmentation results in the documentation.",
            {"epochs": 50, "warmup_epochs": 50},
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
            protocol="SIIM-ACR: 12,047 images, five folds. Reported: a Dice of .868 on the private test images for "
            "the winners' ensemble.",
            differences=(
                "one U-Net on ResNet-34, not five folds each (--folds 5, --members 5) of AlbuNet-34, of a U-Net on "
                "ResNet-50 and of one on SE-ResNeXt-50 with scSE",
                "images of 512 px only, without further training at 1024 px",
                "the fraction of positives falls linearly over 20 epochs; theirs was .8, .6 and .4 in turn",
                "the weights of the losses are 3 : 1 : 4 (cross-entropy, Dice, focal) throughout, and an image-level "
                "loss is added with a weight of .5",
                "the rule for empty masks is chosen on the validation images, not (.75, 2000, .3)",
                "AdamW along a cosine instead of Adam; bfloat16; this family's augmentation",
                "initial weights are random, unless --backbone-pretrained names some",
            ),
        ),
        "fcn8s-vgg16": Preset(
            "Long et al. 2015: FCN-8s on VGG16 with its fully connected layers; ImageNet weights if available.",
            {
                "size": 512,
                "architecture": "fcn8s",
                "backbone": "vgg16",
                "backbone_pretrained": "auto",
                "fully_connected": True,
                "bce_weight": 1.0,
                "dice_weight": 0.0,
                "focal_weight": 0.0,
                "image_weight": 0.0,
                "lr": 1e-4,
            },
            archive={"stored_size": 512},
            protocol="The paper segments 21 classes of photographs (PASCAL VOC 2011): mean IU .594, .624 and .627 "
            "with strides of 32, 16 and 8. No published score on X-rays.",
            differences=(
                "images are not padded by 100 px; the fully connected layers are padded instead, and upsampling "
                "places cells by their receptive fields",
                "one class with a sigmoid instead of 21 with a softmax",
                "trained in one stage, not as FCN-32s, then FCN-16s, then FCN-8s",
                "AdamW from 1e-4 along a cosine with batches of 8 instead of SGD with momentum .9, a fixed rate and "
                "batches of 20",
                "the loss is a mean over pixels, not their sum, and gradients are clipped",
                "images are flipped, rotated, zoomed and changed in exposure; the paper found no gain from this",
                "bfloat16, where the hardware supports it",
                "there is no dropout after the fully connected layers",
            ),
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
            lines += textwrap.wrap(
                text, HELP_WIDTH, initial_indent=below, subsequent_indent=hanging, break_on_hyphens=False
            )
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
    if storage.exists(about):
        uri = about
    elif storage.is_folder(uri):
        raise UserError(f"--recipe {uri} contains no {ABOUT}: use the folder of a checkpoint, or a file of settings")
    data = storage.read_bytes(uri)
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
