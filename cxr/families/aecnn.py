"""Family `aecnn`: compresses X-rays with an autoencoder and finds findings in what it kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import pyarrow as pa
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families.aecnn_task import AecnnTask, Lesson, StageName, TestCrops, probabilities
from cxr.families.base import Recipe, Stage, one_of, unit_pixels
from cxr.models import pretrained
from cxr.models.aecnn import AECNN, Codec, NoCodec, PublishedCodec, ResidualCodec, ResizeCodec
from cxr.models.classifier import CLASSIFIERS, Classifier, ClassifierName, StemStride, load_body
from cxr.models.pretrained import Weights
from cxr.models.state_dicts import matching
from cxr.schema import PixelFormat

Compressor = Literal["residual", "published", "resize", "none"]
STAGES: tuple[StageName, ...] = get_args(StageName)
FACTORS = {4: 2, 16: 4, 64: 8}
SMALLEST = 8  # pixels that a DenseNet needs after its stem


@dataclass(frozen=True, kw_only=True)
class AecnnRecipe(Recipe):
    """AE-CNN (Ranjan et al. 2018), as published (preset `published`) or with another codec, classifier or schedule."""

    family: ClassVar[str] = "aecnn"
    mode: ClassVar[Literal["min", "max"]] = "max"
    columns: ClassVar[tuple[str, ...]] = (schema.PIXELS, schema.LABELS)
    # The last two are of no more use once training has begun.
    LOCATION_SETTINGS: ClassVar[tuple[str, ...]] = (*Recipe.LOCATION_SETTINGS, "start_from", "classifier_weights")
    depends_on: ClassVar[Mapping[str, str]] = {"bce_weight": "mse_weight"}
    score_columns: ClassVar[pa.Schema] = pa.schema(
        [(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))]
    )

    size: int = 256
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    epochs: int = 8
    """Of the joint stage."""
    batch_size: int = 16
    lr: float = 5e-4
    """Of the joint stage."""

    compressor: Compressor = "residual"
    """residual: resizing corrected by a network; published: the paper's 1,025 parameters, 16 : 1; resize: plain
    resizing; none: the classifier sees the whole image. The last two are the baselines."""
    compression: int = 16
    """Pixels of the image to a value of the latent: 4, 16 or 64."""
    depth: int = 2
    """Convolutions of the residual codec in each direction, 1–4."""
    width: int = 32
    """Their channels."""
    latent_bits: int = 8
    """Of a stored latent's values: 8 or 16."""
    clip_latent: bool = True
    """Clip latents to [0, 1] in the autoencoder's own stage too; the paper does not."""

    classifier: ClassifierName = "densenet121"
    """Network of torchvision that sees the latents."""
    stem_stride: Literal[0, 1, 2, 4] = 0
    """By how much its first layers shrink what they see: 4 (as published), 2, 1; 0: the most that leaves 8 pixels."""
    classifier_weights: str = ""
    """Weights that its layers start from: a path or URI of a state dict or checkpoint, or a torchvision name
    (IMAGENET1K_V1); auto takes torchvision's where they can be fetched. Empty: random weights."""

    start: StageName = "classifier"
    """First stage: the classifier on resized images, the autoencoder on patches, or both jointly."""
    stop: StageName = "joint"
    """Last stage."""
    start_from: str = ""
    """URI of a checkpoint of this family whose weights the first stage begins with."""
    classifier_epochs: int = 8
    """Of the classifier's own stage."""
    classifier_lr: float = 1e-3
    """Of the classifier's own stage."""
    autoencoder_epochs: int = 4
    """Of the autoencoder's own stage."""
    autoencoder_lr: float = 2e-3
    """Of the autoencoder's own stage."""

    mse_weight: float = 0.1
    """Of the squared error of decoded images, in the joint stage."""
    bce_weight: float = 0.9
    """Of the cross-entropy of findings, in the joint stage."""
    balance: float = 0.0
    """How much more the positives of rare findings weigh: (negatives / positives) to this power; 0 for no more."""
    norm_epochs: int | None = None
    """Epochs of a stage in which batch norm adapts; unset for all. The published run stopped after 1 by mistake."""

    crop: int = 0
    """Side of the random squares in which training sees images, pixels; 0 for the whole image."""
    patch: int = 64
    """Side of the squares from which the autoencoder learns in its own stage."""
    patches: int = 4
    """Such squares of each image in a step."""
    echoes: int = 4
    """Steps of the autoencoder's own stage on each batch, new squares in each."""
    rotation_deg: float = 5.0
    """Augmentation: largest rotation."""
    flip: float = 0.5
    """Augmentation: share of images that are mirrored."""
    test: TestCrops = "full"
    """What is classified in validation and use: the whole image, its center, or the mean of five or ten crops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("compressor", self.compressor, get_args(Compressor))
        one_of("classifier", self.classifier, CLASSIFIERS)
        one_of("start", self.start, STAGES)
        one_of("stop", self.stop, STAGES)
        one_of("test", self.test, get_args(TestCrops))
        one_of("compression", self.compression, tuple(FACTORS))
        one_of("latent_bits", self.latent_bits, (8, 16))
        one_of("stem_stride", self.stem_stride, (0, *get_args(StemStride)))
        one_of("depth", self.depth, (1, 2, 3, 4))
        for name in ("width", "patch", "patches", "echoes", "classifier_epochs", "autoencoder_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: wanted 1 or more")
        for name in ("crop", "rotation_deg", "norm_epochs"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name}={getattr(self, name)}: wanted 0 or more")
        if not 0 <= self.flip <= 1 or not 0 < min(self.classifier_lr, self.autoencoder_lr) < math.inf:
            raise UserError(
                f"flip={self.flip}, classifier_lr={self.classifier_lr}, autoencoder_lr={self.autoencoder_lr}: wanted "
                f"a share from 0 to 1, and positive learning rates"
            )
        self._check_sizes()
        self._check_stages()
        if min(self.mse_weight, self.balance) < 0 or self.bce_weight <= 0:
            raise UserError(
                f"mse_weight={self.mse_weight}, balance={self.balance}, bce_weight={self.bce_weight}: wanted "
                f"none negative, and bce_weight above 0"
            )

    def _check_sizes(self) -> None:
        if self.compressor == "published" and self.compression != 16:
            raise UserError(
                f"compression={self.compression}: the published codec has 16; compressor=residual has others"
            )
        if self.crop > self.size or self.patch > self.size:
            raise UserError(f"crop={self.crop}, patch={self.patch}: wanted at most size={self.size}")
        for name in ("size", "crop", "patch"):
            if getattr(self, name) % self._factor:
                raise UserError(f"{name}={getattr(self, name)}: wanted a multiple of {self._factor}, as compressed")
        side = (self.crop or self.size) // self._factor
        if self.classifier.startswith("densenet") and side // self._stem < SMALLEST:
            raise UserError(
                f"latents of {side} pixels are too few for {self.classifier} with stem_stride={self.stem_stride}: "
                f"raise size or crop, or lower compression or stem_stride"
            )

    def _check_stages(self) -> None:
        if not self.stages():
            raise UserError(
                f"start={self.start!r}, stop={self.stop!r}: that leaves compressor={self.compressor} no stage"
            )
        if self.compressor == "published" and self.stop == "classifier":
            raise UserError("stop='classifier' would leave the published encoder untaught: take compressor=resize")
        if self.start_from and self.stop == "classifier" and self._learns:
            raise UserError(
                "stop='classifier' teaches the classifier on resized images, not on the latents of start_from: "
                "take stop=joint"
            )

    @property
    def _factor(self) -> int:
        return 1 if self.compressor == "none" else FACTORS[self.compression]

    @property
    def _learns(self) -> bool:
        """Whether the codec has anything to learn."""
        return self.compressor in ("residual", "published")

    @property
    def _stem(self) -> StemStride:
        side = (self.crop or self.size) // self._factor
        fitting: list[StemStride] = [stride for stride in (4, 2) if side // stride >= SMALLEST]
        return self.stem_stride or (fitting[0] if fitting else 1)

    @property
    def _last(self) -> str:
        """The last stage that runs: not `stop` where the codec has nothing to learn in that one."""
        return self.stages()[-1].name

    @property
    def _classifies(self) -> bool:
        """Whether the classifier is taught on what it will see."""
        return self._last != "autoencoder"

    @property
    def monitor(self) -> str:
        return "mean_auroc" if self._classifies else "psnr"

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        told = ["mean_auroc", "mean_ap"] if self._classifies else []
        kept = ["psnr"] if self._last != "classifier" and self._factor > 1 else []
        return dict.fromkeys(told + kept, "max")

    @property
    def may_change_on_resume(self) -> tuple[str, ...]:
        return ("epochs" if self._last == "joint" else f"{self._last}_epochs", "patience")

    def stages(self) -> tuple[Stage, ...]:
        every = (
            Stage("classifier", self.classifier_epochs, self.classifier_lr),
            Stage("autoencoder", self.autoencoder_epochs, self.autoencoder_lr, self.echoes),
            Stage("joint", self.epochs, self.lr),
        )
        wanted = every[STAGES.index(self.start) : STAGES.index(self.stop) + 1]
        return tuple(stage for stage in wanted if self._learns or stage.name != "autoencoder")

    def network(self, findings: Sequence[str]) -> AECNN:
        if not findings:
            raise UserError("the archive names no findings, and a classifier learns from labels: give one that does")
        classifier = Classifier(self.classifier, len(findings), self._stem)
        return AECNN(self._codec(), classifier, findings, self.latent_bits)

    def _codec(self) -> Codec:
        if self.compressor == "residual":
            return ResidualCodec(self._factor, self.depth, self.width)
        if self.compressor == "resize":
            return ResizeCodec(self._factor)
        return PublishedCodec() if self.compressor == "published" else NoCodec()

    def task(self, network: nn.Module) -> AecnnTask:
        taken: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Lesson)}
        taken["crop"] = self.crop or self.size
        return AecnnTask(network, Lesson(**taken), self._start)

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(network, AECNN)
        return self._classify(network, network.encode(unit_pixels(batch, self.size)))

    def _classify(self, network: AECNN, latent_B1hw: Tensor) -> dict[str, Tensor]:
        """Probabilities and decisions; NaN and unknown from a checkpoint whose classifier was not taught."""
        if not self._classifies:
            unknown = latent_B1hw.new_full((len(latent_B1hw), len(network.findings)), math.nan)
            told = torch.full_like(unknown, schema.UNKNOWN, dtype=torch.int8)
            return {schema.PROBABILITIES: unknown, schema.DECISIONS: told}
        found = probabilities(network, latent_B1hw, self.crop or self.size, self.test)
        return {schema.PROBABILITIES: found, schema.DECISIONS: (found >= network.thresholds).to(torch.int8)}

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(network, AECNN)
        return _drawn(network, network.encode(unit_pixels(batch, self.size)))

    def latent_format(self) -> PixelFormat:
        try:
            return PixelFormat(self.size // self._factor, self.latent_bits)
        except ValueError as error:
            raise UserError(f"size={self.size}: its latents cannot be stored as {error}") from error

    def encode(self, network: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(network, AECNN)
        steps = network.encode(unit_pixels(batch, self.size))[:, 0] * (2**self.latent_bits - 1)
        return steps.round().to(torch.uint8 if self.latent_bits == 8 else torch.uint16)

    def encoder_state(self, network: nn.Module) -> dict[str, Tensor]:
        assert isinstance(network, AECNN)
        return {k: values for k, values in network.codec.state_dict().items() if k.startswith("encoder.")}

    def predict_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(network, AECNN)
        return self._classify(network, unit_pixels(batch, self.latent_format().size))

    def render_latents(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(network, AECNN)
        return _drawn(network, unit_pixels(batch, self.latent_format().size))

    def search_space(self) -> dict[str, BaseDistribution]:
        """The last stage's learning rate, loss weights, codec and classifier.

        Without what the stages that run do not use, and what given weights fix.
        """
        rate, low, high = {
            "joint": ("lr", 1e-4, 2e-3),
            "autoencoder": ("autoencoder_lr", 4e-4, 8e-3),
            "classifier": ("classifier_lr", 2e-4, 4e-3),
        }[self._last]
        space: dict[str, BaseDistribution] = {rate: FloatDistribution(low, high, log=True)}
        if self._last == "joint" and self._learns:  # else there is one loss term, whose weight would only scale it
            space |= {
                "bce_weight": FloatDistribution(0.1, 1, log=True),
                "mse_weight": FloatDistribution(0.01, 100, log=True),
            }
        if self._classifies and not self.start_from and not self.classifier_weights:
            names = ["resnet18", "densenet121", "densenet169", "densenet201"]
            space["classifier"] = CategoricalDistribution(names)
        if self.compressor == "residual" and not self.start_from:
            space["compression"] = CategoricalDistribution(self._fitting())
            if self._last != "classifier":  # which sees resized images
                space |= {"depth": IntDistribution(1, 4), "width": CategoricalDistribution([8, 16, 32, 64])}
        return space

    def _fitting(self) -> list[int]:
        """Compressions that leave enough for every classifier."""
        least = SMALLEST * (self.stem_stride or 1)
        return [compression for compression, factor in FACTORS.items() if (self.crop or self.size) // factor >= least]

    def initial_weights(self) -> dict[str, str]:
        return {"start_from": "", "classifier_weights": self.classifier}

    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]:
        if setting == "start_from":
            return _whole(self.network(given.findings or ("any",)), given.state)
        load_body(Classifier(self.classifier, 1, self._stem), given.state)
        return given.state

    def _start(self, network: AECNN) -> None:
        """Load what the first stage starts from."""
        if self.start_from:
            _load_all(network, self.start_from)
        if self.classifier_weights:
            assert isinstance(network.classifier, Classifier)
            same = pretrained.findings_of(self.classifier_weights) == network.findings
            load_body(network.classifier, pretrained.from_uri(self.classifier_weights), head=same)


def _drawn(network: AECNN, latent_B1hw: Tensor) -> dict[str, Tensor]:
    return {"decoded": network.decode(latent_B1hw)[:, 0].mul(255).round().to(torch.uint8)}


def _load_all(network: AECNN, uri: str) -> None:
    known = pretrained.findings_of(uri)
    if known is not None and known != network.findings:
        raise UserError(
            f"start_from={uri} knows the findings {', '.join(known)}, the archive {', '.join(network.findings)}: "
            f"give it as classifier_weights, which leaves them out"
        )
    network.load_state_dict(_whole(network, pretrained.from_uri(uri)))


def _whole(network: AECNN, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = network.state_dict()
    return own | matching(own, state, "the network that these settings describe", whole=True)
