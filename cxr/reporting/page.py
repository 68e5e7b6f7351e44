"""Reports: sections of text, tables and pictures, written as one self-contained HTML page and as Markdown.

The HTML page holds its pictures as data URIs and its style inline. It opens from disk without a network, follows the
reader's light or dark mode, and prints.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cxr import storage
from cxr.reporting.figures import save_figure
from cxr.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, TEXT = "report.html", "report.md"


@dataclass(frozen=True)
class Picture:
    """A PNG file and a sentence that says what it shows."""

    uri: str
    caption: str


def save_picture(figure: Figure, folder: str, name: str, caption: str) -> Picture:
    """Write a figure as the PNG `name` into the URI `folder`."""
    return Picture(save_figure(figure, folder, name), caption)


Block = str | Table | Picture  # a string is a paragraph of plain text, in which `code` is set in monospace


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: Sequence[Block]


def write_report(out: str, title: str, lead: str, sections: Sequence[Section]) -> dict[str, str]:
    """Write OUT/report.html and OUT/report.md; returns their URIs as `page` and `report`.

    Args:
        lead: one sentence that summarizes the report.
        sections: their pictures must have been written already; the Markdown links to those below `out`.
    """
    uris = {"page": storage.join(out, PAGE), "report": storage.join(out, TEXT)}
    storage.write_text(uris["page"], html_page(title, lead, sections))
    storage.write_text(uris["report"], markdown_page(title, lead, sections, out))
    return uris


def html_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The report as one HTML document. All text is escaped; pictures are read from their URIs and embedded."""
    links = "".join(f'<li><a href="#s{n}">{_text(s.title)}</a></li>' for n, s in enumerate(sections))
    body = ""
    for n, section in enumerate(sections):
        blocks = "".join(map(_html_block, section.blocks))
        body += f'<section id="s{n}">\n<h2>{_text(section.title)}</h2>\n{blocks}</section>\n'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_text(title)}</h1>\n<p class="lead">{_text(lead)}</p>\n'
        f"{f'<nav><ul>{links}</ul></nav>' if len(sections) > 1 else ''}\n{body}</main>\n</body>\n</html>\n"
    )


def markdown_page(title: str, lead: str, sections: Sequence[Section], out: str) -> str:
    """The report as Markdown, with links to its pictures relative to `out`."""
    parts = [f"# {title}", lead]
    for section in sections:
        parts += [f"## {section.title}", *(_markdown_block(block, out) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block, out: str) -> str:
    if isinstance(block, Table):
        return block.markdown().rstrip("\n")
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.uri.removeprefix(out.rstrip('/') + '/')})"
    return block


def _html_block(block: Block) -> str:
    if isinstance(block, Table):
        numeric = [all(map(_NUMBER.match, filter(None, column))) for column in zip(*block.rows, strict=True)]
        head = _row("th", block.head, numeric or [False] * len(block.head)) if any(block.head) else ""
        rows = "\n".join(_row("td", row, numeric) for row in block.rows)
        return f'<div class="table"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}</tbody></table></div>\n'
    if isinstance(block, Picture):
        data = base64.b64encode(storage.read_bytes(block.uri)).decode("ascii")
        caption = _text(block.caption)
        return (
            f'<figure><img alt="{html.escape(block.caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>\n"
        )
    return f"<p>{_text(block)}</p>\n"


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    kinds = (' class="number"' if number else "" for number in numeric)
    return (
        f"<tr>{''.join(f'<{tag}{kind}>{_text(cell)}</{tag}>' for cell, kind in zip(cells, kinds, strict=True))}</tr>"
    )


def _text(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


_NUMBER = re.compile(r"[-−<]? ?\d[\d,.]*( ?%| \(.*\))?$|–$")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark }
:root { --line: #d4d8dd; --soft: #5c6570; --back: #ffffff; --text: #1c2126; --link: #1b6ca8 }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4149; --soft: #a3adb8; --back: #16191d; --text: #e6e9ec; --link: #7fbde8 }
}
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 84rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line) }
p { max-width: 48rem; margin: .75rem 0; overflow-wrap: anywhere }
.lead { font-size: 1.1rem }
a { color: var(--link) }
nav ul { list-style: none; padding: 0; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem }
.table { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600; vertical-align: bottom }
tbody tr:hover { background: color-mix(in srgb, var(--line) 35%, transparent) }
td:last-child:not(:first-child):not(.number) { min-width: 10rem }
.number { text-align: right; white-space: nowrap }
figure { margin: 1.5rem 0 }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
figcaption { color: var(--soft); font-size: .9rem; max-width: 48rem }
code { font-size: .9em }
@media screen and (max-width: 40rem) {
  figure { overflow-x: auto }
  img { max-width: max(100%, 60rem) }
}
@media print {
  :root { --line: #bbb; --soft: #444; --back: #fff; --text: #000; --link: #000 }
  body { font-size: 11pt }
  main { max-width: none; padding: 0 }
  nav { display: none }
  .table { overflow: visible }
  table { font-size: 7pt }
  h2 { break-after: avoid }
  figure, tr { break-inside: avoid }
}
"""
