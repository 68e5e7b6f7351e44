"""What a study compares: one set of settings, and an archive for all recipes or one for each."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import WorkerCrashedError

from cxr.errors import ClusterError, UserError
from cxr.families.align import AlignRecipe
from cxr.training import sweep
from cxr.training.options import RunOptions
from cxr.training.sweep import RUN_CPU, RunProgress, _check_same, _resources

BASE = AlignRecipe()


def test_each_recipe_may_have_an_archive_of_its_own(tmp_path: Path) -> None:
    out = str(tmp_path)
    _check_same({"a": BASE, "b": BASE}, {"a": "/data", "b": "/cropped"}, out)
    _check_same({"a": BASE}, "/data", out)
    with pytest.raises(UserError, match="b: archive was /cropped, is /data"):
        _check_same({"a": BASE, "b": BASE}, "/data", out)
    _check_same({"c": BASE}, "/other", out)


def test_one_worker_trains_in_the_process_of_its_run() -> None:
    one, two = (_resources(RunOptions(device="cpu", workers=workers)) for workers in ("1", "2"))
    assert one == {"num_cpus": RunOptions().resources_per_worker["CPU"], "num_gpus": 0}
    assert two == {"num_cpus": RUN_CPU}


@pytest.mark.parametrize("goes_on", [True, False])
def test_the_death_of_a_process_ends_one_run_or_the_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], goes_on: bool
) -> None:
    def get(_: object) -> None:
        raise WorkerCrashedError

    monkeypatch.setattr(sweep.ray, "wait", lambda runs, **_: (runs[:1], runs[1:]))
    monkeypatch.setattr(sweep.ray, "get", get)
    running = {"run": "a/seed-0", "other": "a/seed-1"}
    if goes_on:
        assert sweep._wait(running, continue_on_failure=True) == "a/seed-0"
        assert "continuing without it: its process died (WorkerCrashedError)" in capsys.readouterr().out
    else:
        with pytest.raises(ClusterError, match="a/seed-0: its process died more often"):
            sweep._wait(running, continue_on_failure=False)


def test_after_each_run_the_time_of_the_others_is_estimated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now)
    progress = RunProgress(5, at_once=2)
    progress.start("a")
    progress.start("b")
    now = 100
    progress.finish("a")  # b has taken as long; three have not begun
    progress.start("c")
    now = 140
    progress.finish("b")  # c has 80 s to go; two have not begun
    progress.start("d")
    now = 220
    progress.finish("c")
    progress.start("e")
    progress.finish("d")  # e has just begun
    progress.finish("e")
    assert capsys.readouterr().out.splitlines() == [
        "1 of 5 runs have ended, 2 min 30 s left",
        "2 of 5 runs have ended, 2 min 40 s left",
        "3 of 5 runs have ended, 1 min 20 s left",
        "4 of 5 runs have ended, 1 min 50 s left",
        "5 of 5 runs have ended",
    ]
