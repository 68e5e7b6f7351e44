"""How an AE-CNN is trained and judged: its stages, loss terms, metrics and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.augment.affine_exposure import random_affine
from cxr.augment.crops import corner_crops, random_crops, random_flips
from cxr.data.batch import Batch
from cxr.families import label_metrics
from cxr.families.base import Batches, Communicator, Task, unit, unit_pixels
from cxr.models.aecnn import AECNN, ResizeCodec, clipped
from cxr.models.classifier import norm_layers
from cxr.models.spatial_transformer import warp
from cxr.reporting import figures

StageName = Literal["classifier", "autoencoder", "joint"]
TestCrops = Literal["full", "center", "five", "ten"]

COUNTED = 20_000  # training images, over all workers, from which the findings' frequencies are taken
PICTURED = 6


@dataclass(frozen=True)
class Lesson:
    """What training images are shown as, and what is asked of them; see `AecnnRecipe` for the fields."""

    size: int
    crop: int
    patch: int
    patches: int
    rotation_deg: float
    flip: float
    mse_weight: float
    bce_weight: float
    balance: float
    norm_epochs: int | None
    clip_latent: bool
    test: TestCrops


class AecnnTask(Task):
    """An AE-CNN in one of its stages.

    Args:
        start: loads what the network begins with; called once, when a new run begins.
    """

    positive_weight: Tensor
    stage_epochs: Tensor

    def __init__(self, network: nn.Module, lesson: Lesson, start: Callable[[AECNN], None]) -> None:
        super().__init__()
        self.network, self.lesson, self._start = network, lesson, start
        self.plain = ResizeCodec(self._net.codec.factor)
        self.stage: StageName = "joint"
        self._thresholds: dict[str, Any] = {}
        self.register_buffer("positive_weight", torch.ones(len(self._net.findings)))
        self.register_buffer("stage_epochs", torch.zeros((), dtype=torch.long))

    @property
    def _net(self) -> AECNN:
        assert isinstance(self.network, AECNN)
        return self.network

    def compiled_modules(self) -> list[nn.Module]:
        return [self._net.classifier, *self._net.codec.children()]

    def enter_stage(self, stage: str) -> None:
        """Let the stage's parts learn: the classifier, the codec, or both."""
        self.stage = stage  # pyright: ignore[reportAttributeAccessIssue]
        self.stage_epochs.zero_()
        self._net.classifier.requires_grad_(stage != "autoencoder")
        self._net.codec.requires_grad_(stage != "classifier")
        if stage == "joint" and not self.lesson.mse_weight and hasattr(self._net.codec, "decoder"):
            self._net.codec.decoder.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]

    def train(self, mode: bool = True) -> AecnnTask:
        super().train(mode)
        adapts = self.lesson.norm_epochs
        if mode and adapts is not None and int(self.stage_epochs) >= adapts:
            for layer in norm_layers(self.network):
                layer.eval()
        return self

    def end_epoch(self, workers: Communicator) -> None:
        self.stage_epochs += 1

    def begin(self, batches: Batches, workers: Communicator) -> None:
        """Load what training starts from; count findings, if the rare ones are to weigh more."""
        self._start(self._net)
        if not self.lesson.balance:
            return
        counts = torch.zeros(2, len(self.positive_weight), device=self.positive_weight.device)
        seen = 0
        for batch in batches():
            labels = batch[schema.LABELS]
            counts += torch.stack([(labels == value).sum(0) for value in (schema.NEGATIVE, schema.POSITIVE)])
            seen += len(labels)
            if seen >= COUNTED / workers.size:
                break
        negative, positive = workers.sum(counts)
        self.positive_weight = (negative.clamp(min=1) / positive.clamp(min=1)) ** self.lesson.balance

    def augmented(self, batch: Batch) -> Batch:
        """Random squares of the images: `patches` of each and nothing else of the batch where the codec learns alone;
        else one of each, turned and mirrored."""
        if self.stage == "autoencoder":
            return {schema.PIXELS: self._patches(batch)[:, 0]}
        return batch | {schema.PIXELS: self._turned(unit_pixels(batch, self.lesson.size))[:, 0]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x = unit(batch[schema.PIXELS].unsqueeze(1))
        if self.stage == "autoencoder":
            return {"mse": (self._net.decode(self._latent(x)) - x).square().mean()}
        if self.stage == "classifier":
            return {"bce": self._bce(self._net.classifier(self._latent(x)), batch)}
        logits, decoded = self._net(x)
        terms = {"bce": self.lesson.bce_weight * self._bce(logits, batch)}
        if self.lesson.mse_weight and self._compresses:
            terms["mse"] = self.lesson.mse_weight * (decoded - x).square().mean()
        return terms

    @property
    def _compresses(self) -> bool:
        return self._net.codec.factor > 1

    def _patches(self, batch: Batch) -> Tensor:
        """Random squares; cut before they are made float, where images are stored at the size they are seen."""
        stored, lesson = batch[schema.PIXELS], self.lesson
        ready = stored.dtype == torch.uint8 and stored.shape[-1] == lesson.size
        whole = stored.unsqueeze(1) if ready else unit_pixels(batch, lesson.size)
        cut = torch.cat([random_crops(whole, lesson.patch) for _ in range(lesson.patches)])
        return cut if cut.is_floating_point() else unit(cut)

    def _turned(self, x_B1HW: Tensor) -> Tensor:
        lesson = self.lesson
        if lesson.rotation_deg:
            turns = random_affine(
                len(x_B1HW), rotation_deg=lesson.rotation_deg, scale=1, shift=0, device=x_B1HW.device
            )
            x_B1HW = warp(x_B1HW, turns)
        if lesson.flip:
            x_B1HW = random_flips(x_B1HW, lesson.flip)
        return random_crops(x_B1HW, lesson.crop)

    def _latent(self, x_B1HW: Tensor) -> Tensor:
        """What the stage keeps of images; in the autoencoder's own one the published codec does not clip it."""
        if self.stage == "classifier":
            return self.plain.encode(x_B1HW)
        if self.stage == "autoencoder" and not self.lesson.clip_latent:
            return self._net.codec.encode(x_B1HW)
        return self._net.encode(x_B1HW)

    def _bce(self, logits_BF: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy, mean over images and findings; an unknown label counts 0.

        The divisor does not depend on what is known, so that workers' means are the whole batch's mean.
        """
        labels = batch[schema.LABELS]
        known = (labels != schema.UNKNOWN).float()
        return F.binary_cross_entropy_with_logits(
            logits_BF.float(), (labels == schema.POSITIVE).float(), known, pos_weight=self.positive_weight
        )

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """How well findings are told where the classifier learns, how well images are kept where the codec does.

        mean_auroc and mean_ap are means over the `findings_measured`, those with both classes; auroc/FINDING is
        each one's. psnr is that of the mean squared error over all images, psnr_of_images the mean of the images'
        own, psnr_resized that of plain resizing to as many values; dB. In the autoencoder's own stage without
        `clip_latent` latents are neither clipped nor rounded. Thresholds are chosen here, and kept in the network.
        """
        device, count = self.positive_weight.device, len(self._net.findings)
        scores, errors = [torch.zeros(0, 2 * count, device=device)], [torch.zeros(0, 2, device=device)]
        for batch in batches():
            x = unit_pixels(batch, self.lesson.size)
            latent = self._latent(x)
            if self.stage != "autoencoder":
                found = probabilities(self._net, latent, self.lesson.crop, self.lesson.test)
                scores.append(torch.cat([found, batch[schema.LABELS].float()], 1))
            if self.stage != "classifier" and self._compresses:
                resized = clipped(self.plain.decode(self.plain.encode(x)))
                errors.append(torch.stack([_mse(self._net.decode(latent), x), _mse(resized, x)], 1))
        return self._told(workers.gather(torch.cat(scores))) | _kept(workers.gather(torch.cat(errors)))

    def _told(self, rows_N2F: Tensor) -> dict[str, float]:
        if self.stage == "autoencoder":
            return {}
        metrics, self._thresholds = label_metrics.judge(self._net, *rows_N2F.chunk(2, 1))
        return metrics

    def describe(self) -> dict[str, Any]:
        return {"thresholds": self._thresholds} if self._thresholds else {}

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path) -> None:
        """compressed.png: images, their latents, what is decoded from these, and what was lost, ten times over."""
        if not self._compresses:
            return
        x = unit_pixels(next(iter(batches())), self.lesson.size)[:PICTURED]
        latent = self._net.encode(x)
        decoded = self._net.decode(latent)
        psnr = float(-10 * _mse(decoded, x).mean().log10())
        rows = {
            "given": x,
            f"latent, {self._net.codec.factor**2} : 1": latent,
            f"decoded, {psnr:.1f} dB": decoded,
            "10 x (decoded - given)": (0.5 + 10 * (decoded - x)).clamp(0, 1),
        }
        figure = figures.picture_rows({name: images[:, 0].cpu().numpy() for name, images in rows.items()})
        figures.save_figure(figure, str(folder), "compressed.png")


def probabilities(network: AECNN, latent_B1hw: Tensor, crop: int, test: TestCrops) -> Tensor:
    """Probabilities (B, F) from latents, averaged over the crops that `test` names.

    Args:
        crop: side of a crop in pixels of the image.
    """
    views = [latent_B1hw]
    if test != "full":
        views = corner_crops(latent_B1hw, crop // network.codec.factor)[: 1 if test == "center" else 5]
    if test == "ten":
        views += [view.flip(-1) for view in views]
    return torch.stack([network.classifier(view).float().sigmoid() for view in views]).mean(0)


def _mse(a_B1HW: Tensor, b_B1HW: Tensor) -> Tensor:
    return (a_B1HW - b_B1HW).square().flatten(1).mean(1)


def _kept(errors_N2: Tensor) -> dict[str, float]:
    """PSNR of values in [0, 1], dB, of the mean squared errors of decoded and of resized images."""
    if not len(errors_N2):
        return {}
    decoded, resized = errors_N2.double().clamp(min=1e-10).unbind(1)
    return {
        "psnr": float(-10 * decoded.mean().log10()),
        "psnr_of_images": float((-10 * decoded.log10()).mean()),
        "psnr_resized": float(-10 * resized.mean().log10()),
    }
