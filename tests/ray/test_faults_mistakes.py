"""Mistakes of the user: every job reports them in one line before it starts Ray, and exits with 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest

from cxr import schema
from cxr.cli.commands import COMMANDS
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.runtime import cluster
from tests.ray.archives import write_archive
from tests.servers import faulty
from tests.servers.faulty import Faulty

NAMES = ("ingest", "train align", "tune align", "score")


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("archive", "out", "message"), CASES)
def test_wrong_uris_are_rejected(
    name: str,
    archive: str,
    out: str,
    message: str,
    places: dict[str, str],
    front: Faulty,
    kept: str,
    capsys,
) -> None:
    front.refused = {"": "InvalidAccessKeyId"} if "refused" in (archive, out) else {}
    options = ["--archive", places[archive], "--out", places[out]]
    errors = run(name, options + ["--checkpoint", kept] * (name == "score"), capsys)
    assert message in errors
    assert not Path(places["out"]).exists()


def test_a_folder_without_a_checkpoint_is_rejected(places: dict[str, str], capsys) -> None:
    options = ["--archive", places["good"], "--out", places["out"], "--checkpoint", places["empty"]]
    assert "contains no checkpoint.json" in run("score", options, capsys)


def test_score_takes_each_archive_and_each_name_once(places: dict[str, str], capsys) -> None:
    options = ["--out", places["out"], "--checkpoint", places["empty"], "--archive", places["good"]]
    twice = run("score", [*options, "--archive", places["good"]], capsys)
    assert "twice: use it once" in twice
    named = [option for uri in ("empty", "missing") for option in ("--checkpoint", f"lungs={places[uri]}")]
    several = run("score", ["--out", places["out"], "--archive", places["good"], *named], capsys)
    assert "expected different names of members, got 'lungs' 2 times: rename one" in several
    assert not Path(places["out"]).exists()


def test_an_unreachable_cluster_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"):
        cluster.connect()


def run(name: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The command's error, which is one line, before it exits with 2."""
    with pytest.raises(SystemExit) as end:
        COMMANDS[name].run(options)
    errors = capsys.readouterr().err
    assert end.value.code == 2, errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    return errors
