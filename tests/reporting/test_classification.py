"""Tables and pictures of classifiers show each finding, measured or not."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from cxr.metrics import classification
from cxr.metrics.classification import ClassificationSummary
from cxr.reporting import classification as tables
from cxr.reporting import classification_pictures as pictures
from cxr.reporting.tables import csv_text, interval, markdown, number

FINDINGS = ("Mass", "Pleural_Thickening", "Hernia")
Made = tuple[ClassificationSummary, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def made() -> Made:
    """The second finding is easier than the first, of the third there is no positive."""
    rng = np.random.default_rng(0)
    labels = (rng.random((120, 3)) < (0.4, 0.4, 0)).astype(np.int8)
    scores = rng.uniform(0, 0.6, labels.shape) + labels * (0.1, 0.4, 0)
    predicted_positive = scores >= 0.4
    summary = classification.summarize(scores, labels, predicted_positive, np.arange(120), FINDINGS, resamples=100)
    return summary, scores, labels, predicted_positive


def test_the_table_has_a_line_a_finding(made: Made) -> None:
    summary = made[0]
    lines = tables.summary_table(summary).markdown().splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [line[0] for line in cells] == ["finding", "---".ljust(18, "-"), *FINDINGS, "mean"]
    mass = summary.rows[0]
    assert cells[2][1] == f"{mass.auroc:.3f} ({mass.auroc_low:.3f} to {mass.auroc_high:.3f})"
    assert cells[4][1:3] == ["–", "–"]
    assert cells[4][-1] == "no positive among 120 images"
    assert "sens. at spec. 0.9" in cells[0]


def test_text_of_tables() -> None:
    assert markdown(["a"], [["x\r\ny\nz"]]) == "| a     |\n| ----- |\n| x y z |\n"
    assert markdown(["a", "b"], [["x|y", ""]]) == "| a    | b   |\n| ---- | --- |\n| x\\|y |     |\n"
    rows = [{"a": 1, "b": float("nan")}, {"a": 'say "x", y', "b": 0.25}]
    assert list(csv.DictReader(csv_text(rows).splitlines())) == [
        {"a": "1", "b": ""},
        {"a": 'say "x", y', "b": "0.25"},
    ]
    assert [number(0.12345), number(float("nan")), interval(0.5, float("nan"), 1)] == ["0.123", "–", "0.500"]
    assert interval(0.1, -0.0001, 0.2) == "0.100 (0.000 to 0.200)"
    assert [tables.probability(p) for p in (float("nan"), 0.0001, 0.04)] == ["–", "< 0.001", "0.040"]


def test_comparison_ends_with_the_mean(made: Made, tmp_path: Path) -> None:
    _, scores, labels, _ = made
    others = np.clip(scores - 0.1 * labels, 0, 1)
    tested = classification.delong(scores, others, labels)
    gain = classification.paired_gain(scores, others, labels, np.arange(120), resamples=100)
    last = tables.comparison_table(FINDINGS, tested, gain).markdown().splitlines()[-1]
    assert interval(gain.mean, gain.mean_low, gain.mean_high) in last
    written = tables.write_comparison(FINDINGS, tested, gain, str(tmp_path))
    rows = list(csv.DictReader(Path(written).read_text().splitlines()))
    assert float(rows[0]["p"]) == pytest.approx(tested.p[0])
    assert float(rows[3]["difference"]) == pytest.approx(gain.mean)
    assert float(rows[3]["auroc"]) == pytest.approx(np.nanmean(tested.auroc))


def test_pictures_of_all_findings_are_written(made: Made, tmp_path: Path) -> None:
    uris = [picture.uri for picture in pictures.write_pictures(*made, str(tmp_path))]
    assert [Path(uri).name for uri in uris] == ["auroc.png", "roc.png", "precision_recall.png", "reliability.png"]
    assert all(cv2.imread(uri) is not None for uri in uris)


def test_findings_without_a_curve_have_no_panel(made: Made) -> None:
    summary, scores, labels, predicted_positive = made
    panels = pictures.roc_figure(summary.rows, scores, labels, predicted_positive).axes
    assert [ax.get_title().partition("\n")[0] for ax in panels] == ["Mass", "Pleural Thickening"]
    assert [len(ax.lines) for ax in panels] == [3, 3]  # chance, the curve, the decisions
    points = np.asarray(panels[0].lines[2].get_xydata())
    mass = summary.rows[0]
    false_positive_rate = (predicted_positive[:, 0] & (labels[:, 0] == 0)).sum() / mass.negatives
    np.testing.assert_allclose(points, [[false_positive_rate, mass.recall]])


def test_intervals_are_drawn_best_first(made: Made) -> None:
    axes, beside = pictures.auroc_figure(made[0]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Pleural Thickening", "Mass", "mean"]
    assert beside.texts[-1].get_text() == "of 2 findings"
    best = made[0].rows[1]
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [best.auroc_low, best.auroc_high])


def test_without_metrics_no_picture_is_written(tmp_path: Path) -> None:
    scores, labels = np.full((4, 2), 0.5), np.zeros((4, 2), np.int8)
    summary = classification.summarize(scores, labels, scores > 0, np.arange(4), FINDINGS[:2], resamples=20)
    assert pictures.write_pictures(summary, scores, labels, scores > 0, str(tmp_path)) == []
