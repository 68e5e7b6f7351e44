"""Family `aecnn`: compresses X-rays with an autoencoder and classifies the compressed representation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn

from cxr import schema
from cxr.augment.affine_exposure import random_affine
from cxr.augment.crops import corner_crops, random_crops, random_flips
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families.base import Batches, Communicator, Stage, one_of, unit, unit_pixels
from cxr.families.classifier_base import (
    ClassifierRecipe,
    ClassifierTask,
    count_labels,
    label_rows,
    positive_class_weights,
)
from cxr.models import pretrained
from cxr.models.aecnn import AECNN, Codec, NoCodec, PublishedCodec, ResidualCodec, ResizeCodec, clipped
from cxr.models.classifier import CLASSIFIERS, Classifier, ClassifierName, StemStride, load_body, norm_layers
from cxr.models.pretrained import Fit, Weights
from cxr.models.spatial_transformer import warp
from cxr.reporting import figures
from cxr.schema import PixelFormat

Compressor = Literal["residual", "published", "resize", "none"]
StageName = Literal["classifier", "autoencoder", "joint"]
TtaCrops = Literal["full", "center", "five", "ten"]
STAGES: tuple[StageName, ...] = get_args(StageName)
FACTORS = {4: 2, 16: 4, 64: 8}  # compression -> downsampling factor of each side
MIN_FEATURE_SIZE = 8  # pixels that a DenseNet needs after its stem
SEARCHED_BACKBONES = ("resnet18", "densenet121", "densenet169", "densenet201")
PICTURED = 6  # images in the picture of a run


@dataclass(frozen=True, kw_only=True)
class AecnnRecipe(ClassifierRecipe):
    """AE-CNN (Ranjan et al. 2018), as published (preset `published`) or with another codec, backbone or schedule."""

    family: ClassVar[str] = "aecnn"
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*ClassifierRecipe.LOCATION_SETTINGS, "start_from")
    depends_on: ClassVar[Mapping[str, str]] = {"bce_weight": "mse_weight"}

    size: int = 256
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    epochs: int = 8
    """Number of epochs of the joint stage."""
    batch_size: int = 16
    lr: float = 5e-4
    """Peak learning rate of the joint stage."""

    compressor: Compressor = "residual"
    """Codec. residual: downsampling corrected by a network; published: the codec of the paper (1025 parameters,
    16:1); resize: plain downsampling; none: no compression. The last two are baselines."""
    compression: int = 16
    """Number of image pixels per latent value: 4, 16 or 64."""
    depth: int = 2
    """Number of convolutions of the residual codec in each direction, 1 to 4."""
    width: int = 32
    """Number of channels of the residual codec's convolutions."""
    latent_bits: int = 8
    """Bits per stored latent value: 8 or 16."""
    clip_latent: bool = True
    """Clip latents to [0, 1] in the autoencoder stage, too. The paper does not do this."""

    backbone: ClassifierName = "densenet121"
    """torchvision network that classifies the latents."""
    stem_stride: Literal[0, 1, 2, 4] = 0
    """Downsampling of the backbone's first layers: 4 (as published), 2 or 1. 0: the largest value that leaves at
    least 8 pixels per side."""

    first_stage: StageName = "classifier"
    """First stage of training. classifier: train the classifier on downsampled images; autoencoder: train the
    autoencoder on patches; joint: train both together."""
    last_stage: StageName = "joint"
    """Last stage of training."""
    start_from: str = ""
    """URI of a checkpoint of this family to load before the first stage."""
    classifier_epochs: int = 8
    """Number of epochs of the classifier stage."""
    classifier_lr: float = 1e-3
    """Peak learning rate of the classifier stage."""
    autoencoder_epochs: int = 4
    """Number of epochs of the autoencoder stage."""
    autoencoder_lr: float = 2e-3
    """Peak learning rate of the autoencoder stage."""

    mse_weight: float = 0.1
    """Weight of the squared error of decoded images in the joint stage."""
    bce_weight: float = 0.9
    """Weight of the cross-entropy of the findings in the joint stage."""
    pos_weight_power: float = 0.0
    """Exponent p of the weight (negatives / positives)^p of a finding's positives in the cross-entropy; negatives
    have weight 1. 0: unweighted. (Family localize weights both classes instead.)"""
    batchnorm_calibration_epochs: int | None = None
    """Number of epochs of a stage after which batch-norm statistics are frozen. Unset: never. The published run used
    1 by mistake."""

    crop: int = 0
    """Random-crop size in pixels. 0 trains on whole images."""
    patch: int = 64
    """Size in pixels of the random patches of the autoencoder stage."""
    patches: int = 4
    """Number of patches sampled per image and step."""
    data_echo_factor: int = 4
    """Number of steps of the autoencoder stage per batch, each with new patches (data echoing, Choi et al. 2019)."""
    rotation_deg: float = 5.0
    """Augmentation: maximum rotation in degrees."""
    flip: float = 0.5
    """Augmentation: probability of a horizontal flip."""
    tta_crops: TtaCrops = "full"
    """Which crops validation and scoring classify: the full image, its center crop, or the mean over five or ten
    crops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("compressor", self.compressor, get_args(Compressor))
        one_of("backbone", self.backbone, CLASSIFIERS)
        one_of("first_stage", self.first_stage, STAGES)
        one_of("last_stage", self.last_stage, STAGES)
        one_of("tta_crops", self.tta_crops, get_args(TtaCrops))
        one_of("compression", self.compression, tuple(FACTORS))
        one_of("latent_bits", self.latent_bits, (8, 16))
        one_of("stem_stride", self.stem_stride, (0, *get_args(StemStride)))
        one_of("depth", self.depth, (1, 2, 3, 4))
        for name in ("width", "patch", "patches", "data_echo_factor", "classifier_epochs", "autoencoder_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("crop", "rotation_deg", "batchnorm_calibration_epochs", "mse_weight", "pos_weight_power"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("classifier_lr", "autoencoder_lr", "bce_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip: expected a probability from 0 to 1, got {self.flip}")
        self._check_sizes()
        self._check_stages()

    def _check_sizes(self) -> None:
        if self.compressor == "published" and self.compression != 16:
            raise UserError(
                f"compression: expected 16 for the published codec, got {self.compression}: use compressor=residual"
            )
        for name in ("crop", "patch"):
            if getattr(self, name) > self.size:
                raise UserError(f"{name}: expected at most size={self.size}, got {getattr(self, name)}")
        for name in ("size", "crop", "patch"):
            if getattr(self, name) % self.factor:
                raise UserError(
                    f"{name}: expected a multiple of {self.factor}, the codec's downsampling factor, got "
                    f"{getattr(self, name)}"
                )
        side = self.input_size // self.factor
        if self.backbone.startswith("densenet") and side // self.stride < MIN_FEATURE_SIZE:
            raise UserError(
                f"latents of {side} pixels are too small for {self.backbone} with stem_stride={self.stem_stride}: "
                f"raise size or crop, or lower compression or stem_stride"
            )

    def _check_stages(self) -> None:
        if not self.stages():
            raise UserError(
                f"first_stage={self.first_stage}, last_stage={self.last_stage}: no stage is left to train with "
                f"compressor={self.compressor}"
            )
        if self.compressor == "published" and self.last_stage == "classifier":
            raise UserError(
                "last_stage=classifier would leave the published encoder untrained: use compressor=resize"
            )
        if self.start_from and self.last_stage == "classifier" and self.codec_is_trained:
            raise UserError(
                "last_stage=classifier trains the classifier on downsampled images, not on the latents of "
                "start_from: use last_stage=joint"
            )

    # ---- What the settings imply

    @property
    def factor(self) -> int:
        """Downsampling factor of the codec."""
        return 1 if self.compressor == "none" else FACTORS[self.compression]

    @property
    def codec_is_trained(self) -> bool:
        """Whether the codec has parameters."""
        return self.compressor in ("residual", "published")

    @property
    def input_size(self) -> int:
        """Height and width, in image pixels, of the region that the classifier sees."""
        return self.crop or self.size

    @property
    def stride(self) -> StemStride:
        """Downsampling of the backbone's first layers, after resolving stem_stride=0."""
        side = self.input_size // self.factor
        fitting: list[StemStride] = [stride for stride in (4, 2) if side // stride >= MIN_FEATURE_SIZE]
        return self.stem_stride or (fitting[0] if fitting else 1)

    @property
    def trained_last(self) -> str:
        """The last stage that runs. Not always `last_stage`: an autoencoder stage without parameters is skipped."""
        return self.stages()[-1].name

    @property
    def classifier_is_trained(self) -> bool:
        """Whether the classifier is trained on the final latents; it is not if the autoencoder stage is the last."""
        return self.trained_last != "autoencoder"

    @property
    def monitor(self) -> str:
        return "mean_auroc" if self.classifier_is_trained else "psnr_pooled"

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        of_labels = ["mean_auroc", "mean_ap"] if self.classifier_is_trained else []
        of_images = ["psnr_pooled"] if self.trained_last != "classifier" and self.factor > 1 else []
        return dict.fromkeys(of_labels + of_images, "max")

    @property
    def may_change_on_resume(self) -> tuple[str, ...]:
        return ("epochs" if self.trained_last == "joint" else f"{self.trained_last}_epochs", "patience")

    def stages(self) -> tuple[Stage, ...]:
        stages = (
            Stage("classifier", self.classifier_epochs, self.classifier_lr),
            Stage("autoencoder", self.autoencoder_epochs, self.autoencoder_lr, self.data_echo_factor),
            Stage("joint", self.epochs, self.lr),
        )
        chosen = stages[STAGES.index(self.first_stage) : STAGES.index(self.last_stage) + 1]
        return tuple(stage for stage in chosen if self.codec_is_trained or stage.name != "autoencoder")

    # ---- Network and pretrained weights

    def network(self, findings: Sequence[str]) -> AECNN:
        classifier = Classifier(self.backbone, len(findings), self.stride)
        return AECNN(self._codec(), classifier, findings, self.latent_bits)

    def _codec(self) -> Codec:
        match self.compressor:
            case "residual":
                return ResidualCodec(self.factor, self.depth, self.width)
            case "published":
                return PublishedCodec()
            case "resize":
                return ResizeCodec(self.factor)
            case "none":
                return NoCodec()

    def task(self, network: nn.Module) -> AecnnTask:
        return AecnnTask(self, network)

    @property
    def torchvision_backbone(self) -> str:
        return self.backbone

    def load_backbone(self, network: nn.Module, state: Mapping[str, Tensor]) -> Fit:
        return load_body(_aecnn(network).classifier, state)

    def initial_weights(self) -> dict[str, str]:
        return {"start_from": "", **super().initial_weights()}

    def fit_weights(self, setting: str, weights: Weights) -> Fit:
        if setting == "start_from":
            return _match_all(self.network(weights.findings or ("any",)), weights.state)
        return super().fit_weights(setting, weights)

    def load_initial_weights(self, network: nn.Module) -> None:
        aecnn = _aecnn(network)
        if self.start_from:
            known = pretrained.findings_of(self.start_from)
            if known is not None and known != aecnn.findings:
                raise UserError(
                    f"start_from={self.start_from}: expected the archive's findings {', '.join(aecnn.findings)}, got "
                    f"{', '.join(known)}: use it as backbone_pretrained, which does not load the last layer"
                )
            aecnn.load_state_dict(_match_all(aecnn, pretrained.from_uri(self.start_from)).state)
        if self.backbone_pretrained:
            same_findings = pretrained.findings_of(self.backbone_pretrained) == aecnn.findings
            load_body(aecnn.classifier, pretrained.from_uri(self.backbone_pretrained), head=same_findings)

    # ---- Scoring

    def probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        """NaN from a checkpoint whose classifier was not trained."""
        return self.latent_probabilities(_aecnn(network), _aecnn(network).encode(unit_pixels(batch, self.size)))

    def latent_probabilities(self, network: AECNN, latent_B1hw: Tensor) -> Tensor:
        """(B, F) probabilities from latents, averaged over `tta_crops`."""
        if not self.classifier_is_trained:
            return latent_B1hw.new_full((len(latent_B1hw), len(network.findings)), math.nan)
        return crop_probabilities(network, latent_B1hw, self.input_size, self.tta_crops)

    def decide(self, raw: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        scores = super().decide(raw, network)
        if not self.classifier_is_trained:
            scores[schema.DECISIONS].fill_(schema.UNKNOWN)
        return scores

    def shared_settings(self) -> tuple[str, ...]:
        if not self.classifier_is_trained:
            raise UserError(
                "networks without a trained classifier cannot form an ensemble, because latents of different "
                "compressors cannot be combined: use last_stage=joint or last_stage=classifier"
            )
        return super().shared_settings()

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """decoded: the image after compression and decompression."""
        return _render_decoded(_aecnn(network), _aecnn(network).encode(unit_pixels(batch, self.size)))

    def latent_format(self) -> PixelFormat:
        side = self.size // self.factor
        try:
            return PixelFormat(side, self.latent_bits)
        except ValueError as error:
            raise UserError(
                f"expected latents of 16 to 4096 pixels per side for an archive, got {side} with size={self.size} "
                f"and compression={self.compression}: change size or compression"
            ) from error

    def encode(self, network: nn.Module, batch: Batch) -> Tensor:
        values_Bhw = _aecnn(network).encode(unit_pixels(batch, self.size))[:, 0] * (2**self.latent_bits - 1)
        return values_Bhw.round().to(torch.uint8 if self.latent_bits == 8 else torch.uint16)

    def encoder_state(self, network: nn.Module) -> dict[str, Tensor]:
        state = _aecnn(network).codec.state_dict()
        return {name: values for name, values in state.items() if name.startswith("encoder.")}

    def predict_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        latent_B1hw = unit_pixels(batch, self.latent_format().size)
        return self.decide({schema.PROBABILITIES: self.latent_probabilities(_aecnn(network), latent_B1hw)}, network)

    def render_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return _render_decoded(_aecnn(network), unit_pixels(batch, self.latent_format().size))

    # ---- Search

    def search_space(self) -> dict[str, BaseDistribution]:
        """The last stage's learning rate, loss weights, codec and backbone.

        Settings that no stage uses, or that initial weights determine, are left out.
        """
        learning_rates = {"joint": "lr", "autoencoder": "autoencoder_lr", "classifier": "classifier_lr"}
        low, high = {"joint": (1e-4, 2e-3), "autoencoder": (4e-4, 8e-3), "classifier": (2e-4, 4e-3)}[
            self.trained_last
        ]
        space: dict[str, BaseDistribution] = {
            learning_rates[self.trained_last]: FloatDistribution(low, high, log=True)
        }
        if self.trained_last == "joint" and self.codec_is_trained:  # else the only term's weight just scales the loss
            space |= {
                "bce_weight": FloatDistribution(0.1, 1, log=True),
                "mse_weight": FloatDistribution(0.01, 100, log=True),
            }
        backbones = [self.backbone]
        if self.classifier_is_trained and not self.start_from and not self.backbone_pretrained:
            backbones = [name for name in SEARCHED_BACKBONES if self._allows(backbone=name)]
            space["backbone"] = CategoricalDistribution(backbones)
        if self.compressor == "residual" and not self.start_from:
            fitting = [c for c in FACTORS if all(self._allows(compression=c, backbone=name) for name in backbones)]
            space["compression"] = CategoricalDistribution(fitting)
            if self.trained_last != "classifier":  # which sees downsampled images
                space |= {"depth": IntDistribution(1, 4), "width": CategoricalDistribution([8, 16, 32, 64])}
        return space

    def _allows(self, **changes: object) -> bool:
        """Whether the recipe is valid with these changes."""
        try:
            self.replace(**changes)
        except UserError:
            return False
        return True


class AecnnTask(ClassifierTask):
    """An AE-CNN in one of its stages."""

    recipe: AecnnRecipe
    stage_epochs: Tensor

    def __init__(self, recipe: AecnnRecipe, network: nn.Module) -> None:
        super().__init__(recipe, network)
        self.resizing = ResizeCodec(recipe.factor)
        self.stage: StageName = "joint"
        self.register_buffer("stage_epochs", torch.zeros((), dtype=torch.long))  # epochs finished in this stage

    @property
    def aecnn(self) -> AECNN:
        return _aecnn(self.network)

    @property
    def compresses(self) -> bool:
        return self.recipe.factor > 1

    def compiled_modules(self) -> list[nn.Module]:
        return [self.aecnn.classifier, *self.aecnn.codec.children()]

    def enter_stage(self, stage: str) -> None:
        """Make the parameters of the classifier, of the codec, or of both trainable."""
        one_of("stage", stage, STAGES)
        self.stage = stage  # pyright: ignore[reportAttributeAccessIssue]
        self.stage_epochs.zero_()
        self.aecnn.classifier.requires_grad_(stage != "autoencoder")
        self.aecnn.codec.requires_grad_(stage != "classifier")
        if stage == "joint" and not self.recipe.mse_weight and hasattr(self.aecnn.codec, "decoder"):
            self.aecnn.codec.get_submodule("decoder").requires_grad_(False)

    def train(self, mode: bool = True) -> AecnnTask:
        super().train(mode)
        calibration = self.recipe.batchnorm_calibration_epochs
        if mode and calibration is not None and int(self.stage_epochs) >= calibration:
            for layer in norm_layers(self.network):
                layer.eval()
        return self

    def end_epoch(self, workers: Communicator) -> None:
        self.stage_epochs += 1

    def begin(self, batches: Batches, workers: Communicator) -> None:
        super().begin(batches, workers)
        if self.recipe.pos_weight_power:
            counts_2F = count_labels(batches, workers, len(self.findings), self.class_weight.device)
            self.class_weight = positive_class_weights(counts_2F, self.recipe.pos_weight_power)

    def augmented(self, batch: Batch) -> Batch:
        """Random crops, one per rotated and flipped image. The autoencoder stage: patches, and no other columns."""
        recipe, stored = self.recipe, batch[schema.PIXELS]
        if self.stage == "autoencoder":
            # Patches are cut before the conversion to float if images are stored at the network's size.
            as_stored = stored.dtype == torch.uint8 and stored.shape[-1] == recipe.size
            whole = stored.unsqueeze(1) if as_stored else unit_pixels(batch, recipe.size)
            patches = torch.cat([random_crops(whole, recipe.patch) for _ in range(recipe.patches)])
            return {schema.PIXELS: unit(patches)[:, 0]}
        x_B1HW = unit_pixels(batch, recipe.size)
        if recipe.rotation_deg:
            rotations = random_affine(
                len(x_B1HW), rotation_deg=recipe.rotation_deg, max_zoom=1, translate=0, device=x_B1HW.device
            )
            x_B1HW = warp(x_B1HW, rotations)
        if recipe.flip:
            x_B1HW = random_flips(x_B1HW, recipe.flip)
        return batch | {schema.PIXELS: random_crops(x_B1HW, recipe.input_size)[:, 0]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x = unit(batch[schema.PIXELS].unsqueeze(1))
        if self.stage == "autoencoder":
            return {"mse": (self.aecnn.decode(self.latent(x)) - x).square().mean()}
        if self.stage == "classifier":
            return {"bce": self.bce(self.aecnn.classifier(self.latent(x)), batch[schema.LABELS])}
        logits, decoded = self.aecnn(x)
        terms = {"bce": self.recipe.bce_weight * self.bce(logits, batch[schema.LABELS])}
        if self.recipe.mse_weight and self.compresses:
            terms["mse"] = self.recipe.mse_weight * (decoded - x).square().mean()
        return terms

    def latent(self, x_B1HW: Tensor) -> Tensor:
        """Latents of this stage: of plain downsampling, unclipped (`clip_latent`), or as they are stored."""
        if self.stage == "classifier":
            return self.resizing.encode(x_B1HW)
        if self.stage == "autoencoder" and not self.recipe.clip_latent:
            return self.aecnn.codec.encode(x_B1HW)
        return self.aecnn.encode(x_B1HW)

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Label metrics if this stage trains the classifier, PSNRs in dB if it trains the codec.

        psnr_pooled is computed from the mean squared error over all images, psnr_mean_per_image is the mean of the
        images' PSNRs, and psnr_resized is the pooled PSNR of plain downsampling to the same number of values. In the
        autoencoder stage without `clip_latent`, latents are neither clipped nor rounded.
        """
        recipe = self.recipe
        rows, errors = [self.no_rows()], [torch.zeros(0, 2, device=self.class_weight.device)]
        for batch in batches():
            x = unit_pixels(batch, recipe.size)
            latent = self.latent(x)
            if self.stage != "autoencoder":
                p = crop_probabilities(self.aecnn, latent, recipe.input_size, recipe.tta_crops)
                rows.append(label_rows(p, batch))
            if self.stage != "classifier" and self.compresses:
                resized = clipped(self.resizing.decode(self.resizing.encode(x)))
                errors.append(torch.stack([_mse(self.aecnn.decode(latent), x), _mse(resized, x)], 1))
        rows_N2F, errors_N2 = workers.gather(torch.cat(rows)), workers.gather(torch.cat(errors))
        metrics = {} if self.stage == "autoencoder" else self.evaluate_labels(rows_N2F)
        return metrics | _psnr_metrics(errors_N2)

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """compressed.png: images, their latents, the decoded images, and ten times the difference."""
        if not self.compresses:
            return
        x = unit_pixels(next(iter(batches())), self.recipe.size)[:PICTURED]
        latent = self.aecnn.encode(x)
        decoded = self.aecnn.decode(latent)
        psnr = float(-10 * _mse(decoded, x).mean().log10())
        rows = {
            "original": x,
            f"latent, {self.recipe.factor**2}:1": latent,
            f"decoded, {psnr:.1f} dB": decoded,
            "10 x (decoded - original)": (0.5 + 10 * (decoded - x)).clamp(0, 1),
        }
        shown = {name: images[:, 0].cpu().numpy() for name, images in rows.items()}
        figure = figures.picture_rows(shown, image_ids[:PICTURED])
        figures.save_figure(figure, str(folder), "compressed.png")


def crop_probabilities(network: AECNN, latent_B1hw: Tensor, crop: int, tta_crops: TtaCrops) -> Tensor:
    """Probabilities (B, F) from latents, averaged over crops of `crop` image pixels."""
    views = [latent_B1hw]
    if tta_crops != "full":
        center_and_corners = corner_crops(latent_B1hw, crop // network.codec.factor)
        views = center_and_corners[: 1 if tta_crops == "center" else 5]
    if tta_crops == "ten":
        views += [view.flip(-1) for view in views]
    return torch.stack([network.classifier(view).float().sigmoid() for view in views]).mean(0)


def _aecnn(network: nn.Module) -> AECNN:
    assert isinstance(network, AECNN)
    return network


def _render_decoded(network: AECNN, latent_B1hw: Tensor) -> dict[str, Tensor]:
    return {"decoded": network.decode(latent_B1hw)[:, 0].mul(255).round().to(torch.uint8)}


def _match_all(network: AECNN, state: Mapping[str, Tensor]) -> Fit:
    """A state dict of the whole network."""
    own = network.state_dict()
    fit = pretrained.match(own, state, "the network that these settings describe", exact=True)
    return replace(fit, state=own | dict(fit.state))


def _mse(a_B1HW: Tensor, b_B1HW: Tensor) -> Tensor:
    return (a_B1HW - b_B1HW).square().flatten(1).mean(1)


def _psnr_metrics(errors_N2: Tensor) -> dict[str, float]:
    """PSNRs of values in [0, 1], in dB, from the mean squared errors of each decoded and each resized image."""
    if not len(errors_N2):
        return {}
    decoded, resized = errors_N2.double().clamp(min=1e-10).unbind(1)
    return {
        "psnr_pooled": float(-10 * decoded.mean().log10()),
        "psnr_mean_per_image": float((-10 * decoded.log10()).mean()),
        "psnr_resized": float(-10 * resized.mean().log10()),
    }
