"""Metrics by subgroup are those of its images alone; unknown values are a group, small groups have no figures."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.run import ReportOptions
from cxr.evaluation.subgroups import age_group
from cxr.metrics import classification
from tests.made_shards import write_shards
from tests.written_runs import set_settings, settings_of, write_scored

IMAGES, FINDINGS = 80, ("Mass", "Edema")
SEXES = ["F", "M", "F", None]  # by patient
AGES = [17.9, 18.0, 59.0, 80.0]
LABELS = (np.random.default_rng(0).random((IMAGES, 2)) < 0.5).astype(np.int8)
PROBABILITIES = np.random.default_rng(1).uniform(0.1, 0.6, (IMAGES, 2)).astype(np.float32) + np.float32(0.2) * LABELS


def patient(image: int) -> int:
    return image // 2


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A classifier's run over shards, in which two images belong to each patient; the last image has an error."""
    archive = write_shards(
        tmp_path / "shards",
        {"test": IMAGES},
        size=16,
        findings=FINDINGS,
        known=lambda _, number: {schema.LABELS: LABELS[number].tolist(), schema.PATIENT_ID: f"P{patient(number)}"},
    )
    rows: list[dict[str, Any]] = [
        {
            schema.IMAGE_ID: f"test-{number:04d}.png",
            schema.PATIENT_ID: f"P{patient(number)}",
            schema.SEX: SEXES[patient(number) % 4],
            schema.AGE_YEARS: AGES[patient(number) % 4],
            schema.VIEW: "AP" if number < 4 else "PA",
            schema.PROBABILITIES: PROBABILITIES[number].tolist(),
            schema.DECISIONS: (PROBABILITIES[number] >= 0.4).astype(int).tolist(),
        }
        for number in range(IMAGES)
    ]
    rows[-1] |= {schema.ERROR: "no image", schema.PROBABILITIES: None, schema.DECISIONS: None}
    fields = [(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8()))]
    columns = pa.schema([*schema.SCORES, *fields], metadata={schema.FINDINGS_KEY: json.dumps(FINDINGS)})
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": "classify"}}
    return write_scored(tmp_path / "run", settings, pa.Table.from_pylist(rows, columns))


def rows_of(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, str]]:
    rows = csv.DictReader(Path(result["subgroups"]).read_text().splitlines())
    return {(row["by"], row["group"], row["metric"]): row for row in rows}


