"""AE-CNN compared with its baselines on one test split: several seeds, intervals by patient, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from cxr.benchmarks.studies import compression
from cxr.benchmarks.studies.xrays import XRays
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.metrics.bootstrap import ENDS, RESAMPLES
from cxr.metrics.classification.ranking import auroc
from cxr.metrics.classification.resampled_auroc import resampled_aurocs
from cxr.reporting import palette
from cxr.reporting.tables import interval, markdown, number


@dataclass(frozen=True)
class ClassificationResult:
    """Results of the networks of one recipe, one per seed, on the test split."""

    name: str
    aurocs: np.ndarray  # (S,) mean AUROC over findings of each seed
    resampled: np.ndarray  # (R,) the mean over seeds, in each resample of patients
    psnr: float  # of decoded images, mean over seeds; NaN without compression
    values: int  # per stored image

    @property
    def mean(self) -> float:
        return float(self.aurocs.mean())

    def sd(self) -> float:
        """Standard deviation over seeds."""
        return float(self.aurocs.std(ddof=1)) if len(self.aurocs) > 1 else float("nan")

    def ends(self) -> tuple[float, float]:
        """95 % interval of the mean over seeds, from resampled patients."""
        low, high = np.nanquantile(self.resampled, ENDS)
        return float(low), float(high)


def evaluate(name: str, networks: Sequence[Checkpoint], xrays: XRays, seed: int = 0) -> ClassificationResult:
    """Classify the X-rays with each network; recipes can be compared only if they are evaluated with the same
    `seed`."""
    predictions = [_predict(network, xrays) for network in networks]
    aurocs = np.array([np.nanmean(auroc(probabilities, xrays.labels)) for probabilities, _ in predictions])
    resampled = [
        np.nanmean(resampled_aurocs(probabilities, xrays.labels, xrays.patients, RESAMPLES, seed), axis=1)
        for probabilities, _ in predictions
    ]
    values = latent_encoder(networks[0].recipe).latent_format().size ** 2
    psnr = float(np.mean([psnr for _, psnr in predictions]))
    return ClassificationResult(name, aurocs, np.mean(resampled, axis=0), psnr, values)


def _predict(network: Checkpoint, xrays: XRays) -> tuple[np.ndarray, float]:
    """Probabilities (N, F) from stored latents, and the PSNR of decoded images, NaN without compression."""
    stored = compression.encode(network, xrays.pixels)
    probabilities = compression.predict_latents(network, stored).astype(np.float64)
    if stored.shape == xrays.pixels.shape:
        return probabilities, float("nan")
    return probabilities, compression.psnr(xrays.pixels, compression.decode(network, stored))


def metrics(results: Sequence[ClassificationResult]) -> dict[str, float]:
    """Metrics by name: NAME_auroc with _low, _high and _sd, and gains over the last result."""
    values: dict[str, float] = {}
    for result in results:
        low, high = result.ends()
        values |= {
            f"{result.name}_auroc": result.mean,
            f"{result.name}_auroc_low": low,
            f"{result.name}_auroc_high": high,
            f"{result.name}_auroc_sd": result.sd(),
            f"{result.name}_psnr": result.psnr,
        }
    for result in results[:-1]:
        gain, low, high = auroc_gain(result, results[-1])
        values |= {f"{result.name}_gain": gain, f"{result.name}_gain_low": low, f"{result.name}_gain_high": high}
    return {name: value for name, value in values.items() if not np.isnan(value)}


def auroc_gain(result: ClassificationResult, baseline: ClassificationResult) -> tuple[float, float, float]:
    """Mean AUROC minus that of the baseline, and its 95 % interval over the same resampled patients."""
    low, high = np.nanquantile(result.resampled - baseline.resampled, ENDS)
    return result.mean - baseline.mean, float(low), float(high)


def table(results: Sequence[ClassificationResult]) -> str:
    """Markdown table; all rows are compared with the last one."""
    last = results[-1]
    head = ["", "stored values", "mean AUROC (95 % by patient)", "SD of seeds", f"minus {last.name}", "PSNR, dB"]
    rows = [
        [
            result.name,
            f"{result.values:,}",
            interval(result.mean, *result.ends()),
            number(result.sd()),
            "–" if result is last else interval(*auroc_gain(result, last)),
            number(result.psnr, 1),
        ]
        for result in results
    ]
    return markdown(head, rows)


def picture(results: Sequence[ClassificationResult]) -> Figure:
    """Mean AUROC of each recipe with its interval, and one dot per seed."""
    figure = Figure(figsize=(6.4, 0.6 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(reversed(results)):
        low, high = result.ends()
        axes.plot([low, high], [row, row], color=palette.MODEL, lw=2, solid_capstyle="butt")
        axes.plot(result.aurocs, [row] * len(result.aurocs), "o", color=palette.MODEL, alpha=0.6, mec="white")
        axes.plot([result.mean], [row], "|", color="black", ms=14, mew=2)
    axes.set_yticks(range(len(results)), [result.name for result in reversed(results)])
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_xlabel("mean AUROC on the test split\nline: 95 % by patient, dots: seeds, bar: their mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=palette.GRID)
    return figure


def variants(named: Mapping[str, Sequence[Checkpoint]], xrays: XRays) -> list[ClassificationResult]:
    """All recipes, evaluated on the same resamples."""
    return [evaluate(name, networks, xrays) for name, networks in named.items()]
