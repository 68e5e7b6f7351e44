"""A report as one HTML document: self-contained, readable on a phone, on paper and with a screen reader.

The page opens from disk without a network and without scripts. Its pictures are data URIs, its style is inline, and
a Content-Security-Policy forbids everything else. Pictures are enlarged by links to themselves (`:target` in the
style).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import cxr
from cxr import storage
from cxr.reporting.page import Block, Details, Gallery, Picture, Report
from cxr.reporting.tables import Table, number

_QUALITY = 88  # of WebP, for X-rays
_SMOOTH = 0.8  # share of pixels that equal their left neighbor, above which a picture is a chart and not an X-ray
_NUMBER = re.compile(r"[-−<]? ?\d[\d,.]*( ?%| \(.*\))?$|–$")


def html_page(report: Report) -> str:
    """The report as one HTML document. All text is escaped; pictures are read from their URIs and embedded."""
    environment = _environment()
    style, _, _ = environment.get_template("report.css.j2").render().rpartition("\n")
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    numbers = itertools.count(1)
    page = environment.get_template("report.html.j2").render(
        report=report,
        style=Markup(style),  # our own file, without text from elsewhere
        policy=policy,
        version=cxr.__version__,
        next_id=lambda: next(numbers),
    )
    return page.lstrip() + "\n"  # the macros at the head of the template leave empty lines


@dataclass(frozen=True)
class EmbeddedImage:
    """A picture as a data URI, and its size in pixels."""

    src: str
    width: int
    height: int
    is_chart: bool  # lines and text on a plain background, not an X-ray


def embedded(png: bytes) -> EmbeddedImage:
    """A PNG file for a page: as WebP, lossless for charts, where that halves the file.

    Raises:
        ValueError: it is no PNG file.
    """
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("expected a PNG file, got bytes that cannot be decoded")
    if image.ndim == 3 and image.shape[2] == 4 and (image[..., 3] == 255).all():
        image = image[..., :3]
    same = image[:, 1:] == image[:, :-1]
    is_chart = bool((same.all(-1) if same.ndim == 3 else same).mean() > _SMOOTH)
    lossless = _QUALITY if not is_chart else 101  # OpenCV: above 100 is lossless
    good, webp = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, lossless])
    kind, data = ("webp", webp.tobytes()) if good and 2 * len(webp) <= len(png) else ("png", png)
    height, width = image.shape[:2]
    return EmbeddedImage(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height, is_chart)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cxr.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code_spans": _code_spans,
        "kind": _kind,
        "numeric": _numeric,
        "number": number,
        "image": lambda picture: embedded(storage.read_bytes(picture.uri)),
    }
    return environment


def _code_spans(text: str) -> Markup:
    """Escaped text, in which `code` is set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _kind(block: Block) -> str:
    kinds: dict[type[Any], str] = {Table: "table", Picture: "picture", Gallery: "gallery", Details: "details"}
    return kinds.get(type(block), "text")


def _numeric(table: Table) -> list[bool]:
    """Whether the cells of each column are numbers, where they are not empty."""
    columns = [all(map(_NUMBER.match, filter(None, column))) for column in zip(*table.rows, strict=True)]
    return columns or [False] * len(table.head)


def _digest(style: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}"
