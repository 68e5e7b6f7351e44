"""Ingest, training and scoring on an S3 server that throttles, errs, tears answers and goes away: all end well."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.data import shards
from cxr.phantom.archive import write_phantom
from cxr.training.run_log import read_metrics
from tests.conftest import REPOSITORY
from tests.ray.chain import EPOCHS, IMAGES
from tests.ray.fault_table import record
from tests.servers import faulty
from tests.servers.faulty import Faulty

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ARCHIVE, OUT = "s3://xrays/archive", "s3://xrays/out"


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Faulty]:
    with faulty.moto() as backend, faulty.before(backend) as front:
        for name, value in faulty.variables(front.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        storage.s3.client("xrays").create_bucket(Bucket="xrays")
        write_phantom(str(tmp_path / "archive"), IMAGES, size=64)
        storage.upload_folder(tmp_path / "archive", ARCHIVE)
        front.counts.clear()
        yield front


def one_in_five(front: Faulty) -> None:
    front.one_in = 5


def throttled(front: Faulty) -> None:
    front.throttle(30)


def down(front: Faulty) -> None:
    front.down(30)


FAULTS: dict[Callable[[Faulty], None], str] = {
    one_in_five: "storage fails one request in five",
    throttled: "storage throttles for 30 s, four times",
    down: "storage is down for 30 s, four times",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_pipeline_succeeds(front: Faulty, fault: Callable[[Faulty], None], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ray.chain", ARCHIVE, OUT]
    began, times = time.monotonic(), []
    with (tmp_path / "errors").open("w") as errors:
        chain = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert chain.stdout is not None
        said = []
        for line in chain.stdout:
            said.append(line)
            if line.startswith("begins: ") or f"train 1/{EPOCHS}" in line:
                times.append(time.monotonic())
                fault(front)
    front.one_in = 0
    assert chain.wait() == 0, "".join(said[-20:]) + (tmp_path / "errors").read_text()[-3000:]
    assert sum(count for kind, count in front.counts.items() if kind != "ok") > 20 or fault is down
    check_whole()
    written = [seen.at for seen in front.seen if seen.method == "PUT" and "lease" not in seen.path]
    pauses = [min((at - fault_at for at in written if at > fault_at + 30), default=0) for fault_at in times]
    recovery = None if fault is one_in_five else max(pauses)
    end = "the same rows, epochs and scores"
    record(FAULTS[fault], "ingest, train, score", end, recovery, time.monotonic() - began, None)


def test_every_request_of_the_pipeline_is_signed_by_the_assumed_role(
    front: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        "[profile hospital]\nrole_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = base\n"
        "[profile base]\naws_access_key_id = BASE\naws_secret_access_key = word\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "hospital")
    monkeypatch.setenv("CXR_REQUESTER_PAYS", "1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    front.seen.clear()
    command = [sys.executable, "-m", "tests.ray.chain", ARCHIVE, OUT]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    to_s3 = [seen for seen in front.seen if seen.path.startswith("/xrays")]
    assert {(seen.signer[:4], seen.payer) for seen in to_s3} == {("ASIA", "requester")}
    assert len({seen.signer for seen in to_s3}) > 1  # workers assume the role, each for itself
    check_whole()


def check_whole() -> None:
    """Every image once in shards and in scores, every epoch once."""
    info = shards.read_info(f"{OUT}/shards")
    files = [part.uri for parts in info.parts.values() for part in parts]
    assert Counter(ids(files)).most_common(1)[0][1] == 1
    assert len(ids(files)) == IMAGES
    assert [row["epoch"] for row in read_metrics(OUT)] == [*range(1, EPOCHS + 1)]
    scores = [entry.uri for entry in storage.list_files(f"{OUT}/scored/scores")]
    assert sorted(ids(scores)) == sorted(ids(files))
    assert pa.concat_tables(map(storage.read_parquet, scores))[schema.ERROR].null_count == IMAGES


def ids(files: list[str]) -> list[str]:
    return [name for uri in files for name in storage.read_parquet(uri)[schema.IMAGE_ID].to_pylist()]
