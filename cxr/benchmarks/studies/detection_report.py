"""Tables of the study of detection, with values from the challenge, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from cxr.benchmarks.studies.detection import (
    BY_CLASSIFIER,
    FUSION,
    IOU,
    NORMAL,
    PLAIN,
    PREPROCESSING,
    SECTIONS,
    SIZE,
    DetectionResult,
    baselines,
)
from cxr.metrics.bootstrap import RESAMPLES
from cxr.reporting import palette
from cxr.reporting.tables import csv_text, markdown, number

# On the test images of VinBigData, whose boxes are not public, as mAP with No finding as a 15th class.
PUBLISHED: Mapping[str, str] = {
    f"{PREPROCESSING}/{PLAIN}": ".154 to .269 (YOLOv5)",
    SIZE: ".29; the winners' .321",  # of the largest ensemble
    f"{NORMAL}/no filter": ".154 to .269 (one YOLOv5)",
    f"{NORMAL}/{BY_CLASSIFIER}": ".201 to .269 (one YOLOv5)",
}
_TITLES = {
    PREPROCESSING: "One network, by the preprocessing of its images",
    SIZE: "Ensembles, fused by WBF, by the number of networks",
    FUSION: "Fusion of the boxes of the networks without preprocessing",
    NORMAL: "Filter for normal images, with No finding as another finding",
}
_LEGEND = (
    f"Figures are average precision (VOC 2010, all points) at IoU > {IOU:g}, as in VinBigData's challenge. Intervals "
    f"are 95 % percentile intervals of {RESAMPLES:,} resamples of patients, and in the first table also of seeds; in "
    "the others, the networks are fixed. With few seeds, intervals that resample them are somewhat too narrow. An "
    "ensemble of fewer than all networks is the mean over up to 10 different ensembles of this size. The filter adds "
    "a box of No finding with the probability that an image is normal from `low` on, and replaces all boxes by it "
    "from `high` on; without a filter, only images without any box are predicted normal.\n\n"
    "Published: scores on the hidden test images of VinBigData's challenge (2020), with No finding as a 15th class, "
    "of other networks that were trained on its 15,000 images. They can be compared only with results in the table "
    "of the filter, on the same test images.\n"
)


def tables(results: Sequence[DetectionResult]) -> str:
    """Markdown: a table for each section, whose rows are compared with its first."""
    return "\n".join(_table(section, results) for section in SECTIONS if any(r.section == section for r in results))


def _table(section: str, results: Sequence[DetectionResult]) -> str:
    own, baseline = [result for result in results if result.section == section], baselines(results)[section]
    several = list(baseline.findings) if len(baseline.findings) > 1 else []
    figures = ["networks", "mAP (95 %)", "SD over seeds", f"minus {baseline.name} (95 %)"]
    head = [section, *figures, *several, "published"]
    rows = []
    for result in own:
        mean = result.mean()
        gain = "–" if result is baseline else result.gain(baseline).cell()
        aps = [number(ap) for ap in result.values.mean(0).tolist()] if several else []
        published = _published(result, own[-1]) or "–"
        rows.append([result.name, f"{result.networks}", mean.cell(), number(mean.sd), gain, *aps, published])
    return f"**{_TITLES[section]}**\n\n{markdown(head, rows)}"


def _published(result: DetectionResult, last: DetectionResult) -> str:
    """The published value beside a result; `last` is the last one of its section."""
    if result is last and result.section == SIZE and result.networks > 1:
        return PUBLISHED[SIZE]
    return PUBLISHED.get(f"{result.section}/{result.name}", "")


def page(results: Sequence[DetectionResult], summary: str) -> str:
    """The tables with their legend, in Markdown."""
    return "\n".join([tables(results), f"{summary}\n", _LEGEND])


def csv(results: Sequence[DetectionResult]) -> str:
    """One row per result and finding; the mean over findings is one of them."""
    first, last = baselines(results), {result.section: result for result in results}
    rows = (_rows(result, first[result.section], last[result.section]) for result in results)
    return csv_text([row for of_result in rows for row in of_result])


def _rows(result: DetectionResult, baseline: DetectionResult, last: DetectionResult) -> list[dict[str, Any]]:
    about = {"section": result.section, "name": result.name, "networks": result.networks}
    mean, gain = result.mean(), result.gain(baseline)
    published = _published(result, last)
    of_mean = {"finding": "mean", "ap": mean.value, "low": mean.low, "high": mean.high, "sd": mean.sd}
    compared = {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "published": published}
    nothing = dict.fromkeys(("low", "high", "sd", *compared))
    return [
        about | of_mean | compared,
        *(
            {**about, "finding": finding, "ap": ap, **nothing}
            for finding, ap in zip(result.findings, result.values.mean(0).tolist(), strict=True)
        ),
    ]


def picture(results: Sequence[DetectionResult]) -> Figure:
    """A panel for each section: mean AP of each result with its interval, and one dot per seed or ensemble."""
    sections = [section for section in SECTIONS if any(result.section == section for result in results)]
    rows = [[result for result in results if result.section == section] for section in sections]
    figure = Figure(figsize=(7.6, 1.2 + sum(0.3 * len(own) + 0.55 for own in rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=[len(own) + 1 for own in rows])[
        :, 0
    ]
    for axes, section, own in zip(panels, sections, rows, strict=True):
        axes.axvline(own[0].mean().value, color=palette.NEUTRAL, ls="--", lw=1)
        for row, result in enumerate(reversed(own)):
            mean = result.mean()
            axes.plot([mean.low, mean.high], [row] * 2, color=palette.MODEL, lw=2, alpha=0.5, solid_capstyle="butt")
            dots = result.values.mean(1)
            axes.plot(dots, [row] * len(dots), "o", color=palette.MODEL, alpha=0.5, ms=4, mec="white")
            axes.plot([mean.value], [row], "|", color="black", ms=11, mew=2)
        axes.set_yticks(range(len(own)), [result.name for result in reversed(own)], fontsize=8)
        axes.set_ylim(-0.7, len(own) - 0.3)
        axes.set_title(_TITLES[section], loc="left", fontsize=9)
        axes.grid(axis="x", color=palette.GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"mean AP at IoU > {IOU:g}\nline: 95 %, dots: networks or ensembles, bar: their mean")
    return figure
