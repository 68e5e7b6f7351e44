"""Paces side by side, to be read without a text beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from cxr.reporting import palette
from cxr.reporting.figures import save_figure

_OURS, _PEERS = palette.MODEL, palette.FRAME


def save_chart(
    groups: Mapping[str, Mapping[str, float]], targets: Mapping[str, float], ours: Sequence[str], folder: str
) -> str:
    """One panel a group: a bar a way of reading, images a second, and how many times the fastest peer ours is.

    Args:
        groups: title of a panel -> name of a bar -> images a second.
        targets: title of a panel -> the ratio that is wanted.
        ours: names of bars that are this project's; the others are peers.

    Returns:
        the picture's URI.
    """
    figure = Figure(figsize=(3.6 * len(groups), 3.4), layout="constrained")
    for ax, (title, bars) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        colors = [_OURS if name in ours else _PEERS for name in bars]
        drawn = ax.bar(list(bars), list(bars.values()), color=colors)
        ax.bar_label(drawn, [_said(value) for value in bars.values()], fontsize=8)
        peer = max((value for name, value in bars.items() if name not in ours), default=0.0)
        if title in targets and peer:
            ax.axhline(targets[title] * peer, color=palette.MARK, linewidth=1, linestyle="--")
            ax.text(
                0.02,
                targets[title] * peer,
                f"target: {targets[title]:g} x the fastest other",
                fontsize=7,
                color=palette.MARK,
                va="bottom",
                transform=ax.get_yaxis_transform(),
            )
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("images a second", fontsize=8)
        ax.tick_params("x", labelrotation=20, labelsize=8)
        ax.tick_params("y", labelsize=7)
        ax.margins(y=0.18)
        ax.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, folder, "input_speed.png")


def _said(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
