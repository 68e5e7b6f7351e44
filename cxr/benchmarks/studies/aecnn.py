"""AE-CNN compared with its baselines on one test split: classification, size of stored images, and image quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr.benchmarks.studies import compression
from cxr.benchmarks.studies.classification import ClassificationResult
from cxr.benchmarks.studies.xrays import XRays
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.reporting.tables import interval, markdown, number


@dataclass(frozen=True)
class CompressionResult:
    """Results of the networks of one recipe on the test split."""

    classification: ClassificationResult
    psnr: float  # dB, of decoded images, mean over seeds; NaN without compression
    values: int  # per stored image


def summarize(
    classification: ClassificationResult, networks: Sequence[Checkpoint], sample: XRays
) -> CompressionResult:
    """The results with the image quality of a sample of the test images."""
    psnr = float(np.mean([_psnr(network, sample) for network in networks]))
    return CompressionResult(classification, psnr, latent_encoder(networks[0].recipe).latent_format().size ** 2)


def _psnr(network: Checkpoint, sample: XRays) -> float:
    """Of images decoded from stored latents; NaN without compression."""
    stored = compression.encode(network, sample.pixels)
    if stored.shape == sample.pixels.shape:
        return float("nan")
    return compression.psnr(sample.pixels, compression.decode(network, stored))


def metrics(results: Sequence[CompressionResult]) -> dict[str, float]:
    """Metrics by name: NAME_auroc with _low, _high and _sd, NAME_psnr, and gains over the last result."""
    values: dict[str, float] = {}
    for result in results:
        classified = result.classification
        low, high = classified.ends()
        values |= {
            f"{classified.name}_auroc": classified.mean,
            f"{classified.name}_auroc_low": low,
            f"{classified.name}_auroc_high": high,
            f"{classified.name}_auroc_sd": classified.sd(),
            f"{classified.name}_psnr": result.psnr,
        }
    last = results[-1].classification
    for name, classified in [(result.classification.name, result.classification) for result in results[:-1]]:
        gain, low, high = classified.minus(last)
        values |= {f"{name}_gain": gain, f"{name}_gain_low": low, f"{name}_gain_high": high}
    return {name: value for name, value in values.items() if not np.isnan(value)}


def table(results: Sequence[CompressionResult]) -> str:
    """Markdown table; all rows are compared with the last one."""
    last = results[-1].classification
    head = ["", "stored values", "mean AUROC (95 % by patient)", "SD of seeds", f"minus {last.name}", "PSNR, dB"]
    rows = [
        [
            classified.name,
            f"{result.values:,}",
            interval(classified.mean, *classified.ends()),
            number(classified.sd()),
            "–" if classified is last else interval(*classified.minus(last)),
            number(result.psnr, 1),
        ]
        for result, classified in ((result, result.classification) for result in results)
    ]
    return markdown(head, rows)
