"""Comparison of ways to store X-rays in few bytes, by image quality and by a classifier's AUROC.

The ways are the latents of a compressor, plain resizing to the same number of values, and JPEG, JPEG 2000 and WebP
files of the same mean size. All start from the same square 8-bit images and are decoded to such images. Latents and
resized images are stored as in latent archives (`cxr.inference.latents`), the others as files with headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

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
class StorageResult:
    """Results of one way to store the images; NaN for values that cannot be measured or do not apply."""

    way: str
    at: str  # its size: that of the latents AS_STORED or RAW, or empty for its own size
    bytes_per_image: float
    quality: float = math.nan  # of a still-image codec
    psnr: float = math.nan  # dB, of the mean squared error over all images
    psnr_mean_per_image: float = math.nan  # dB, mean of the PSNR of each image
    ssim: float = math.nan
    auroc: float = math.nan  # mean over findings
    auroc_low: float = math.nan  # 95 % interval by bootstrap over patients
    auroc_high: float = math.nan


@dataclass(frozen=True)
class DecodedImage:
    """One image after decoding, to be shown."""

    way: str
    at: str
    bytes_per_image: float
    picture: np.ndarray  # (H, W) uint8


class Evaluator:
    """Compares decoded images with the originals, and collects one image of each way to show.

    Args:
        classifier: classifies the decoded images.
        shown: index of the image to show.
    """

    def __init__(self, originals: XRays, classifier: Checkpoint, shown: int, resamples: int, seed: int) -> None:
        check_size(classifier.recipe, originals.pixels.shape[-1])
        self.originals, self.classifier, self.index = originals, classifier, shown
        self.resamples, self.seed = resamples, seed
        self.shown: list[DecodedImage] = []

    def row(self, way: str, at: str, size: float, decoded: np.ndarray, quality: float = math.nan) -> StorageResult:
        """Results of one way; `decoded` is (B, H, W) uint8."""
        self.shown.append(DecodedImage(way, at, size, decoded[self.index]))
        row = StorageResult(way, at, size, quality, *fidelity(self.originals.pixels, decoded))
        if not classifies(self.classifier):
            return row
        return self.with_auroc(row, predict(self.classifier, decoded), self.classifier)

    def with_auroc(self, row: StorageResult, probabilities: np.ndarray, classifier: Checkpoint) -> StorageResult:
        """The row with the AUROC of `probabilities` (B, findings of the classifier)."""
        findings = [finding for finding in classifier.findings if finding in self.originals.findings]
        if not findings:
            return row
        scores = probabilities[:, [classifier.findings.index(finding) for finding in findings]]
        labels = self.originals.labels[:, [self.originals.findings.index(finding) for finding in findings]]
        auroc = classification.auroc_intervals(
            scores, labels, self.originals.patients, resamples=self.resamples, seed=self.seed
        )
        return replace(row, auroc=auroc.mean, auroc_low=auroc.mean_low, auroc_high=auroc.mean_high)


def compare(originals: XRays, compressor: Checkpoint, evaluator: Evaluator) -> Iterator[StorageResult]:
    """Rows in order: the original, the ways at the size of compressed latents, and those at the size of raw
    latents."""
    pictures = originals.pixels
    original = evaluator.row(ORIGINAL, "", float(pictures[0].nbytes), pictures)
    yield original
    yield replace(original, way="original, PNG", bytes_per_image=codecs.png_bytes(pictures))
    encoded = encode(compressor, pictures)
    small, enlarged = resized(pictures, compressor)
    codec = codec_name(compressor)
    rows = {
        codec: (encoded, evaluator.row(codec, AS_STORED, latents.stored_bytes(encoded), decode(compressor, encoded))),
        RESIZED: (small, evaluator.row(RESIZED, AS_STORED, latents.stored_bytes(small), enlarged)),
    }
    own = predict_latents(compressor, encoded) if classifies(compressor) else None
    for at in (AS_STORED, RAW):
        sizes = {
            way: row.bytes_per_image if at == AS_STORED else values[0].nbytes for way, (values, row) in rows.items()
        }
        for way, (_, row) in rows.items():
            yield replace(row, at=at, bytes_per_image=float(sizes[way]))
            if way == codec and own is not None:
                yield evaluator.with_auroc(
                    StorageResult(f"{codec}, from latents", at, float(sizes[way])), own, compressor
                )
        for still in codecs.LOSSY:
            coded = codecs.coded_near(still, pictures, sizes[codec])
            yield evaluator.row(still.name, at, coded.bytes_per_image, coded.decoded, coded.quality)


def codec_name(checkpoint: Checkpoint) -> str:
    recipe = checkpoint.recipe
    return f"{recipe.family} {(recipe.size // latent_encoder(recipe).latent_format().size) ** 2}:1"


# ---- Fidelity of decoded images


def fidelity(originals_BHW: np.ndarray, decoded_BHW: np.ndarray) -> tuple[float, float, float]:
    """PSNR of the mean squared error and mean PSNR of the images, in dB, and mean SSIM (Wang et al. 2004)."""
    per_image = float((-10 * _squared_errors(originals_BHW, decoded_BHW).log10()).mean())
    similarity = torch.cat([_ssim(a, b) for a, b in _pairs(originals_BHW, decoded_BHW)])
    return psnr(originals_BHW, decoded_BHW), per_image, float(similarity.mean())


def psnr(originals_BHW: np.ndarray, decoded_BHW: np.ndarray) -> float:
    """PSNR in dB of the mean squared error over all images."""
    return float(-10 * _squared_errors(originals_BHW, decoded_BHW).mean().log10())


def _squared_errors(originals_BHW: np.ndarray, decoded_BHW: np.ndarray) -> Tensor:
    """(B,) mean squared error of each image, with values in [0, 1]."""
    return torch.cat([(a - b).square().flatten(1).mean(1) for a, b in _pairs(originals_BHW, decoded_BHW)])


def _pairs(originals_BHW: np.ndarray, decoded_BHW: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of both as float64 (b, 1, H, W) in [0, 1]."""
    for start in range(0, len(originals_BHW), _BLOCK):
        a, b = (
            torch.from_numpy(x[start : start + _BLOCK])[:, None].double() / 255 for x in (originals_BHW, decoded_BHW)
        )
        yield a, b


