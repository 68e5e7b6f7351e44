"""Scoring with pseudonyms: nothing that is written names a patient, wherever the archive names one. Without Ray."""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.cli.exports import export_coco, export_csv
from cxr.data.identity import COLUMNS, Identity, open_identity, read_crosswalk
from cxr.data.run_ledger import Increment
from cxr.evaluation.run import read_run, read_scores
from cxr.families import checkpoint
from cxr.families.aecnn import AecnnRecipe
from cxr.families.base import Recipe
from cxr.families.classify import ClassifyRecipe
from cxr.families.localize import LocalizeRecipe
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Panel
from cxr.inference.part_scorer import PartScorer
from cxr.inference.plan import plan_scoring
from cxr.sources.options import ReadOptions
from tests import planted
from tests.saved_checkpoint import save_untrained
from tests.written_runs import write_ledger


def scored(tmp_path: Path, recipe: Recipe, *, pseudonyms: bool = True) -> Path:
    """OUT of a run over the planted archive, made by the code that Ray's processes run."""
    out, archive, key = tmp_path / "out", str(tmp_path / "archive"), tmp_path / "secret" / "key.txt"
    count = planted.write_archive(Path(archive))
    storage.write_bytes(str(key), b"a secret of at least sixteen bytes")
    identity = open_identity(str(key), "", str(out), [archive]) if pseudonyms else None
    reading = identity.private(ReadOptions(source="dicom")) if identity else ReadOptions(source="dicom")
    saved = save_untrained(tmp_path / "model", recipe)
    plan = plan_scoring(archive, {"": checkpoint.load(saved)}, reading)
    assert sum(part.rows.num_rows for part in plan.parts) == count
    options = ScoreOptions(save_images=True, save_latents=isinstance(recipe, AecnnRecipe), save_embeddings=True)
    scorer = PartScorer(Panel.of([saved]), str(out), plan, options)
    reader = replace(plan.reader("warn"), identity=identity)
    for part in plan.parts:
        scorer(reader.labeled_rows(part.name, part.rows, part.rows.num_rows))
    settings = {"archive": "the archive", "checkpoint_sha256": "0" * 64, "recipe": recipe.to_dict()}
    images = sum(part.rows.num_rows for part in plan.parts)
    write_ledger(out, settings, Increment(0, len(plan.parts), images, new=images, changed=0))
    return out


pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
RECIPES = [
    AecnnRecipe(size=64, patch=16, width=8, backbone="resnet18", stem_stride=1),
    LocalizeRecipe(size=64, backbone="resnet18"),
    ClassifyRecipe(size=32),
]
WRITTEN = {"aecnn": {"latents", "decoded"}, "localize": {"stages"}, "classify": {"embeddings"}}  # besides scores


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.family)
def test_results_pictures_and_exports_name_nobody(
    recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = scored(tmp_path, recipe)
    run = read_run(str(out))
    export_csv(run, str(tmp_path / "export"))
    export_csv(run, str(tmp_path / "export"), "patient")
    if recipe.family == "localize":
        export_coco(run, str(tmp_path / "export"))
    expected = {"scores", "ledger.json", *WRITTEN[recipe.family]}
    assert expected <= {path.relative_to(out).parts[0] for path in out.rglob("*.*")}
    assert planted.leaks(out, tmp_path / "export", text="".join(capfd.readouterr())) == []


def test_the_search_for_names_finds_them_in_results_with_ids(tmp_path: Path) -> None:
    out = scored(tmp_path, RECIPES[1], pseudonyms=False)
    found = planted.leaks(out)
    assert {name.partition(" in ")[0] for name in found} >= {*planted.PATHS, "1.2.826.0.1.5550.1"}
    assert any("name of" in place and place.endswith(".png") for place in found)


def test_the_crosswalk_leads_from_scores_to_files(tmp_path: Path) -> None:
    out = scored(tmp_path, RECIPES[1])
    crosswalk = read_crosswalk(str(tmp_path / "secret" / "crosswalk")).table
    rows = {row["pseudonym_image_id"]: row for row in crosswalk.to_pylist()}
    scores = pa.concat_tables(read_scores(read_run(str(out)), [*COLUMNS, schema.ERROR])).to_pylist()
    assert {row[schema.IMAGE_ID] for row in scores} == set(rows)
    for row in scores:
        known = rows[row[schema.IMAGE_ID]]
        assert Path(known[schema.SOURCE_URI]).exists()
        assert all(known[f"pseudonym_{name}"] == row[name] for name in COLUMNS)
    assert {rows[row[schema.IMAGE_ID]][schema.STUDY_ID] for row in scores} >= {"1.2.826.0.1.5551.2"}
    assert sum(row[schema.ERROR] is None for row in scores) == 5


def test_what_goes_wrong_while_reading_is_reported_without_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(uri: str, **_: object) -> bytes:
        raise storage.StorageError(f"{uri}: the disk is gone")

    archive = tmp_path / "archive"
    planted.write_archive(archive)
    saved = save_untrained(tmp_path / "model", RECIPES[1])
    plan = plan_scoring(str(archive), {"": checkpoint.load(saved)}, ReadOptions(source="folder"))
    storage.write_bytes(str(tmp_path / "key.txt"), b"a secret of at least sixteen bytes")
    identity = open_identity(str(tmp_path / "key.txt"), "", str(tmp_path / "out"), [str(archive)])
    assert isinstance(identity, Identity)
    reader = replace(plan.reader("off"), identity=identity)
    monkeypatch.setattr(storage, "read_bytes", gone)
    with pytest.raises(storage.StorageError, match="the disk is gone") as error:
        reader.labeled_rows(plan.parts[0].name, plan.parts[0].rows, plan.parts[0].rows.num_rows)
    assert planted.leaks(text="".join(traceback.format_exception(error.value))) == []
