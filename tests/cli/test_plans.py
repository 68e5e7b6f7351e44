"""What a job would ask of a cluster and how long it would take, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cxr.cli.commands import COMMANDS, ingest, score
from cxr.cli.plans import Capacity, plan_of, say_plan
from cxr.errors import UserError
from cxr.runtime import console
from tests.made_shards import write_shards


def plan(command: str, *arguments: str) -> tuple[dict[str, Any], str]:
    return plan_of(COMMANDS[command].load().parse([*arguments, "--plan"]).job)


def test_a_training_on_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    asked = ["--plan-images", "112120", "--workers", "64", "--device", "gpu", "--batch-size", "512", "--epochs", "10"]
    values, text = plan("train classify", *asked, "--plan-cpus", "256", "--plan-gpus", "64", "--out", str(tmp_path))
    assert "64 training processes, each with 1 CPU and 1 GPU" in text
    assert "time       no estimate: add --images-per-second" in text
    assert values["steps"] == 112120 // 512
    assert values["workers"] == 64
    assert "seconds" not in values
    cluster = ["--plan-cpus", "256", "--plan-gpus", "64", "--images-per-second", "100"]
    values, text = plan("train classify", *asked, *cluster)
    assert values["epoch_seconds"] == pytest.approx(112120 / 6400)
    assert values["seconds"] == pytest.approx(10 * 112120 / 6400)
    assert "100 images/s (--images-per-second) per process" in text


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(UserError, match="expected 8 GPUs, one for each worker, got a cluster with 4"):
        plan("train classify", "--workers", "8", "--device", "gpu", "--plan-cpus", "64", "--plan-gpus", "4")
    with pytest.raises(UserError, match="the cluster has 4 CPUs: too few for a run of 8 workers"):
        plan("tune align", "--workers", "8", "--plan-cpus", "4", "--plan-gpus", "0")
    with pytest.raises(UserError, match="batch_size=32 cannot be shared equally by 5 workers"):
        plan("train classify", "--batch-size", "32", "--workers", "5", "--plan-cpus", "9", "--plan-gpus", "0")


def test_an_earlier_run_gives_the_rate_and_shards_their_images(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"train": 64, "val": 8})
    rows = [{"epoch": epoch, "images_per_s": 20.0 * epoch, "workers": 2} for epoch in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--archive", made, "--out", str(tmp_path), "--plan-cpus", "4", "--plan-gpus", "0"]
    values, text = plan("train align", *options, "--batch-size", "8", "--epochs", "3")
    assert (values["images"], values["steps"], values["seconds"]) == (64, 8, pytest.approx(3 * 64 / 20))
    assert "20 images/s (median of 3 epochs in" in text
    assert "disk       checkpoints only" in text


def test_trials_run_side_by_side() -> None:
    cluster = ["--plan-cpus", "4", "--plan-gpus", "0", "--plan-images", "1000", "--images-per-second", "10"]
    values, text = plan("tune align", "--trials", "10", "--epochs", "2", *cluster)
    assert values["runs_at_once"] == 4
    assert "10 trials, 4 at a time, each in 1 training process with 1 CPU" in text
    assert values["seconds"] == pytest.approx(1000 / 10 * 2 * 3), "three rounds of up to four trials"
    assert "10 trials of 2 epochs without early stopping, 4 at a time" in text
    values, _ = plan(
        "train classify", "--members", "200", "--plan-images", "10", "--plan-cpus", "98", "--plan-gpus", "0"
    )
    assert values["runs_at_once"] == 98  # and not 100, although .98 of a CPU is reserved for each


def test_ten_million_images(tmp_path: Path) -> None:
    cluster = ["--plan-images", "10000000", "--plan-cpus", "256", "--plan-gpus", "8", "--out", str(tmp_path)]
    values, text = plan("score", *cluster)
    assert values["seconds"] == pytest.approx(1e7 / (256 * 52))
    assert "time                  at least 12 min 31 s" in text
    values, text = plan("score", *cluster, "--images-per-second", "500")
    assert values["seconds"] == pytest.approx(1e7 / (8 * 500)), "networks take longer than reading"
    values, text = plan("ingest", *cluster)
    assert values["seconds"] == pytest.approx(1e7 / (256 * 177))
    assert "up to 655.4 GB in OUT" in text


def test_shards_are_scored_without_decoding_and_idle_runs_give_no_rate(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"test": 64})
    cluster = ["--archive", made, "--plan-cpus", "4", "--plan-gpus", "2", "--out", str(tmp_path)]
    values, text = plan("score", *cluster)
    assert values["images"] == 64
    assert "seconds" not in values
    assert "time       unknown" in text
    (tmp_path / "result.json").write_text(json.dumps({"metrics": {"images_per_s": 0.0}, "images_per_second": 0.0}))
    assert "seconds" not in plan("score", *cluster)[0]
    assert plan("ingest", *cluster)[0]["seconds"] == pytest.approx(64 / (4 * 177))
    (tmp_path / "result.json").write_text(json.dumps({"metrics": {"images_per_s": 32.0}}))
    assert plan("score", *cluster)[0]["seconds"] == pytest.approx(2)


def test_a_job_shows_its_plan_for_the_images_that_it_has_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cxr.cli.plans.Capacity.of", lambda options: Capacity(4, 0, "of a test"))
    monkeypatch.setattr("cxr.cli.plans.open_manifest", lambda *_: pytest.fail("the archive is listed again"))
    console.start("text", "")
    say_plan(score.Options(archive=("/nowhere",)), 4_160)
    say_plan(ingest.Options(archive="/nowhere"), 70_800)
    assert capsys.readouterr().out.splitlines() == [
        "plan: 2 replicas of the networks, on CPUs, and CPUs for reading; 4,160 images (listed in the archive); "
        "at least 20 s, start-up not included",
        "plan: all CPUs of the cluster, no GPU; 70,800 images (listed in the archive); 1 min 40 s, "
        "start-up not included",
    ]
    monkeypatch.setattr(console, "_console", console.Console("quiet"))
    say_plan(score.Options(archive=("/nowhere",)), 4_160)
    assert capsys.readouterr().out == ""


def test_options_of_a_plan_need_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS["ingest"].load().parse(["--plan-images", "4"])
    assert "--plan-images has an effect only with --plan" in " ".join(capsys.readouterr().err.split())


def test_a_plan_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        COMMANDS["train align"].run(["--plan", "--out", str(out)])
    assert ended.value.code == 0
    assert "asks for   1 training process" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("score", "--checkpoint none", "none contains no checkpoint.json"),
        ("score", "--panel none.yaml", "none.yaml, which does not exist"),
        ("train classify", "--backbone resnet1", "torchvision has no network resnet1"),
    ],
)
def test_a_plan_needs_networks_that_exist(command: str, arguments: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(command, *arguments.split())
