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
class Judged:
    """Results of the networks of one recipe, one per seed, on the test split."""

    name: str
    aurocs: np.ndarray  # (S,) mean AUROC over findings of each seed
    drawn: np.ndarray  # (R,) the mean over seeds, in each resample of patients
    psnr: float  # of decoded images, mean over seeds; NaN where nothing is compressed
    values: int  # that are kept of an image

    @property
    def mean(self) -> float:
        return float(self.aurocs.mean())

    def spread(self) -> float:
        """Standard deviation over seeds."""
        return float(self.aurocs.std(ddof=1)) if len(self.aurocs) > 1 else float("nan")

    def ends(self) -> tuple[float, float]:
        """95 % interval of the mean over seeds, for other patients."""
        low, high = np.nanquantile(self.drawn, ENDS)
        return float(low), float(high)


def judge(name: str, networks: Sequence[Checkpoint], xrays: XRays, seed: int = 0) -> Judged:
    """Classify the X-rays with each network; recipes can be compared only if they are evaluated with the same
    `seed`."""
    told = [_told(kept, xrays) for kept in networks]
    probabilities = [found for found, _ in told]
    areas = np.array([np.nanmean(auroc(found, xrays.labels)) for found in probabilities])
    drawn = [
        np.nanmean(resampled_aurocs(found, xrays.labels, xrays.patients, RESAMPLES, seed), axis=1)
        for found in probabilities
    ]
    values = latent_encoder(networks[0].recipe).latent_format().size ** 2
    return Judged(name, areas, np.mean(drawn, axis=0), float(np.mean([psnr for _, psnr in told])), values)


def _told(kept: Checkpoint, xrays: XRays) -> tuple[np.ndarray, float]:
    """Probabilities (N, F) from stored latents, and the PSNR of decoded images, NaN where nothing is compressed."""
    stored = compression.encode(kept, xrays.pixels)
    found = compression.predict_latents(kept, stored).astype(np.float64)
    if stored.shape == xrays.pixels.shape:
        return found, float("nan")
    return found, compression.psnr(xrays.pixels, compression.decode(kept, stored))


def metrics(judged: Sequence[Judged]) -> dict[str, float]:
    """Metrics by name: NAME_auroc with _low, _high and _sd, and gains over the last of `judged`."""
    found: dict[str, float] = {}
    for one in judged:
        low, high = one.ends()
        found |= {
            f"{one.name}_auroc": one.mean,
            f"{one.name}_auroc_low": low,
            f"{one.name}_auroc_high": high,
            f"{one.name}_auroc_sd": one.spread(),
            f"{one.name}_psnr": one.psnr,
        }
    for one in judged[:-1]:
        gain, low, high = gained(one, judged[-1])
        found |= {f"{one.name}_gain": gain, f"{one.name}_gain_low": low, f"{one.name}_gain_high": high}
    return {name: value for name, value in found.items() if not np.isnan(value)}


def gained(one: Judged, other: Judged) -> tuple[float, float, float]:
    """How much higher the mean AUROC is, and its 95 % interval, both on the same resamples of patients."""
    low, high = np.nanquantile(one.drawn - other.drawn, ENDS)
    return one.mean - other.mean, float(low), float(high)


def table(judged: Sequence[Judged]) -> str:
    """Markdown table; all rows are compared with the last one."""
    last = judged[-1]
    head = ["", "values kept", "mean AUROC (95 % by patient)", "SD of seeds", f"less {last.name}", "PSNR, dB"]
    rows = [
        [
            one.name,
            f"{one.values:,}",
            interval(one.mean, *one.ends()),
            number(one.spread()),
            "–" if one is last else interval(*gained(one, last)),
            number(one.psnr, 1),
        ]
        for one in judged
    ]
    return markdown(head, rows)


def picture(judged: Sequence[Judged]) -> Figure:
    """Mean AUROC of each recipe with its interval, and one dot per seed."""
    figure = Figure(figsize=(6.4, 0.6 * len(judged) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, one in enumerate(reversed(judged)):
        low, high = one.ends()
        axes.plot([low, high], [row, row], color=palette.MODEL, lw=2, solid_capstyle="butt")
        axes.plot(one.aurocs, [row] * len(one.aurocs), "o", color=palette.MODEL, alpha=0.6, mec="white")
        axes.plot([one.mean], [row], "|", color="black", ms=14, mew=2)
    axes.set_yticks(range(len(judged)), [one.name for one in reversed(judged)])
    axes.set_ylim(-0.6, len(judged) - 0.4)
    axes.set_xlabel("mean AUROC on the test split\nline: 95 % by patient, dots: seeds, bar: their mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=palette.GRID)
    return figure


def variants(named: Mapping[str, Sequence[Checkpoint]], xrays: XRays) -> list[Judged]:
    """All recipes, evaluated on the same resamples."""
    return [judge(name, networks, xrays) for name, networks in named.items()]
