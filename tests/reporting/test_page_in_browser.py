"""The report in headless Chromium: its numbers, its pictures, its contrast, and its layout on desktop and phone.

`_MEASURE` opens the page in frames of several widths and writes what it finds there as JSON. Without Chromium, the
tests are skipped; `test_page.py` examines the page's HTML.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cxr.evaluation import reports
from cxr.evaluation.run import ReportOptions
from cxr.reporting.figures import new_figure
from cxr.reporting.overlays import BoxPair, Overlay, save_overlays
from cxr.reporting.page import Details, KeyFigure, Picture, Report, Section, save_picture, write_report
from cxr.reporting.tables import Table
from tests.scored_runs import labeled_shards, write_panel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
DESKTOP, PHONE = 1280, 375  # px
DARK = "--blink-settings=preferredColorScheme=0"

_MEASURE = """<!doctype html><meta charset="utf-8"><pre id="measured"></pre><script>
const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
const luminance = color => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const [r, g, b] = color.slice(0, 3).map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b };
const background = (element, view) => {  // the nearest opaque one
  for (let e = element; e; e = e.parentElement) {
    const color = rgba(view.getComputedStyle(e).backgroundColor); if (color[3] === 1) return color }
  return [255, 255, 255, 1] };
const contrast = (element, view) => {
  const [a, b] = [rgba(view.getComputedStyle(element).color), background(element, view)].map(luminance);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) };
const measured = {}, widths = WIDTHS;
widths.forEach(width => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.style.border = 0; frame.src = "PAGE";
  frame.onload = () => {
    const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
    const of = name => [...page.querySelectorAll(name)];
    const texts = of("body *").filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
      && e.getClientRects().length);
    measured[width] = {
      client: root.clientWidth, scroll: root.scrollWidth,
      wide: of("main *").filter(e => !e.closest(".table") && e.getBoundingClientRect().right > width + 1).length,
      images: of("img").map(e => [e.naturalWidth, e.naturalHeight, e.getBoundingClientRect().width]),
      metrics: of("[data-metric]").map(e => [e.dataset.metric, e.dataset.value,
        e.querySelector(".value, dd").textContent, (e.querySelector(".interval") || {}).textContent || ""]),
      headings: of("h1, h2, h3, h4").map(e => Number(e.tagName[1])),
      contrast: Math.min(...texts.map(e => contrast(e, view))),
      font: view.getComputedStyle(page.body).fontFamily,
      background: view.getComputedStyle(page.body).backgroundColor };
    if (Object.keys(measured).length === widths.length)
      document.getElementById("measured").textContent = JSON.stringify(measured) };
  document.body.append(frame) });
</script>"""


def chromium(*options: str) -> str:
    """Run headless Chromium; what it prints."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def measure(page: Path, folder: Path, *options: str) -> dict[int, dict[str, Any]]:
    """What the page looks like at each width."""
    script = _MEASURE.replace("WIDTHS", json.dumps([DESKTOP, PHONE])).replace("PAGE", page.as_uri())
    (folder / "measure.html").write_text(script)
    uri = (folder / "measure.html").as_uri()
    dumped = chromium("--allow-file-access-from-files", "--virtual-time-budget=9000", *options, "--dump-dom", uri)
    found = re.search(r'<pre id="measured">(.+?)</pre>', dumped, re.DOTALL)
    assert found, dumped[-2000:]
    return {int(width): of for width, of in json.loads(html.unescape(found[1])).items()}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page with all kinds of blocks: a wide table, long words, a wide picture and single X-rays."""
    figure = new_figure(12, 3)
    figure.subplots().plot([0, 1])
    chart = save_picture(figure, str(tmp_path), "chart.png", "A wide chart.")
    noise = np.random.default_rng(0).random((300, 300))
    box = BoxPair(np.array([[20.0, 20, 90, 90]]), ["Mass"], np.array([[30.0, 30, 99, 99]]), ["Mass 0.87"])
    shown = {"worst": [Overlay(f"{'1.2.840.' * 9}{n}", "F1 0.10", noise, box) for n in range(4)]}
    wide = Table([f"column {n}" for n in range(30)], [["1.234"] * 30, ["mean", *["0.1"] * 29]], "A wide table.")
    lead = "x" * 300 + " `" + "y" * 300 + "`"
    report = Report(
        "A " + "long" * 60,
        lead,
        [
            Section("One", [lead, wide, chart, *save_overlays(shown, str(tmp_path), "boxes.png", "Examples.")]),
            Section("Two", [Details("More", [wide, Picture(chart.uri, "z" * 300)])]),
        ],
        figures=[
            KeyFigure("auroc", "AUROC", 0.8123, 0.79, 0.83, "An explanation."),
            KeyFigure("n", "N", 9, digits=0),
        ],
        facts={"archive": "s3://" + "bucket/" * 60},
        parts=[Report("Part", lead, [Section("Three", [wide, chart])])],
        closing=[Section("About", [Table(["", ""], [["sha", "f" * 200]])])],
    )
    return Path(write_report(str(tmp_path), report)["page"])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_on_a_phone_and_can_be_read(page: Path, tmp_path: Path, scheme: str) -> None:
    measured = measure(page, tmp_path, *([DARK] if scheme == "dark" else []))
    for width, of in measured.items():
        assert (of["client"], of["scroll"]) == (width, width), "no horizontal scrolling"
        assert of["wide"] == 0, "only tables scroll inside themselves"
        assert len(of["images"]) == 2 + 4 + 1
        assert all(natural > 0 and shown <= width for natural, _, shown in of["images"])
        assert of["contrast"] >= 4.5
        assert "sans-serif" in of["font"], "the style is not blocked by the policy"
        assert all(after <= before + 1 for before, after in zip(of["headings"], of["headings"][1:], strict=False))
    dark = measured[PHONE]["background"] != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


@pytest.mark.slow
def test_screenshots_on_desktop_and_phone_show_the_page(page: Path, tmp_path: Path) -> None:
    for width, columns in ((DESKTOP, 3), (PHONE, 1)):
        shot = tmp_path / f"{width}.png"
        chromium(f"--screenshot={shot}", f"--window-size={width},1600", page.as_uri())
        picture = cv2.imread(str(shot))
        assert picture is not None
        assert picture.shape == (1600, width, 3)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20 * columns, "it is not blank"
        margin = picture[:, -4:].reshape(-1, 3)
        assert (margin == margin[0]).all(), "nothing reaches the right edge"


@pytest.mark.slow
def test_the_numbers_on_the_page_are_those_of_the_result(tmp_path: Path) -> None:
    """A report about a panel of three checkpoints."""
    run = write_panel(tmp_path / "panel", labeled_shards(tmp_path / "shards"))
    result = reports.report(run, ReportOptions(resamples=10), str(tmp_path / "out"))
    metrics = result["metrics"]
    shown = measure(Path(result["page"]), tmp_path)[DESKTOP]["metrics"]
    names = [name for name, *_ in shown]
    assert len(set(names)) == len(names)
    assert {"strong/mean_auroc", "weak/mean_auroc", "strong/images", "masks/images_with_mask"} <= set(names)
    for name, value, text, interval in shown:
        assert float(value) == metrics[name]
        decimals = len(text.partition(".")[2])
        assert float(text.replace(",", "")) == pytest.approx(metrics[name], abs=0.51 * 10**-decimals)
        if interval:
            ends = [float(end) for end in re.findall(r"\d\.\d+", interval)]
            assert ends == pytest.approx([metrics[f"{name}_low"], metrics[f"{name}_high"]], abs=0.00051)