def test_the_metrics_of_a_group_are_those_of_its_images_alone(run: str, tmp_path: Path) -> None:
    result = reports.report(run, ReportOptions(by="sex, age,view", resamples=40), str(tmp_path / "out"))
    rows = rows_of(result)
    groups = {(by, group) for by, group, _ in rows}
    assert groups == {
        ("", "all images"),
        *(("sex", name) for name in ("female", "male", "unknown")),
        *(("age", name) for name in ("0 to 17", "18 to 39", "40 to 59", "75 or older")),
        *(("view", name) for name in ("PA", "AP")),
    }
    women = [image for image in range(IMAGES - 1) if SEXES[patient(image) % 4] == "F"]
    alone = classification.summarize(
        PROBABILITIES[women],
        LABELS[women],
        PROBABILITIES[women] >= 0.4,
        np.array([f"P{patient(image)}" for image in women]),
        FINDINGS,
        resamples=40,
    )
    mean, edema = rows["sex", "female", "mean AUROC"], rows["sex", "female", "AUROC/Edema"]
    assert [float(mean[name]) for name in ("value", "low", "high")] == pytest.approx(
        [alone.mean.auroc, alone.mean.auroc_low, alone.mean.auroc_high]
    )
    assert (int(mean["images"]), int(mean["patients"])) == (len(women), len(women) // 2)
    assert float(edema["value"]) == pytest.approx(alone.rows[1].auroc)
    assert float(rows["sex", "female", "mean sensitivity"]["value"]) == pytest.approx(alone.mean.recall)
    assert float(rows["", "all images", "mean AUROC"]["value"]) == pytest.approx(result["metrics"]["mean_auroc"])
    assert int(rows["sex", "unknown", "mean AUROC"]["images"]) == 19, "an image has an error"
    assert rows["view", "AP", ""]["patients"] == "2", "too few patients for figures"
    page = Path(result["report"]).read_text()
    assert "pictures/subgroups.png" in page
    assert "| AP " in page


@pytest.mark.parametrize("named_by", ["image", "patient"])
def test_a_table_adds_groups(run: str, tmp_path: Path, named_by: str) -> None:
    """A blank or missing value, and values that contradict each other, are unknown."""
    sites = ["north" if patient(image) % 2 else "south" for image in range(IMAGES)]
    keys = [f"test-{image:04d}" if named_by == "image" else f"P{patient(image)}" for image in range(IMAGES)]
    lines = [f"{key};{site}" for key, site in zip(keys, sites, strict=True)]
    lines[0:2] = [f"{key};" for key in keys[0:2]]
    lines[2:4] = []
    lines.append(f"{keys[4]};elsewhere")
    (tmp_path / "groups.csv").write_text("\n".join([f"{named_by}_id;Site", *lines]))
    options = ReportOptions(by="site", groups=str(tmp_path / "groups.csv"), resamples=5)
    rows = rows_of(reports.report(run, options, str(tmp_path / "out")))
    assert {(group, row["images"]) for (by, group, _), row in rows.items() if by} == (
        {("north", "37"), ("south", "37"), ("unknown", "5")}
        if named_by == "image"
        else {("north", "37"), ("south", "36"), ("unknown", "6")}
    )


def test_the_ages_of_a_table_are_groups_as_it_names_them(run: str, tmp_path: Path) -> None:
    ages = ["old" if patient(image) % 4 else "young" for image in range(IMAGES)]
    lines = [f"test-{image:04d};{age}" for image, age in enumerate(ages)]
    (tmp_path / "groups.csv").write_text("\n".join(["image;age", *lines]))
    options = ReportOptions(by="age", groups=str(tmp_path / "groups.csv"), resamples=5)
    rows = rows_of(reports.report(run, options, str(tmp_path / "out")))
    assert {(group, row["images"]) for (by, group, _), row in rows.items() if by} == {("old", "59"), ("young", "20")}


@pytest.mark.parametrize(
    ("years", "group"),
    [(0.0, "0 to 17"), (59.9, "40 to 59"), (-1.0, "unknown"), (math.nan, "unknown"), (None, "unknown")],
)
def test_ages_that_cannot_be_are_unknown(years: float | None, group: str) -> None:
    assert age_group(years) == group


def test_wrong_columns_and_tables_are_explained(run: str, tmp_path: Path) -> None:
    table, out = tmp_path / "groups.csv", str(tmp_path / "out")
    table.write_text("image,site\nother.png,north\n")
    with pytest.raises(UserError, match=r"sex, age, view, modality, body_part, got 'device'.* with --groups"):
        reports.report(run, ReportOptions(by="sex,device"), out)
    with pytest.raises(UserError, match=r"columns of .*groups.csv \(image, site\), got 'device'"):
        reports.report(run, ReportOptions(by="device", groups=str(table)), out)
    with pytest.raises(UserError, match="expected rows about the images of the run, got none"):
        reports.report(run, ReportOptions(by="site", groups=str(table), resamples=2), out)
    table.write_text("what,site\nother.png,north\n")
    with pytest.raises(UserError, match="names images or patients"):
        reports.report(run, ReportOptions(by="site", groups=str(table), resamples=2), out)
    with pytest.raises(UserError, match="expected --by with --groups"):
        ReportOptions(groups=str(table))
    table.write_text("image,site\n" + "\n".join(f"test-{image:04d},{image}" for image in range(IMAGES)))
    with pytest.raises(UserError, match="expected at most 30 groups by site, got 79"):
        reports.report(run, ReportOptions(by="site", groups=str(table), resamples=2), out)


def test_without_ground_truth_the_shares_of_positive_images_are_by_subgroup(run: str, tmp_path: Path) -> None:
    (tmp_path / "unlabeled").mkdir()
    settings = settings_of(run)
    set_settings(run, settings | {"archive": [settings["archive"], str(tmp_path / "unlabeled")]})
    rows = rows_of(reports.report(run, ReportOptions(by="sex", resamples=5), str(tmp_path / "out")))
    positive = PROBABILITIES[:-1] >= 0.4
    assert float(rows["", "all images", "share of positive images"]["value"]) == pytest.approx(positive.any(1).mean())
    women = [image for image in range(IMAGES - 1) if SEXES[patient(image) % 4] == "F"]
    share = rows["sex", "female", "Share of positive images/Edema"]
    assert float(share["value"]) == pytest.approx(positive[women, 1].mean())
    assert float(share["low"]) <= float(share["value"]) <= float(share["high"])
