"""Clusters without room for a run: the message says what the cluster has and which options to give."""

from __future__ import annotations

import math

import pytest

from cxr.errors import UserError
from cxr.runtime import cluster, ray_private
from cxr.training.fit import room
from cxr.training.options import RunOptions


@pytest.fixture(autouse=True)
def machines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The machines of the cluster, each large enough unless a test replaces them."""
    machines = [{"CPU": 64.0, "GPU": 8.0}]
    nodes = [{"Alive": True, "Resources": machines[0]}, {"Alive": False, "Resources": {"CPU": 999.0}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_private, "machine_types", lambda: machines[1:])
    return machines


def test_a_worker_must_fit_on_one_machine(machines: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "total", {"CPU": 256, "GPU": 2}.__getitem__)
    wide = RunOptions(cpus_per_worker=32)
    machines[0].update(CPU=16, GPU=2)
    with pytest.raises(UserError, match="no machine of the cluster has 32 CPUs and a GPU for a worker: lower --cpus"):
        room(wide, raw=False)
    machines.append({"CPU": 64})  # which the cluster may start
    with pytest.raises(UserError, match="and a GPU"):
        room(wide, raw=False)
    assert room(RunOptions(cpus_per_worker=32, device="cpu"), raw=False) == 8


def test_the_smallest_machine_is_one_that_has_the_resource(machines: list[dict[str, float]]) -> None:
    assert (cluster.smallest("CPU"), cluster.smallest("TPU")) == (64, math.inf)
    machines += [{"GPU": 1.0}, {"CPU": 2.0}]  # which the cluster may start
    assert (cluster.smallest("CPU"), cluster.smallest("GPU")) == (2, 1)


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (
            0,
            {"device": "gpu"},
            "expected 1 GPUs, .* got a cluster with 0: use --device cpu, or use a cluster with GPUs",
        ),
        (2, {"device": "gpu", "workers": 4}, "expected 4 GPUs, .* with 2: use --workers 2, or --device cpu"),
        (2, {"workers": 4}, "expected 4 GPUs, .* with 2: use --workers 2, or --device cpu"),
        (0, {"workers": 9}, "the cluster has 8 CPUs: too few for a run of 9 workers .* Lower --workers or --cpus"),
        (9, {"workers": 9, "device": "gpu"}, "the cluster has 8 CPUs: too few for a run of 9 workers"),
    ],
)
def test_missing_resources_are_named_with_a_remedy(
    gpus: int, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "total", {"CPU": 8, "GPU": gpus}.__getitem__)
    with pytest.raises(UserError, match=message) as caught:
        room(RunOptions(**options), raw=False)
    assert ("Lower --workers" in str(caught.value)) is ("too few" in message)


def test_a_large_cluster_runs_several_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "total", {"CPU": 8, "GPU": 2}.__getitem__)
    assert room(RunOptions(device="cpu", workers=2), raw=False) == 4
    assert room(RunOptions(), raw=True) == 2
    assert room(RunOptions(device="cpu", workers="2:9"), raw=False) == 4, "it starts with two workers"


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [(1, 1, 1), ("8", 8, 8), ("2:8", 2, 8), (0, 0, 0), ("8:2", 0, 0), ("2:", 0, 0), ("many", 0, 0)],
)
def test_a_number_of_workers_or_a_range(given: int | str, least: int, most: int) -> None:
    if not least:
        with pytest.raises(UserError, match=f"workers: expected a number from 1, or two such as 2:8, .* got {given}"):
            RunOptions(workers=given)
        return
    options = RunOptions(workers=given)
    assert (options.min_workers, options.max_workers, options.is_elastic) == (least, most, least < most)


@pytest.mark.parametrize(
    ("given", "seconds"), [("0", 0), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("10", None), ("m", None)]
)
def test_times_between_checkpoints(given: str, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(UserError, match=f"checkpoint_every: expected a time such as .*, got {given}"):
            RunOptions(checkpoint_every=given)
    else:
        assert RunOptions(checkpoint_every=given).checkpoint_seconds == seconds
