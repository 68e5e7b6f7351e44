"""AE-CNN compared with its baselines on one test split: classification, size of stored images, and image quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr.benchmarks.studies import classifiers, compression
from cxr.benchmarks.studies.seed_results import SeedResults
from cxr.benchmarks.studies.xrays import XRays
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.reporting.tables import markdown, number


@dataclass(frozen=True)
class CompressionResult:
    """Results of the networks of one recipe, one per seed, on the test images."""

    aurocs: SeedResults
    psnr: float  # dB, of decoded images, mean over seeds; NaN without compression
    values: int  # per stored image


def summarize(aurocs: SeedResults, networks: Sequence[Checkpoint], sample: XRays) -> CompressionResult:
    """The results, with the image quality of a sample of the test images."""
    psnr = float(np.mean([_psnr(network, sample) for network in networks]))
    return CompressionResult(aurocs, psnr, latent_encoder(networks[0].recipe).latent_format().size ** 2)


def _psnr(network: Checkpoint, sample: XRays) -> float:
    """Of images decoded from stored latents; NaN without compression."""
    stored = compression.encode(network, sample.pixels)
    if stored.shape == sample.pixels.shape:
        return float("nan")
    return compression.psnr(sample.pixels, compression.decode(network, stored))


def metrics(results: Sequence[CompressionResult]) -> dict[str, float]:
    """Those of `classifiers.metrics`, and NAME/psnr of recipes that compress."""
    qualities = {f"{each.aurocs.name}/psnr": each.psnr for each in results if not np.isnan(each.psnr)}
    return classifiers.metrics([each.aurocs for each in results]) | qualities


def table(results: Sequence[CompressionResult]) -> str:
    """Markdown: one row per result, all compared with the first."""
    first = results[0].aurocs
    head = ["", "stored values", "mean AUROC (95 %)", "SD of seeds", f"minus {first.name} (95 %)", "PSNR, dB"]
    rows = []
    for each in results:
        mean, gain = each.aurocs.mean(), each.aurocs.gain(first)
        rows.append(
            [
                each.aurocs.name,
                f"{each.values:,}",
                mean.cell(),
                number(mean.sd),
                "–" if each is results[0] else gain.cell(),
                number(each.psnr, 1),
            ]
        )
    return markdown(head, rows)
