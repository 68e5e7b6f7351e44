"""A self-explanatory chart of throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from cxr.reporting import palette
from cxr.reporting.figures import save_figure

_OURS, _PEERS = palette.MODEL, palette.FRAME


def save_chart(
    groups: Mapping[str, Mapping[str, float]], targets: Mapping[str, float], ours: Sequence[str], folder: str
) -> str:
    """One panel per group with a bar per reader in images/s, and the target relative to the fastest peer.

    Args:
        groups: title of a panel -> name of a bar -> images per second.
        targets: title of a panel -> target ratio to the fastest peer.
        ours: names of this project's bars; the others are peers.

    Returns:
        URI of the chart.
    """
    figure = Figure(figsize=(3.6 * len(groups), 3.4), layout="constrained")
    for ax, (title, bars) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        colors = [_OURS if name in ours else _PEERS for name in bars]
        rectangles = ax.bar(list(bars), list(bars.values()), color=colors)
        ax.bar_label(rectangles, [_format(value) for value in bars.values()], fontsize=8)
        peer = max((value for name, value in bars.items() if name not in ours), default=0.0)
        if title in targets and peer:
            ax.axhline(targets[title] * peer, color=palette.MARK, linewidth=1, linestyle="--")
            ax.text(
                0.02,
                targets[title] * peer,
                f"target: {targets[title]:g} x the fastest alternative",
                fontsize=7,
                color=palette.MARK,
                va="bottom",
                transform=ax.get_yaxis_transform(),
            )
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("images per second", fontsize=8)
        ax.tick_params("x", labelrotation=20, labelsize=8)
        ax.tick_params("y", labelsize=7)
        ax.margins(y=0.18)
        ax.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, folder, "input_speed.png")


def _format(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
