"""fit() on a local cluster: dying workers, resuming, two workers, raw archives, clear errors."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from torch import Tensor

from cxr import storage
from cxr.data.ingest import ingest
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files
from cxr.families.align import AlignRecipe
from cxr.phantom.archive import write_phantom
from cxr.schema import PixelFormat
from cxr.training.fit import TrainingStoppedError, fit
from cxr.training.options import RunOptions
from cxr.training.run_log import read_metrics
from tests.made_shards import write_shards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RECIPE = AlignRecipe(size=32, epochs=2, batch_size=8, backbone="conv3", lungs=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("fit") / "shards", {"train": 32, "val": 9}, size=32)


def weights(uri: str) -> dict[str, Tensor]:
    return checkpoint.load(uri).network.state_dict()


def kill_a_worker_after(out: str, epoch: int) -> None:
    """Kill one training process, hard, once the run has recorded `epoch`."""
    while not any(row["epoch"] >= epoch for row in read_metrics(out)):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            return


@pytest.mark.slow
def test_a_run_whose_worker_was_killed_ends_like_an_uninterrupted_one(made: str, tmp_path: Path) -> None:
    recipe = RECIPE.replace(epochs=6)
    straight = fit(recipe, made, str(tmp_path / "straight"), in_process=True)
    disturbed = str(tmp_path / "disturbed")
    killer = threading.Thread(target=kill_a_worker_after, args=(disturbed, 2), daemon=True)
    killer.start()
    resumed = fit(recipe, made, disturbed, RunOptions(max_failures=1))
    killer.join(5)
    assert not killer.is_alive(), "no worker was killed"
    assert [row["epoch"] for row in read_metrics(disturbed)] == [1, 2, 3, 4, 5, 6]
    assert resumed.metrics == pytest.approx(straight.metrics, abs=1e-3, nan_ok=True)
    one, other = weights(straight.checkpoint), weights(resumed.checkpoint)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-3


def test_two_workers_end_with_one_network_and_a_finished_run_continues(made: str, tmp_path: Path) -> None:
    out = str(tmp_path / "two")
    first = fit(RECIPE, made, out, RunOptions(workers=2))
    assert first.epochs == 2
    assert [row["workers"] for row in read_metrics(out)] == [2, 2]
    with pytest.raises(UserError, match="already contains a run: use --resume"):
        fit(RECIPE, made, out)
    with pytest.raises(UserError, match=r"lr was 0.002, is 0.5"):
        fit(RECIPE.replace(epochs=3, lr=0.5), made, out, resume=True)
    longer = fit(RECIPE.replace(epochs=3), made, out, resume=True, in_process=True)
    assert longer.epochs == 3


@pytest.mark.slow
def test_a_raw_archive_trains_on_the_images_that_its_shards_have(tmp_path: Path) -> None:
    archive, recipe = str(tmp_path / "archive"), RECIPE.replace(epochs=1)
    write_phantom(archive, 48, size=64)
    made = ingest(archive, str(tmp_path / "shards"), pixels=PixelFormat(recipe.size))
    assert made.counts["val"] > 1
    raw = fit(recipe, archive, str(tmp_path / "raw"), RunOptions(cpus_per_worker=0.5))
    stored = fit(recipe, made.shards, str(tmp_path / "stored"), in_process=True)
    assert raw.epochs == stored.epochs == 1
    for fitted in (raw, stored):
        data = checkpoint_files.read_about(fitted.checkpoint)["data"]
        assert data["source"] == "chestxray14", "the layout of phantoms"
        assert {split: data["images"][split] for split in ("train", "val")} == {
            split: made.counts[split] for split in ("train", "val")
        }
        assert "X-rays in the layout of chestxray14." in storage.read_bytes(f"{fitted.checkpoint}/README.md").decode()
    for name in ("group_correlation_before", "pixel_std_before"):  # of all validation images, as they are
        assert raw.metrics[name] == pytest.approx(stored.metrics[name], rel=1e-4)
    assert 0 < read_metrics(str(tmp_path / "raw"))[0]["train/loss"] < 10


def test_a_loss_that_explodes_is_named(made: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError, match="became NaN or infinite"):
        fit(RECIPE.replace(pixel_weight=1e300), made, str(tmp_path / "exploded"), in_process=True)


def test_a_network_larger_than_the_shards_is_rejected(made: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected stored images of at least size=64 px, got 32 px"):
        fit(RECIPE.replace(size=64), made, str(tmp_path / "large"))


def test_requests_beyond_the_cluster_are_rejected(made: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 CPUs: too few for a run of 4 workers"):
        fit(RECIPE, made, str(tmp_path / "many"), RunOptions(workers=4))
    with pytest.raises(UserError, match="cannot be shared equally by 3 workers"):
        fit(RECIPE, made, str(tmp_path / "odd"), RunOptions(workers=3))


def test_work_that_reserves_no_gpu_sees_none() -> None:
    @ray.remote
    def visible() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert ray.get(visible.remote()) == ""


def test_resuming_without_a_run_is_rejected(made: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no run to resume"):
        fit(RECIPE, made, str(tmp_path / "empty"), resume=True)
