"""Compare ways to store X-rays in few bytes by picture quality and by a classifier's AUROC.

A compressor's latents, plain resizing to as many values, and JPEG, JPEG 2000 and WebP files of the same mean size.
All see the same pictures, square and of 8 bits, and give back such. Latents and resized pictures are stored as latent
archives store them (`cxr.inference.latents`), still images as files with their headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from cxr import schema
from cxr.benchmarks.studies import codecs
from cxr.benchmarks.studies.xrays import XRays
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_size
from cxr.inference import latents
from cxr.metrics import classification
from cxr.models.aecnn import AECNN, ResizeCodec

AS_STORED, RAW = "as stored", "raw"
ORIGINAL, RESIZED = "original", "resized"
_BLOCK = 64


@dataclass(frozen=True)
class Row:
    """One way of storing the pictures; NaN for what cannot be measured or does not apply."""

    way: str
    at: str  # whose size it has: that of the latents AS_STORED, that of RAW ones, or its own
    bytes_per_image: float
    quality: float = math.nan  # of a still-image codec
    psnr: float = math.nan  # dB, of the mean squared error over all pictures
    psnr_of_images: float = math.nan  # dB, mean of the pictures' own
    ssim: float = math.nan
    auroc: float = math.nan  # mean over findings
    auroc_low: float = math.nan  # 95 % interval by bootstrap over patients
    auroc_high: float = math.nan


@dataclass(frozen=True)
class Shown:
    """One picture as one way of storing it gives it back."""

    way: str
    at: str
    bytes_per_image: float
    picture: np.ndarray  # (H, W) uint8


class Judge:
    """Compares decoded pictures with the originals, and keeps one of each way to show.

    Args:
        classifier: judges what can still be found.
        shown: index of the picture that is kept.
    """

    def __init__(self, given: XRays, classifier: Checkpoint, shown: int, resamples: int, seed: int) -> None:
        check_size(classifier.recipe, given.pixels.shape[-1])
        self.given, self.classifier, self.kept = given, classifier, shown
        self.resamples, self.seed = resamples, seed
        self.shown: list[Shown] = []

    def row(self, way: str, at: str, size: float, decoded: np.ndarray, quality: float = math.nan) -> Row:
        """A way's row; `decoded` is (B, H, W) uint8."""
        self.shown.append(Shown(way, at, size, decoded[self.kept]))
        row = Row(way, at, size, quality, *fidelity(self.given.pixels, decoded))
        if not classifies(self.classifier):
            return row
        return self.found(row, predict(self.classifier, decoded), self.classifier)

    def found(self, row: Row, probabilities: np.ndarray, by: Checkpoint) -> Row:
        """The row with the AUROC of `probabilities` (B, findings of `by`)."""
        findings = [finding for finding in by.findings if finding in self.given.findings]
        if not findings:
            return row
        scores = probabilities[:, [by.findings.index(finding) for finding in findings]]
        labels = self.given.labels[:, [self.given.findings.index(finding) for finding in findings]]
        told = classification.auroc_intervals(
            scores, labels, self.given.patients, resamples=self.resamples, seed=self.seed
        )
        return replace(row, auroc=told.mean, auroc_low=told.mean_low, auroc_high=told.mean_high)


def compare(given: XRays, kept: Checkpoint, judge: Judge) -> Iterator[Row]:
    """Rows in order: the original, the ways at the size of compressed latents, and those at the size of raw
    latents."""
    pictures = given.pixels
    original = judge.row(ORIGINAL, "", float(pictures[0].nbytes), pictures)
    yield original
    yield replace(original, way="original, PNG", bytes_per_image=codecs.png_bytes(pictures))
    encoded = encode(kept, pictures)
    small, enlarged = resized(pictures, kept)
    codec = codec_name(kept)
    rows = {
        codec: (encoded, judge.row(codec, AS_STORED, latents.stored_bytes(encoded), decode(kept, encoded))),
        RESIZED: (small, judge.row(RESIZED, AS_STORED, latents.stored_bytes(small), enlarged)),
    }
    own = predict_latents(kept, encoded) if classifies(kept) else None
    for at in (AS_STORED, RAW):
        sizes = {
            way: row.bytes_per_image if at == AS_STORED else values[0].nbytes for way, (values, row) in rows.items()
        }
        for way, (_, row) in rows.items():
            yield replace(row, at=at, bytes_per_image=float(sizes[way]))
            if way == codec and own is not None:
                yield judge.found(Row(f"{codec}, from latents", at, float(sizes[way])), own, kept)
        for still in codecs.LOSSY:
            coded = codecs.coded_near(still, pictures, sizes[codec])
            yield judge.row(still.name, at, coded.bytes_per_image, coded.decoded, coded.quality)


def codec_name(kept: Checkpoint) -> str:
    recipe = kept.recipe
    return f"{recipe.family} {(recipe.size // latent_encoder(recipe).latent_format().size) ** 2}:1"


# ---- What is left of the pictures


