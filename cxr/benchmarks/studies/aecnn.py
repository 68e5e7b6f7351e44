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
from cxr.reporting.tables import csv_text, markdown, number

COMPRESSED, RESIZED, WHOLE = "ae-cnn", "resized", "uncompressed"
# Ranjan et al. 2018, mean AUROC of one network each, with the classifier.
_PUBLISHED = {COMPRESSED: ".8241 (DenseNet-201), .8226 (DenseNet-121)", RESIZED: ".8220 (DenseNet-121)"}
LEGEND = (
    "Published: Ranjan et al. (2018), on the official split of ChestX-ray14, one network each. Unless the archive is "
    "ChestX-ray14, images and findings differ.\n"
)


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
    head = [
        "",
        "stored values",
        "mean AUROC (95 %)",
        "SD over seeds",
        f"minus {first.name} (95 %)",
        "PSNR, dB",
        "published",
    ]
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
                _PUBLISHED.get(each.aurocs.name, "–"),
            ]
        )
    return markdown(head, rows)


def csv(results: Sequence[CompressionResult]) -> str:
    """The rows of `classifiers.csv`, with the stored values and the image quality of each recipe."""
    stored = {each.aurocs.name: {"stored_values": each.values, "psnr": each.psnr} for each in results}
    rows = classifiers.rows([each.aurocs for each in results])
    return csv_text([row | stored[row["name"]] for row in rows])
