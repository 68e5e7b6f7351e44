"""Files that crash, hang or exhaust their decoder: each becomes a row with the reason, and the others are decoded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.phantom.archive import write_phantom
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
IMAGES = 40
REASONS = {
    "exits": "the decoder exited with code 3",
    "hangs": "decoding took longer than 5 s",
    "fills_memory": "decoding needed more than 0.5 GiB of memory",
}


def test_a_file_that_crashes_its_decoder_costs_one_row_in_ingest_streaming_and_scoring(tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    write_phantom(str(archive), IMAGES, size=64)
    files = sorted((archive / "images").iterdir())
    marked = dict(zip((file.name for file in files[5::10]), REASONS, strict=False))
    for name, mark in marked.items():
        with (archive / "images" / name).open("ab") as file:
            file.write(f"#{mark}".encode())
    paths = os.pathsep.join([str(REPOSITORY / "tests" / "marked_files"), os.environ.get("PYTHONPATH", "")])
    limits = {"CXR_DECODE_SECONDS": "5", "CXR_DECODE_MEMORY_GIB": "0.5"}
    command = [sys.executable, "-m", "tests.ray.marked_chain", str(archive), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=environment | limits | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])

    assert result["ingested"]["rejects"] == len(REASONS)
    assert sum(result["ingested"]["counts"].values()) == IMAGES - len(REASONS)
    rejects = pq.read_table(out / "shards" / "rejects.parquet").to_pylist()
    assert {row[schema.IMAGE_ID]: row[schema.ERROR] for row in rejects} == {n: REASONS[m] for n, m in marked.items()}

    assert result["fitted"]["epochs"] == 1

    scores = pa.concat_tables([pq.read_table(file) for file in (out / "scores").glob("*.parquet")]).to_pylist()
    assert len(scores) == IMAGES
    errors = {row[schema.IMAGE_ID]: row[schema.ERROR] for row in scores if row[schema.ERROR]}
    assert errors == {name: REASONS[mark] for name, mark in marked.items()}
