"""Mistakes of the user: every job reports them in one line before it starts Ray, and exits with 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from cxr import schema
from cxr.cli.entry import train, tune
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.runtime import cluster
from cxr.runtime.job import run_job
from tests.ray.archives import write_archive
from tests.servers import faulty
from tests.servers.faulty import Faulty

JOBS = ("ingest_archive", "train_align", "tune_align", "score_archive")
MAINS: dict[str, Any] = {"train_align": train, "tune_align": tune}


@pytest.fixture(scope="module")
def front() -> Iterator[Faulty]:
    with faulty.moto() as backend, faulty.before(backend) as front:
        yield front


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, recipe = tmp_path_factory.mktemp("kept"), AlignRecipe(size=32, backbone="conv3", lungs=False)
    network = recipe.network(schema.FINDINGS)
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=(), metrics={})
    return str(folder)


@pytest.fixture
def places(front: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Places good and bad by name; Ray must not be started."""
    for name, value in faulty.variables(front.url).items():
        monkeypatch.setenv(name, value)
    front.refused = {}
    boto3.client("s3").create_bucket(Bucket="xrays")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    def unwanted(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connect", unwanted)
    monkeypatch.setattr(
        "cxr.runtime.job.Interruption", lambda message: SimpleNamespace(number=0)
    )  # Ctrl-C stays pytest's
    return {
        "good": write_archive(tmp_path / "good", good=4),
        "out": str(tmp_path / "out"),
        "empty": str(tmp_path / "empty"),
        "missing": str(tmp_path / "missing"),
        "file": str(tmp_path / "file"),
        "no prefix": "s3://xrays/none",
        "no bucket": "s3://nowhere/x",
        "refused": "s3://xrays/x",
        "unknown": "ftp://host/x",
    }


CASES = [
    ("missing", "out", "missing does not exist: correct the URI"),
    ("empty", "out", "empty is an empty folder"),
    ("no prefix", "out", "s3://xrays/none does not exist"),
    ("no bucket", "out", "there is no bucket 'nowhere'"),
    ("unknown", "out", "expected a local path, file:///path, s3://"),
    ("good", "no bucket", "there is no bucket 'nowhere'"),
    ("good", "unknown", "expected a local path, file:///path, s3://"),
    ("good", "file", "expected a folder, got the file"),
    ("good", "refused", "rejected the credentials: check AWS_ACCESS_KEY_ID"),
    ("refused", "out", "rejected the credentials: check AWS_ACCESS_KEY_ID"),
]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("archive", "out", "message"), CASES)
def test_wrong_uris_are_rejected(
    job: str,
    archive: str,
    out: str,
    message: str,
    places: dict[str, str],
    front: Faulty,
    kept: str,
    capsys,
    monkeypatch,
) -> None:
    front.refused = {"": "InvalidAccessKeyId"} if "refused" in (archive, out) else {}
    options = ["--archive", places[archive], "--out", places[out]]
    errors = run(job, options + ["--checkpoint", kept] * (job == "score_archive"), capsys, monkeypatch)
    assert message in errors
    assert not Path(places["out"]).exists()


def test_a_folder_without_a_checkpoint_is_rejected(places: dict[str, str], capsys, monkeypatch) -> None:
    options = ["--archive", places["good"], "--out", places["out"], "--checkpoint", places["empty"]]
    assert "contains no checkpoint.json" in run("score_archive", options, capsys, monkeypatch)


def test_score_takes_one_checkpoint_and_each_archive_once(places: dict[str, str], capsys, monkeypatch) -> None:
    options = ["--out", places["out"], "--checkpoint", places["empty"], "--archive", places["good"]]
    twice = run("score_archive", [*options, "--archive", places["good"]], capsys, monkeypatch)
    assert "the same archive twice; give each archive once" in twice
    several = run("score_archive", [*options, "--checkpoint", places["missing"]], capsys, monkeypatch)
    assert several == "error: expected one --checkpoint, got 2: give it once\n"
    assert not Path(places["out"]).exists()


def test_an_unreachable_cluster_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"):
        cluster.connect()


def run(job: str, options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The job's error, which is one line, before it exits with 2."""
    module = importlib.import_module(f"jobs.{job}")
    monkeypatch.setattr(sys, "argv", [job, *options])
    main = MAINS.get(job) or module.main
    with pytest.raises(SystemExit) as end:
        run_job(main, module.Options)
    errors = capsys.readouterr().err
    assert end.value.code == 2, errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    return errors
