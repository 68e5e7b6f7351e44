"""A detector on two workers, one of which is killed; an ensemble that survives a failed member; scores of both."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.cli.ensembles import train_ensemble
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import ensure_shards
from cxr.evaluation.reports import report
from cxr.evaluation.run import ReportOptions
from cxr.families import checkpoint
from cxr.families.detect import DetectRecipe
from cxr.inference.score import score
from cxr.phantom.archive import write_phantom
from cxr.training.fit import fit
from cxr.training.options import RunOptions
from cxr.training.run_log import read_metrics
from tests.ray.test_fit import kill_a_worker_after, weights

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("ray_cluster"),
]
RECIPE = DetectRecipe(size=64, epochs=3, batch_size=8, close_mosaic=1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("detect") / "phantoms")
    write_phantom(folder, 60, size=64)
    return folder


@pytest.fixture(scope="module")
def made(archive: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return ensure_shards(ArchiveOptions(archive=(archive,), stored_size=64), str(tmp_path_factory.mktemp("made")))


def test_a_run_whose_worker_was_killed_ends_like_an_uninterrupted_one(made: str, tmp_path: Path) -> None:
    straight = fit(RECIPE, made, str(tmp_path / "straight"), RunOptions(workers=2))
    disturbed = str(tmp_path / "disturbed")
    killer = threading.Thread(target=kill_a_worker_after, args=(disturbed, 1), daemon=True)
    killer.start()
    resumed = fit(RECIPE, made, disturbed, RunOptions(workers=2, max_failures=1))
    killer.join(5)
    assert not killer.is_alive(), "no worker was killed"
    assert [row["epoch"] for row in read_metrics(disturbed)] == [1, 2, 3]
    assert resumed.metrics == pytest.approx(straight.metrics, abs=1e-2, nan_ok=True)
    last = (f"{out}/train/epoch_0003" for out in (tmp_path / "straight", disturbed))
    one, other = map(weights, last)
    assert max((one[name].float() - other[name].float()).abs().max().item() for name in one) < 1e-2


def test_the_remaining_members_form_one_checkpoint_that_scores(archive: str, made: str, tmp_path: Path) -> None:
    recipe = RECIPE.replace(epochs=1)
    changes = [
        {"seed": 0, "size": 64},
        {"seed": 1, "size": 32},
        {"seed": 2, "lr": 1e9, "clip": 0.0, "warmup": 0.0},  # its loss becomes infinite
    ]
    result = train_ensemble(recipe, changes, ArchiveOptions(archive=(made,)), RunOptions(), str(tmp_path / "out"))
    assert (list(result["members"]), result["failed"]) == (["member-0", "member-1"], ["member-2"])
    assert list(result["comparison"]["members"]) == ["member-0", "member-1"]
    kept = checkpoint.load(result["checkpoint"])
    assert [member["size"] for member in kept.recipe.to_dict()["members"]] == [64, 32]
    scored = score(archive, result["checkpoint"], str(tmp_path / "scores"))
    rows = pq.read_table(scored.scores)
    assert rows.num_rows == 60
    assert rows[schema.ERROR].null_count == 60
    assert {box["label"] for boxes in rows[schema.PRED_BOXES].to_pylist() for box in boxes} <= set(kept.findings)
    assert report(str(tmp_path / "scores"), ReportOptions(), str(tmp_path / "report"))["metrics"]