def _ssim(a_B1HW: Tensor, b_B1HW: Tensor) -> Tensor:
    """(B,) with the published window, 11 pixels wide with sigma 1.5.

    Computed in float32, with an error below 1e-3 in flat images; in float64 it takes gigabytes per image.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError:
        raise UserError(
            "expected the package torchmetrics for SSIM, which is not installed: run pip install 'cxr[benchmarks]'"
        ) from None
    values = []
    for a, b in zip(a_B1HW.float().split(1), b_B1HW.float().split(1), strict=True):
        values.append(ssim(a, b, sigma=1.5, kernel_size=11, data_range=1.0, reduction="none"))
    return torch.stack(values).reshape(-1)


# ---- Networks


def check_compressor(checkpoint: Checkpoint) -> None:
    """Raise UserError unless the checkpoint compresses images and classifies the latents."""
    latent_encoder(checkpoint.recipe)
    check_classifier(checkpoint)


def classifies(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a trained classifier, not only an autoencoder."""
    return "mean_auroc" in checkpoint.about["metrics"]


def check_classifier(checkpoint: Checkpoint) -> None:
    """Raise UserError unless the checkpoint predicts probabilities of findings."""
    if schema.PROBABILITIES not in checkpoint.recipe.score_columns.names:
        raise UserError(
            f"{checkpoint.uri} is of family {checkpoint.recipe.family!r}, which does not predict findings: use a "
            f"classifier's checkpoint"
        )


@torch.inference_mode()
def encode(checkpoint: Checkpoint, pictures_BHW: np.ndarray) -> np.ndarray:
    """Latents in the format in which they are stored."""
    encoder = latent_encoder(checkpoint.recipe)
    return _joined(encoder.encode(checkpoint.network, batch) for batch in _batches(checkpoint, pictures_BHW))


@torch.inference_mode()
def decode(checkpoint: Checkpoint, latents_Bhw: np.ndarray) -> np.ndarray:
    """Decoded images (B, H, W), uint8, of latents from `encode`."""
    encoder = latent_encoder(checkpoint.recipe)
    rendered = (encoder.render_latents(checkpoint.network, batch) for batch in _batches(checkpoint, latents_Bhw))
    return _joined(next(iter(pictures.values())) for pictures in rendered)


@torch.inference_mode()
def predict(checkpoint: Checkpoint, pictures_BHW: np.ndarray) -> np.ndarray:
    """Probabilities (B, findings)."""
    batches = _batches(checkpoint, pictures_BHW)
    return _joined(checkpoint.recipe.predict(checkpoint.network, batch)[schema.PROBABILITIES] for batch in batches)


@torch.inference_mode()
def predict_latents(checkpoint: Checkpoint, latents_Bhw: np.ndarray) -> np.ndarray:
    """Probabilities (B, findings) of latents from `encode`."""
    batches, encoder = _batches(checkpoint, latents_Bhw), latent_encoder(checkpoint.recipe)
    return _joined(encoder.predict_latents(checkpoint.network, batch)[schema.PROBABILITIES] for batch in batches)


@torch.inference_mode()
def resized(pictures_BHW: np.ndarray, checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Images reduced to the size and bit depth of the compressor's latents, and enlarged again."""
    stored = latent_encoder(checkpoint.recipe).latent_format()
    plain, steps = (
        AECNN(ResizeCodec(checkpoint.recipe.size // stored.size), nn.Identity(), (), stored.bits),
        2**stored.bits - 1,
    )
    small, large = [], []
    for part in np.array_split(pictures_BHW, math.ceil(len(pictures_BHW) / _BLOCK)):
        values = plain.encode(torch.from_numpy(part)[:, None].float() / 255)
        small.append((values[:, 0] * steps).round().numpy().astype(stored.dtype))
        large.append((plain.decode(values)[:, 0] * 255).round().numpy().astype(np.uint8))
    return np.concatenate(small), np.concatenate(large)


def _batches(checkpoint: Checkpoint, pictures_BHW: np.ndarray) -> Iterator[dict[str, Tensor]]:
    device = best_device()
    checkpoint.network.to(device)
    for start in range(0, len(pictures_BHW), _BLOCK):
        yield {schema.PIXELS: torch.from_numpy(pictures_BHW[start : start + _BLOCK]).to(device)}


def _joined(parts: Iterator[Tensor] | Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([part.cpu().numpy() for part in parts])
