"""Reports: sections of text, tables and pictures, written as one self-contained HTML page and as Markdown.

`html_page` renders the HTML page. This module has the blocks that a report consists of, and the Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cxr import storage
from cxr.reporting.figures import save_figure
from cxr.reporting.tables import Table, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, TEXT = "report.html", "report.md"


@dataclass(frozen=True)
class Picture:
    """A PNG file and a sentence that says what it shows."""

    uri: str
    caption: str
    alt: str = ""
    """What readers hear who cannot see the picture. Default: the caption."""


def save_picture(figure: Figure, folder: str, name: str, caption: str, alt: str = "") -> Picture:
    """Write a figure as the PNG `name` into the URI `folder`."""
    return Picture(save_figure(figure, folder, name), caption, alt)


@dataclass(frozen=True)
class Gallery:
    """Pictures of single images in named groups, such as the worst and the best, shown side by side.

    Args:
        groups: the pictures by name of the group; groups without pictures are left out.
        sheet: all of them in one picture, which stands for them in the Markdown. Its caption explains the gallery.
        colors: what the colors of outlines mean, as #rrggbb by meaning.
    """

    groups: Mapping[str, Sequence[Picture]]
    sheet: Picture
    colors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away below a line that says what they are; they are printed."""

    summary: str
    blocks: Sequence[Block]


Block = str | Table | Picture | Gallery | Details  # a string is a paragraph of plain text, with `code` in monospace


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class KeyFigure:
    """A metric that is shown in large type at the top.

    Args:
        name: of the metric in result.json.
        title: what it is, in a few words.
        explanation: what it means, for a radiologist, in a sentence.
        low: lower end of its 95 % interval, NaN if there is none; likewise `high`.
        digits: decimals to show.
        share: it lies between 0 and 1, so that a bar can show it.
    """

    name: str
    title: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    explanation: str = ""
    digits: int = 3
    share: bool = True

    @property
    def text(self) -> str:
        """The value with its interval."""
        return f"{self.value:,.0f}" if not self.digits else interval(self.value, self.low, self.high, self.digits)


@dataclass(frozen=True)
class Report:
    """What a page says.

    Args:
        lead: one or two sentences that summarize the report.
        facts: what was evaluated, when and with which model: names and values.
        parts: reports about single runs or models, between the sections and the closing ones.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    figures: Sequence[KeyFigure] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Report] = ()
    closing: Sequence[Section] = ()


def write_report(out: str, report: Report) -> dict[str, str]:
    """Write OUT/report.html and OUT/report.md; returns their URIs as `page` and `report`.

    The pictures must have been written already; the Markdown links to those below `out`.
    """
    from cxr.reporting.html_page import html_page  # imports OpenCV and Jinja, which other uses of blocks do not need

    uris = {"page": storage.join(out, PAGE), "report": storage.join(out, TEXT)}
    storage.write_text(uris["page"], html_page(report))
    storage.write_text(uris["report"], "\n\n".join(_markdown(report, out, 1)) + "\n")
    return uris


def pictures(report: Report) -> list[str]:
    """The URIs of all pictures of a report that the Markdown shows."""
    own = [uri for section in report.sections for block in section.blocks for uri in _uris(block)]
    return own + [uri for part in report.parts for uri in pictures(part)]


def _uris(block: Block) -> list[str]:
    if isinstance(block, Picture):
        return [block.uri]
    if isinstance(block, Gallery):
        return [block.sheet.uri]
    return [uri for inner in block.blocks for uri in _uris(inner)] if isinstance(block, Details) else []


def _markdown(report: Report, out: str, level: int) -> list[str]:
    """The paragraphs of a report whose title has that level."""
    parts = [f"{'#' * level} {report.title}", report.lead]
    if report.facts:
        parts.append(Table(["", ""], list(report.facts.items())).markdown().rstrip("\n"))
    if report.figures:
        rows = [[each.title, each.text, each.explanation] for each in report.figures]
        parts.append(Table(["", "value (95 %)", ""], rows).markdown().rstrip("\n"))
    for section in report.sections:
        parts += _markdown_section(section, out, level + 1)
    for part in report.parts:
        parts += _markdown(part, out, level + 1)
    for section in report.closing:
        parts += _markdown_section(section, out, level + 1)
    return parts


def _markdown_section(section: Section, out: str, level: int) -> list[str]:
    return [f"{'#' * level} {section.title}", *(text for block in section.blocks for text in _block(block, out))]


def _block(block: Block, out: str) -> list[str]:
    if isinstance(block, Table):
        return [*([block.caption] if block.caption else []), block.markdown().rstrip("\n")]
    if isinstance(block, Picture):
        return [f"![{block.caption}]({block.uri.removeprefix(out.rstrip('/') + '/')})"]
    if isinstance(block, Gallery):
        return _block(block.sheet, out)
    if isinstance(block, Details):
        return [block.summary, *(text for inner in block.blocks for text in _block(inner, out))]
    return [block]
