"""Tables of networks that localize findings, with the figures of papers, and curves of accuracy by threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cxr.benchmarks.studies.localization import Judged, Sure, accuracy, sure
from cxr.metrics.localization import MEASURES, THRESHOLDS
from cxr.reporting import palette
from cxr.reporting.localization import NAMED, tidy
from cxr.reporting.tables import csv_text, interval, markdown, number

_SHOWN = (("iou", 0.1), ("iou", 0.3), ("iou", 0.5), ("iobb", 0.1), ("iobb", 0.5))
_GUESSES = {"random": ":", "center": "--"}
_GAINS = {"small": "T({}) = {}, mean of Nodule and Mass", "large": "T({}) = {}, Cardiomegaly", "auroc": "mean AUROC"}
_LEGEND = (
    "A finding with a true box in an image counts as localized if a predicted box of it, of any score, has an IoU "
    "(or an intersection over the predicted box, IoBB) above T with a true one (Wang et al. 2017). Figures are means "
    "over seeds; 95 % intervals are percentile intervals of {resamples:,} resamples of patients (with all of their "
    "images) and of seeds. With few seeds, such intervals are somewhat too narrow. `random` has one box per image "
    "and finding, of the size of a training box and at a random place; `center` has the mean box of the training "
    "images. False positives are predicted boxes per image that do not pass T(IoU) = .3, averaged over findings.\n"
)
# As quoted in later papers: ChestX-ray14, no boxes in training, mean of its eight findings with boxes.
_PAPERS = (
    ("CAM (Zhou et al. 2016)", ".56", ".36", ".21", ".12", ".07"),
    ("Grad-CAM++ (Chattopadhay et al. 2018)", ".62", ".42", ".28", ".18", ".10"),
    ("PCAN", ".78", ".57", ".36", ".21", ".10"),
    ("CLARiTy", ".81", ".69", ".59", ".47", ".32"),
    ("random", ".29", ".17", ".10", ".05", ".03"),
)
_PAPERS_SAID = (
    "On ChestX-ray14's 984 boxes, without boxes in training, papers report this mean accuracy at T(IoU):\n\n"
    "{table}\nUnless the archive is ChestX-ray14, images and findings differ: these figures are only for "
    "orientation.\n"
)


def tables(judged: Sequence[Judged]) -> str:
    """Markdown: for each threshold a table with one row per network and one column per finding; then AUROC and the
    rest."""
    parts = []
    for measure, at in _SHOWN:
        head = [f"T({NAMED[measure]}) = {at:.1f}", *judged[0].findings, "mean"]
        rows = [
            [
                one.name,
                *(_cell(accuracy(one, measure, at, of)) for of in (*([f] for f in one.findings), one.findings)),
            ]
            for one in judged
        ]
        parts.append(markdown(head, rows))
    return "\n".join([*parts, _others(judged)])


def _others(judged: Sequence[Judged]) -> str:
    head = ["", "mean AUROC (95 %)", "SD of seeds", "pointing game", "false positives per image"]
    at = THRESHOLDS.index(0.3)
    rows = [
        [
            one.name,
            _cell(areas := sure(one.aurocs, one.drawn_aurocs), 3),
            number(areas.spread),
            number(float(one.pointing.mean()), 2),
            number(float(one.wrong["iou"][:, :, at].mean()), 2),
        ]
        for one in judged
    ]
    return markdown(head, rows)


def _cell(of: Sure, digits: int = 2) -> str:
    return interval(of.value, of.low, of.high, digits)


def gains_table(gained: Mapping[str, Sure], one: str, other: str, threshold: float = 0.3) -> str:
    """Markdown: the gains of `studies.localization.gains`."""
    told = {name: _GAINS[name.partition("_")[0]].format("IoU", f"{threshold:.1f}") for name in gained}
    rows = [[told[name], _cell(of, 3), number(of.spread)] for name, of in gained.items()]
    return markdown(["", f"{one} minus {other} (95 %)", "SD of seeds"], rows)


def page(judged: Sequence[Judged], gained: str, said: str, resamples: int) -> str:
    """The tables with their legend and the figures of papers, in Markdown.

    Args:
        gained: what `gains_table` gives, or nothing.
        said: of which images and seeds it is.
    """
    papers = markdown(["", *(f"{at:.1f}" for at in THRESHOLDS[:5])], _PAPERS)
    legend = _LEGEND.format(resamples=resamples)
    return "\n".join([tables(judged), gained, f"{said}\n", legend, _PAPERS_SAID.format(table=papers)])


def csv(judged: Sequence[Judged]) -> str:
    """One row per network, finding, measure and threshold; the mean over findings is one of them."""
    return csv_text([row for one in judged for row in _rows(one)])


def _rows(one: Judged) -> list[dict[str, Any]]:
    groups = {**{finding: [finding] for finding in one.findings}, "mean": list(one.findings)}
    rows = []
    for measure, (t, at), (name, of) in (
        (m, t, g) for m in MEASURES for t in enumerate(THRESHOLDS) for g in groups.items()
    ):
        figure = accuracy(one, measure, at, of)
        places = [one.findings.index(finding) for finding in of]
        rows.append(
            {"network": one.name, "measure": measure, "threshold": at, "finding": name}
            | {"accuracy": figure.value, "low": figure.low, "high": figure.high, "sd": figure.spread}
            | {"false_positives": float(one.wrong[measure][:, places, t].mean())}
        )
    return rows


def picture(judged: Sequence[Judged]) -> Figure:
    """Accuracy against the threshold on IoU: one panel per finding, one line per network with its interval, one dot
    per seed."""
    panels = [[finding] for finding in judged[0].findings] + [list(judged[0].findings)]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).reshape(-1)
    for axes, of in zip(grid, panels, strict=False):
        for place, one in enumerate(judged):
            _curve(axes, one, of, palette.series(place))
        tidy(axes, "iou")
        axes.set_title(of[0] if len(of) == 1 else "mean over findings", fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(judged), frameon=False)
    grid[0].set_ylabel("images in which it is localized")
    return figure


def _curve(axes: Any, one: Judged, findings: Sequence[str], color: str) -> None:
    seen = [accuracy(one, "iou", at, findings) for at in THRESHOLDS]
    guess = bool(np.isnan(one.aurocs).all())
    style = {"color": "0.5", "ls": _GUESSES.get(one.name, "--")} if guess else {"color": color}
    axes.plot(THRESHOLDS, [of.value for of in seen], lw=1.6, label=one.name, **style)
    if not guess:
        axes.fill_between(
            THRESHOLDS, [of.low for of in seen], [of.high for of in seen], color=color, alpha=0.12, lw=0
        )
        for at in THRESHOLDS:
            own, _ = one.at("iou", at, findings)
            axes.plot([at] * len(own), own, ".", color=color, ms=4, alpha=0.6)
