"""The report as one HTML page: self-contained, escaped, and with the same content as the Markdown."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from cxr.reporting.figures import new_figure
from cxr.reporting.html_page import embedded, html_page
from cxr.reporting.page import Details, KeyFigure, Picture, Report, Section, save_picture, write_report
from cxr.reporting.tables import Table

HOSTILE = '<script>alert("1")</script> & "Mass"'


class Page(HTMLParser):
    """Collects the tags with their attributes, and the text of a page; raises on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    figure = new_figure(1, 1)
    figure.subplots().plot([0, 1])
    return save_picture(figure, str(tmp_path / "pictures"), "line.png", "A line.")


def test_pictures_are_embedded_and_nothing_is_loaded_from_elsewhere(picture: Picture, tmp_path: Path) -> None:
    uris = write_report(str(tmp_path), Report("Title", "Lead.", [Section("One", ["Text.", picture])]))
    page = Page(Path(uris["page"]).read_text())
    (image,) = page.of("img")
    kind, data = (image["src"] or "").split(";base64,")
    assert kind in ("data:image/png", "data:image/webp")
    shown, written = (
        cv2.imdecode(np.frombuffer(each, np.uint8), cv2.IMREAD_COLOR)
        for each in (base64.b64decode(data), Path(picture.uri).read_bytes())
    )
    np.testing.assert_array_equal(shown, written)
    assert image["alt"] == "A line."
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert {attributes.get("href", "#")[:1] for _, attributes in page.tags} == {"#"}  # pyright: ignore[reportOptionalSubscript]
    assert "url(" not in Path(uris["page"]).read_text()
    assert (
        Path(uris["report"]).read_text() == "# Title\n\nLead.\n\n## One\n\nText.\n\n![A line.](pictures/line.png)\n"
    )


def test_text_from_files_is_escaped_everywhere(picture: Picture) -> None:
    table = Table([HOSTILE], [[HOSTILE]])
    blocks = [HOSTILE, table, Picture(picture.uri, HOSTILE)]
    page = Page(html_page(Report(HOSTILE, HOSTILE, [Section(HOSTILE, blocks), Section("Two", [])])))
    assert not page.of("script")
    assert page.of("img")[0]["alt"] == HOSTILE
    assert page.text.count(HOSTILE) == 9, "title, heading, lead, link, section, paragraph, two cells, caption"


def test_only_columns_of_numbers_are_right_aligned() -> None:
    numbers = ["0.812 (0.790 to 0.831)", "1,234", "12.5 %", "–", "< 0.001", "-0.01", ""]
    table = Table(["finding", "value", "images"], [["Mass", number, "3 of 4"] for number in numbers])
    page = Page(html_page(Report("", "", [Section("", [table])])))
    heads, cells = page.of("th"), page.of("td")
    assert [cell.get("class") for cell in heads[:3]] == [None, "number", None]
    assert [(cell.get("scope"), cell.get("class")) for cell in heads[3:]] == [("row", None)] * len(numbers)
    assert [cell.get("class") for cell in cells] == ["number", None] * len(numbers)


def test_code_in_a_paragraph_is_set_as_code() -> None:
    page = Page(html_page(Report("", "", [Section("", ["See `images.csv` & `<b>`."])])))
    assert len(page.of("code")) == 2
    assert "<b>" in page.text


def test_the_page_can_be_used_with_a_keyboard_and_a_screen_reader(picture: Picture, tmp_path: Path) -> None:
    wide = Table([f"column {n}" for n in range(9)], [["a", *["1"] * 8]], "What the table shows.")
    sections = [Section("One", ["Text.", wide, picture, Details("More", [wide, picture])]), Section("Two", [wide])]
    figures = [KeyFigure("auroc", "AUROC", 0.5, 0.4, 0.6, "An explanation.")]
    part = Report("Part", "Lead.", sections, figures)
    page = Page(html_page(Report("Title", "Lead.", sections, figures, {"Model": "a"}, [part], sections)))
    assert page.of("html")[0]["lang"] == "en"
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.of(landmark)) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels == [1, 2, 2, 2, 3, 3, 2, 2]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    targets = [(attributes["href"] or "").removeprefix("#") for attributes in page.of("a")]
    assert set(targets) <= set(ids), "every link leads somewhere"
    assert page.tags[[tag for tag, _ in page.tags].index("a")][1]["href"] == "#content", (
        "the first link skips the rest"
    )
    assert all(image["alt"] and image["width"] and image["height"] for image in page.of("img"))
    assert {cell["scope"] for cell in page.of("th")} == {"row", "col"}
    assert len(page.of("caption")) == len(page.of("table"))
    named = {value for _, attributes in page.tags if (value := attributes.get("aria-labelledby"))}
    assert named <= set(ids)


def test_the_policy_allows_the_style_of_the_page_and_nothing_else() -> None:
    text = html_page(Report("", "", []))
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in Page(text).of("meta") if "http-equiv" in meta)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    expected = {"default-src": "'none'", "img-src": "data:", "style-src": f"'sha256-{digest}'"}
    assert rules == expected | {"base-uri": "'none'", "form-action": "'none'"}
    assert not re.search(r" style=|<script|https?:", text)


def test_xrays_are_stored_in_half_of_their_png_or_less(tmp_path: Path) -> None:
    """Charts stay exact; X-rays may change a little."""
    rng = np.random.default_rng(0)
    xray = cv2.GaussianBlur(rng.normal(128, 60, (256, 256)), (0, 0), 3) + rng.normal(0, 3, (256, 256))
    xray = np.clip(xray, 0, 255).astype(np.uint8)
    png = cv2.imencode(".png", xray)[1].tobytes()
    shown = embedded(png)
    assert (shown.width, shown.height, shown.is_chart) == (256, 256, False)
    data = base64.b64decode(shown.src.removeprefix("data:image/webp;base64,"))
    assert len(data) <= len(png) / 2
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert decoded is not None
    assert np.abs(decoded.astype(float) - xray).mean() < 4
    with pytest.raises(ValueError, match="expected a PNG file"):
        embedded(b"nothing")
