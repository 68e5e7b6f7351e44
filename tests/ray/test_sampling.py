"""Two archives, a fold and a share of positives, from raw files to a checkpoint, with two workers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cxr import schema
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import train_job
from cxr.data import shards
from cxr.families import RECIPES, checkpoint_files
from cxr.families.align import AlignRecipe
from cxr.phantom.archive import write_phantom
from cxr.training.options import RunOptions
from cxr.training.run_log import read_metrics
from cxr.training.worker import train_worker

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


class Sampled(AlignRecipe):
    """Sees fewer and fewer images with a pneumothorax."""

    mask_label = schema.PNEUMOTHORAX
    sampled_finding = schema.PNEUMOTHORAX

    def positive_fraction_of(self, epoch: int) -> float | None:
        return (0.75, 0.5)[epoch]


def train_sampled(config: dict[str, Any]) -> dict[str, Any]:
    """The function of a worker, with family `align` as a sampled family."""
    RECIPES[AlignRecipe.family] = f"{__name__}.Sampled"
    return train_worker(config)


def test_two_archives_train_one_fold_with_a_share_of_positives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("cxr.training.fit"), "train_worker", train_sampled)
    given = tuple(str(tmp_path / name) for name in "ab")
    for seed, archive in enumerate(given):
        write_phantom(archive, 24, size=64, seed=seed, findings=(schema.PNEUMOTHORAX,))
    recipe = Sampled(size=32, epochs=2, batch_size=4, backbone="conv3", lungs=False, folds=3, fold=1)
    out = str(tmp_path / "out")
    archives, run = ArchiveOptions(archive=given, stored_size=32), RunOptions(workers=2, cpus_per_worker=0.5)
    done = train_job(recipe, archives, run, out)
    info = shards.read_info(done["data"])
    assert sum(map(info.rows, schema.SPLITS)) == 48
    kept = checkpoint_files.read_about(done["checkpoint"])["recipe"]
    assert (kept["folds"], kept["fold"]) == (3, 1)
    rows = read_metrics(out)
    assert [row["workers"] for row in rows] == [2, 2]
    assert rows[-1]["lr"] == pytest.approx(0, abs=1e-9), "the schedule ends with the last of the steps announced"