def fidelity(given_BHW: np.ndarray, decoded_BHW: np.ndarray) -> tuple[float, float, float]:
    """PSNR of the mean squared error and mean of the pictures' own, dB, and mean SSIM (Wang et al. 2004)."""
    own = float((-10 * _squared_errors(given_BHW, decoded_BHW).log10()).mean())
    alike = torch.cat([_ssim(a, b) for a, b in _pairs(given_BHW, decoded_BHW)])
    return psnr(given_BHW, decoded_BHW), own, float(alike.mean())


def psnr(given_BHW: np.ndarray, decoded_BHW: np.ndarray) -> float:
    """PSNR of the mean squared error over all pictures, dB."""
    return float(-10 * _squared_errors(given_BHW, decoded_BHW).mean().log10())


def _squared_errors(given_BHW: np.ndarray, decoded_BHW: np.ndarray) -> Tensor:
    """(B,) mean of each picture, of values in [0, 1]."""
    return torch.cat([(a - b).square().flatten(1).mean(1) for a, b in _pairs(given_BHW, decoded_BHW)])


def _pairs(given_BHW: np.ndarray, decoded_BHW: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of both as float64 (b, 1, H, W) in [0, 1]."""
    for start in range(0, len(given_BHW), _BLOCK):
        a, b = (torch.from_numpy(x[start : start + _BLOCK])[:, None].double() / 255 for x in (given_BHW, decoded_BHW))
        yield a, b


def _ssim(a_B1HW: Tensor, b_B1HW: Tensor) -> Tensor:
    """(B,) with the published window, 11 pixels wide with sigma 1.5.

    Of float32, which is off by less than 1e-3 where a picture is flat: of float64 it takes gigabytes a picture.
    """
    found = []
    for a, b in zip(a_B1HW.float().split(1), b_B1HW.float().split(1), strict=True):
        found.append(ssim(a, b, sigma=1.5, kernel_size=11, data_range=1.0, reduction="none"))
    return torch.stack(found).reshape(-1)


# ---- Networks on pictures


def check_compressor(kept: Checkpoint) -> None:
    """Raise UserError unless `kept` compresses pictures and classifies the latents."""
    latent_encoder(kept.recipe)
    check_classifier(kept)


def classifies(kept: Checkpoint) -> bool:
    """Whether a classifier was trained, not only the autoencoder."""
    return "mean_auroc" in kept.about["metrics"]


def check_classifier(kept: Checkpoint) -> None:
    """Raise UserError unless `kept` gives probabilities of findings."""
    if schema.PROBABILITIES not in kept.recipe.score_columns.names:
        raise UserError(
            f"{kept.uri} is of family {kept.recipe.family!r}, which does not predict findings: give a classifier's "
            f"checkpoint"
        )


@torch.inference_mode()
def encode(kept: Checkpoint, pictures_BHW: np.ndarray) -> np.ndarray:
    """Latents as they are stored."""
    encoder = latent_encoder(kept.recipe)
    return _joined(encoder.encode(kept.network, batch) for batch in _batches(kept, pictures_BHW))


@torch.inference_mode()
def decode(kept: Checkpoint, latents_Bhw: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W) of what `encode` gave."""
    encoder = latent_encoder(kept.recipe)
    rendered = (encoder.render_latents(kept.network, batch) for batch in _batches(kept, latents_Bhw))
    return _joined(next(iter(pictures.values())) for pictures in rendered)


@torch.inference_mode()
def predict(kept: Checkpoint, pictures_BHW: np.ndarray) -> np.ndarray:
    """Probabilities (B, findings)."""
    batches = _batches(kept, pictures_BHW)
    return _joined(kept.recipe.predict(kept.network, batch)[schema.PROBABILITIES] for batch in batches)


@torch.inference_mode()
def predict_latents(kept: Checkpoint, latents_Bhw: np.ndarray) -> np.ndarray:
    """Probabilities (B, findings) from what `encode` gave."""
    batches, encoder = _batches(kept, latents_Bhw), latent_encoder(kept.recipe)
    return _joined(encoder.predict_latents(kept.network, batch)[schema.PROBABILITIES] for batch in batches)


@torch.inference_mode()
def resized(pictures_BHW: np.ndarray, kept: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Pictures reduced to the size and bit depth of the latents of `kept`, and enlarged again."""
    stored = latent_encoder(kept.recipe).latent_format()
    plain, steps = (
        AECNN(ResizeCodec(kept.recipe.size // stored.size), nn.Identity(), (), stored.bits),
        2**stored.bits - 1,
    )
    small, large = [], []
    for part in np.array_split(pictures_BHW, math.ceil(len(pictures_BHW) / _BLOCK)):
        values = plain.encode(torch.from_numpy(part)[:, None].float() / 255)
        small.append((values[:, 0] * steps).round().numpy().astype(stored.dtype))
        large.append((plain.decode(values)[:, 0] * 255).round().numpy().astype(np.uint8))
    return np.concatenate(small), np.concatenate(large)


def _batches(kept: Checkpoint, pictures_BHW: np.ndarray) -> Iterator[dict[str, Tensor]]:
    device = best_device()
    kept.network.to(device)
    for start in range(0, len(pictures_BHW), _BLOCK):
        yield {schema.PIXELS: torch.from_numpy(pictures_BHW[start : start + _BLOCK]).to(device)}


def _joined(parts: Iterator[Tensor] | Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([part.cpu().numpy() for part in parts])
