"""Thresholds are re-chosen on local labels: the best ones, with intervals, and without ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cxr.cli.commands import thresholds
from cxr.errors import UserError
from cxr.evaluation.run import ReportOptions, read_run
from cxr.evaluation.thresholds import choose
from cxr.families.thresholds_file import ThresholdsFile
from cxr.metrics.classification import Criterion
from tests.evaluation.test_classification import labels_of, write_archive, write_run

IMAGES = 60
OPTIONS = ReportOptions(split="all", resamples=50)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    return write_archive(tmp_path / "archive", IMAGES, rejects=0)


def scored(tmp_path: Path, archive: str, noise: float = 0.3) -> str:
    rng = np.random.default_rng(1)
    values = np.clip(0.4 + 0.2 * labels_of(IMAGES).clip(0) + rng.normal(0, noise, (IMAGES, 3)), 0, 1).astype(
        np.float32
    )
    rows = {f"{i:03d}.png": p for i, p in enumerate(values.tolist())}
    return write_run(tmp_path / "run", rows, archive=archive)


@pytest.mark.parametrize(
    ("criterion", "share", "other"),
    [("sensitivity:0.9", "sensitivity", "specificity"), ("specificity:0.8", "specificity", "sensitivity")],
)
def test_a_threshold_reaches_its_minimum_and_a_stricter_one_would_not(
    tmp_path: Path, archive: str, criterion: str, share: str, other: str
) -> None:
    run, parsed = read_run(scored(tmp_path, archive)), Criterion.parse(criterion)
    mass, edema, hernia = choose(run, OPTIONS, parsed)
    labels = labels_of(IMAGES)
    values = np.array([json.loads(json.dumps(mass.value)), edema.value])
    assert (hernia.note, np.isnan(hernia.value)) == (f"no positive among {IMAGES} images", True)
    for chosen, f in ((mass, 0), (edema, 1)):
        assert getattr(chosen.point, share).value >= parsed.at_least
        assert chosen.low <= chosen.value <= chosen.high
        assert getattr(chosen.point, share).low <= getattr(chosen.point, share).value
        counts = chosen.point.true_positives + chosen.point.false_negatives
        assert counts == (labels[:, f] == 1).sum()
    assert 0 < getattr(mass.point, other).value < 1
    assert values[0] != values[1]


def test_the_file_holds_counts_and_no_ids(tmp_path: Path, archive: str) -> None:
    run = scored(tmp_path, archive)
    out = tmp_path / "out"
    result = thresholds.main(thresholds.Options(run=run, criterion="ppv:0.6", resamples=20, out=str(out)))
    text = Path(result["thresholds"]).read_text()
    assert str(tmp_path) not in text
    assert ".png" not in text
    file = ThresholdsFile.read(str(out))
    assert (file.family, file.checkpoint_sha256, file.criterion) == ("aecnn", "0", "ppv:0.6")
    assert set(file.thresholds) == {"Mass", "Edema"}
    counts = file.made_from["findings"]["Mass"]
    assert counts["positives"] + counts["negatives"] == IMAGES
    assert counts["patients"] == IMAGES // 2
    assert counts["ppv"]["value"] >= 0.6
    assert result["metrics"]["threshold/Mass"] == file.thresholds["Mass"]
    assert "Hernia" in file.made_from["left_out"]


@pytest.mark.parametrize("criterion", ["best", "sensitivity", "youden:0.9", "ppv:high", "ppv:0", "specificity:1.5"])
def test_wrong_criteria_are_explained(tmp_path: Path, archive: str, criterion: str) -> None:
    options = thresholds.Options(run=scored(tmp_path, archive), criterion=criterion, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--criterion: expected youden, f1, or a rule with a minimum"):
        thresholds.main(options)


def test_labels_of_one_kind_are_not_enough(tmp_path: Path, archive: str) -> None:
    rows: dict[str, list[float] | None] = {f"{i:03d}.png": [0.5] for i in range(IMAGES)}
    run = read_run(write_run(tmp_path / "run", rows, findings=("Hernia",), archive=archive))
    with pytest.raises(UserError, match="Hernia: no positive among 60 images"):
        choose(run, OPTIONS, Criterion())
