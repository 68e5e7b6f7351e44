"""The report as one HTML page: self-contained, escaped, and with the same content as the Markdown."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from cxr.reporting.figures import new_figure
from cxr.reporting.html_page import html_page
from cxr.reporting.page import Picture, Report, Section, save_picture, write_report
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
