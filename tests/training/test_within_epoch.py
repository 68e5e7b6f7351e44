"""A run that resumes within an epoch equals an undisturbed one, bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cxr import schema
from cxr.data.batch import Batch
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.families.base import Communicator, Recipe, SingleProcess
from cxr.training import within_epoch
from cxr.training.distributed import ProcessGroup
from cxr.training.engine import Engine, EpochSoFar
from cxr.training.run_log import IN_PROGRESS, RunLog, is_within_epoch, read_in_progress, read_metrics
from cxr.training.session import InProcessSession, RayTrainSession
from cxr.training.within_epoch import WithinEpoch, continue_within, state_within
from cxr.training.worker import train_in_process
from tests.families.test_recipes import SMALL, some_batches
from tests.made_shards import write_shards
from tests.two_workers import TwoWorkers

STEPS, INTERRUPTED = 6, 3
CHANGES: dict[str, dict[str, Any]] = {
    "align": {"target": "structure"},
    "aecnn": {"data_echo_factor": 3},
    "classify": {"accumulate": 2, "ema": 0.9},
}


class StoppedError(Exception):
    """Ends a run after its state has been saved."""


class SaveOnce:
    """Asks for a checkpoint at every check; keeps the first state from `step` on, and ends the run."""

    def __init__(self, engine: Engine, step: int) -> None:
        self.engine, self.step = engine, step
        self.saved: dict[str, Any] = {}

    def due(self) -> bool:
        return True

    def save(self, so_far: EpochSoFar) -> None:
        if so_far.steps < self.step:
            return
        engine = self.engine
        within = state_within(engine, so_far, engine.workers)
        state = {"engine": engine.state(), "task": checkpoint.task_state(engine.task), "within": within}
        stored = io.BytesIO()
        torch.save(state, stored)
        stored.seek(0)
        self.saved = torch.load(stored, weights_only=True)
        raise StoppedError


def batches(workers: Communicator) -> Iterator[Batch]:
    """Batches that differ; on two workers, each has its own images."""
    for step, batch in enumerate(some_batches(STEPS)):
        shift = 17 * step + 5 * workers.rank
        yield batch | {schema.PIXELS: batch[schema.PIXELS].roll(shift, 1)}


def engine_of(recipe: Recipe, workers: Communicator) -> Engine:
    torch.manual_seed(0)
    task = recipe.task(recipe.network(schema.FINDINGS))
    return Engine(task, recipe, workers, steps_per_epoch=STEPS, device=torch.device("cpu"), check_every=1)


def outcome(engine: Engine, means: dict[str, float]) -> dict[str, Any]:
    engine.task.end_epoch(engine.workers)
    state = {name: value.clone() for name, value in engine.task.state_dict().items()}
    shipped = {f"shipped.{name}": value.clone() for name, value in engine.shipped().state_dict().items()}
    return {"means": means, "next": torch.rand(3), **state, **shipped}


def straight(recipe: Recipe, workers: Communicator) -> dict[str, Any]:
    engine = engine_of(recipe, workers)
    torch.manual_seed(7 + workers.rank)
    return outcome(engine, engine.epoch(batches(workers)))


def interrupted(recipe: Recipe, workers: Communicator) -> dict[str, Any]:
    engine = engine_of(recipe, workers)
    torch.manual_seed(7 + workers.rank)
    saver = SaveOnce(engine, INTERRUPTED)
    with pytest.raises(StoppedError):
        engine.epoch(batches(workers), checkpoints=saver)
    saved = [saver.saved]
    if workers.size > 1:
        dist.broadcast_object_list(saved)  # only the first worker's is stored
    resumed = engine_of(recipe, workers)
    checkpoint.restore_task_state(resumed.task, saved[0]["task"])
    resumed.restore(saved[0]["engine"])
    torch.manual_seed(7 + workers.rank)
    so_far = continue_within(resumed, saved[0]["within"], workers)
    assert so_far.steps in (3, 4), "after the first step from the third on at which no batch or gradient is in use"
    rest = islice(batches(workers), resumed.unneeded_batches(so_far), None)
    return outcome(resumed, resumed.epoch(rest, so_far))


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["means"] == other["means"]
    assert one.keys() == other.keys()
    differ = [name for name in one if name != "means" and not torch.equal(one[name], other[name])]
    assert not differ


QUICK = ("align", "classify", "detect")  # with sums of an epoch, accumulated gradients, a window of partner images


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_the_rest_of_an_epoch_is_the_same_in_every_family(family: str) -> None:
    recipe = SMALL[family].replace(**CHANGES.get(family, {}))
    assert_equal(straight(recipe, SingleProcess()), interrupted(recipe, SingleProcess()))


def on_two(rank: int, how: str) -> dict[str, Any]:
    recipe = SMALL["classify"].replace(batch_size=8)
    return {"straight": straight, "interrupted": interrupted}[how](recipe, ProcessGroup())


def test_each_worker_continues_with_its_own_statistics_and_random_numbers(two_workers: TwoWorkers) -> None:
    undisturbed = two_workers.run(on_two, "straight")
    for one, other in zip(undisturbed, two_workers.run(on_two, "interrupted"), strict=True):
        assert_equal(one, other)
    assert not torch.equal(undisturbed[0]["next"], undisturbed[1]["next"])


def test_another_number_of_workers_shares_what_was_summed() -> None:
    recipe = SMALL["align"].replace(target="structure")
    engine = engine_of(recipe, SingleProcess())
    saver = SaveOnce(engine, INTERRUPTED)
    with pytest.raises(StoppedError):
        engine.epoch(batches(SingleProcess()), checkpoints=saver)
    within = saver.saved["within"]
    of_two = within | {"workers": {name: torch.cat([rows, rows]) for name, rows in within["workers"].items()}}
    so_far = continue_within(engine, of_two, SingleProcess())
    assert so_far.images == 2 * INTERRUPTED * 4
    assert so_far.steps == INTERRUPTED
    torch.testing.assert_close(torch.stack([*so_far.sums.values()]), within["workers"]["sums"][0])
    count = dict(engine.task.named_buffers())["_count"]
    assert count.item() == 2 * 2 * INTERRUPTED * 4, "two warps of each image"


def test_values_are_joined_on_the_device_of_training_even_if_there_are_none() -> None:
    """GPUs exchange only what is on them."""
    assert within_epoch._joined([], torch.device("meta")).is_meta


class EndsWithinEpoch(InProcessSession):
    """Ends the process, so to speak, after the third checkpoint within an epoch."""

    saved = 0

    def report(self, metrics: dict[str, Any], folder: str | None, name: str) -> None:
        super().report(metrics, folder, name)
        self.saved += is_within_epoch(metrics)
        if self.saved == 3:
            raise StoppedError


def test_a_run_of_shards_resumes_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.training.engine.CHECK_SECONDS", 1e-9)  # check after every step
    made = write_shards(tmp_path / "shards", {"train": 40, "val": 8})
    recipe = AlignRecipe(size=32, backbone="conv3", batch_size=8, epochs=2, lungs=False, target="structure")
    # A window of 16 images, so that the order depends on what has been read.
    data = {"shards": made, "cache_bytes": 16 * 32 * 32}
    config = {"recipe": recipe.to_dict(), "findings": list(schema.FINDINGS), "data": data, "threads": 1}
    config |= {"compile": False, "checkpoint_seconds": 1e-9}

    def session(out: str, kind: type[InProcessSession] = InProcessSession) -> InProcessSession:
        return kind(out, "train", recipe.monitor, recipe.mode, 2, [RunLog(out, "train", recipe.monitor)])

    plain, disturbed = str(tmp_path / "plain"), str(tmp_path / "disturbed")
    train_in_process(config | {"checkpoint_seconds": 0.0}, session(plain))
    with pytest.raises(StoppedError):
        train_in_process(config, session(disturbed, EndsWithinEpoch))
    assert read_metrics(disturbed) == []
    row = read_in_progress(disturbed)
    assert row is not None
    assert (row["step"], row["steps"], row["checkpoint"]) == (3, 5, "epoch_0000_step_000003")
    assert [path.name for path in (tmp_path / "disturbed/train").iterdir()] == [row["checkpoint"]]
    train_in_process(config, session(disturbed))
    rows = [read_metrics(out) for out in (plain, disturbed)]
    timed = ("seconds", "images_per_s")
    without_time = [
        [{k: v for k, v in row.items() if k not in timed and not k.startswith("time/")} for row in of] for of in rows
    ]
    assert json.dumps(without_time[0]) == json.dumps(without_time[1])
    assert {path.name for path in (tmp_path / "disturbed/train").iterdir()} == {"epoch_0001", "epoch_0002"}
    assert not (tmp_path / "disturbed" / IN_PROGRESS).exists()
    one, other = (checkpoint.load(f"{out}/train/epoch_0002").network.state_dict() for out in (plain, disturbed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_is_due_after_some_time_and_upon_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Any] = [None]
    now = [0.0]
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: lost[0])
    monkeypatch.setattr(within_epoch.time, "monotonic", lambda: now[0])
    never = WithinEpoch(RayTrainSession(), 0.0, lambda so_far: None, _last=0.0)
    timed = WithinEpoch(RayTrainSession(), 60.0, lambda so_far: None, _last=0.0)
    assert [never.due(), timed.due()] == [False, False]
    now[0] = 60.0
    assert timed.due()
    timed.save(EpochSoFar())
    assert [never.due(), timed.due()] == [False, False]
    lost[0] = SimpleNamespace(preempted_node_ids=["a"])
    assert [never.due(), timed.due()] == [True, True]
    assert [never.due(), timed.due()] == [False, False], "one checkpoint for one notice"
    lost[0] = SimpleNamespace(preempted_node_ids=["a", "b"])
    assert never.due()
