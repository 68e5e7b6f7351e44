"""Labels of the user's own tables in shards, in the training of a classifier, and in reports."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import ensure_shards
from cxr.data import shards
from cxr.data.shard_loader import ShardStream
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.run import ReportOptions
from cxr.families.localize import LocalizeRecipe
from cxr.phantom.archive import make_exam, png
from cxr.sources.options import Labeling
from tests.evaluation.test_classification import write_run

IMAGES = 12


def folder_of(tmp_path: Path, name: str) -> str:
    """A folder of phantoms without labels."""
    (tmp_path / name).mkdir()
    picture = png(make_exam(0, size=64).phantom.pixels)
    for number in range(IMAGES):
        (tmp_path / name / f"{name}{number:02d}.png").write_bytes(picture)
    return str(tmp_path / name)


def table(tmp_path: Path, name: str, *findings: str) -> str:
    """A table in which image `number` shows the finding at place `number % 3`, if there is one."""
    rows = [
        f"{name}{number:02d},{number // 2},{schema.SPLITS[number // 4]},"
        + ",".join(str(int(number % 3 == place)) for place in range(len(findings)))
        for number in range(IMAGES)
    ]
    file = tmp_path / f"{name}.csv"
    file.write_text("\n".join([f"file,patient,split,{','.join(findings)}", *rows]))
    return str(file)


def stored(uri: str) -> dict[str, list[int]]:
    """The labels in shards by image id."""
    info = shards.read_info(uri)
    columns = [schema.IMAGE_ID, schema.LABELS]
    read = [shards.read_rows(file, columns, info.findings) for files in info.parts.values() for file in files]
    return {row[schema.IMAGE_ID]: row[schema.LABELS] for row in pa.concat_tables(read).to_pylist()}


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_archives_with_different_findings_become_one(tmp_path: Path) -> None:
    tables = {"a": table(tmp_path, "a", "heart", "fluid"), "b": table(tmp_path, "b", "fluid", "mass", "scar")}
    made = []
    for name, labels in tables.items():
        options = ArchiveOptions(
            archive=(folder_of(tmp_path, name),), stored_size=32, labeling=Labeling(labels=labels)
        )
        made.append(ensure_shards(options, str(tmp_path / f"out-{name}")))
    assert storage.read_json(f"{made[0]}/{shards.ARCHIVE_FILE}")["labels"] == tables["a"]
    both = ArchiveOptions(archive=tuple(made))
    recipe = LocalizeRecipe(size=32, backbone="resnet18", cam_stages="last")
    out = check_inputs(recipe, both, str(tmp_path / "both")).out
    info = shards.read_info(ensure_shards(both, out))
    assert info.findings == ("heart", "fluid", "mass", "scar")
    labels = stored(info.uri)
    assert (labels["a00.png"], labels["a01.png"]) == ([1, 0, -1, -1], [0, 1, -1, -1])
    assert (labels["b00.png"], labels["b02.png"]) == ([-1, 1, 0, 0], [-1, 0, 0, 1])
    stream = ShardStream(info, "train", recipe.columns, batch_size=4)
    task = recipe.task(recipe.network(info.findings))
    losses = [task(task.augment(batch)) for batch in stream.train(0)]
    assert all(value.isfinite() for loss in losses for value in loss.values())


def test_a_report_uses_the_same_table(tmp_path: Path) -> None:
    archive, labels = folder_of(tmp_path, "a"), table(tmp_path, "a", "heart", "fluid")
    scores = {f"a{number:02d}.png": [0.9 if number % 3 == 0 else 0.1, 0.5] for number in range(IMAGES)}
    run = write_run(tmp_path / "run", scores, ("heart", "scar"), archive=archive)
    options = ReportOptions(split="all", resamples=20, labeling=Labeling(labels=labels))
    metrics = reports.report(run, options, str(tmp_path / "report"))["metrics"]
    assert (metrics["images"], metrics["patients"], metrics["auroc/heart"]) == (IMAGES, IMAGES // 2, 1)
    assert re.search(rf"\| labels +\| {labels} +\|", (tmp_path / "report" / "report.md").read_text())


def test_mistakes_are_reported_before_ray_starts(tmp_path: Path) -> None:
    archive, labels = folder_of(tmp_path, "a"), table(tmp_path, "b", "heart")
    for stream in (False, True):
        options = ArchiveOptions(archive=(archive,), stream=stream, labeling=Labeling(labels=labels))
        with pytest.raises(UserError, match=r"expected labels of the archive's 12 images, such as 'a00.png', got"):
            check_inputs(LocalizeRecipe(size=32), options, str(tmp_path / "out"))
