"""The input benchmark: its parts, and one quick run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cxr import schema
from cxr.benchmarks.throughput.archive import VAL_ROWS, make_archive, make_pictures
from cxr.benchmarks.throughput.chart import save_chart
from cxr.benchmarks.throughput.memory import PeakMemory
from cxr.benchmarks.throughput.peers import read_cv2, read_pil
from cxr.benchmarks.throughput.reading import BATCH_SIZE, read_epochs, shard_stream
from cxr.data import shards
from cxr.sources import open_manifest
from tests.conftest import REPOSITORY
from tests.made_shards import write_shards


def test_archive_has_the_requested_number_of_training_rows(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 2, 64)
    files = make_archive(tmp_path / "archive", pictures, 5)
    splits = open_manifest(str(tmp_path / "archive")).table[schema.SPLIT].to_pylist()
    assert (splits.count("train"), splits.count("val"), len(splits)) == (5, VAL_ROWS, 5 + VAL_ROWS)
    assert files[3].read_bytes() == pictures[1].read_bytes()


def test_peer_readers_give_the_same_images(tmp_path: Path) -> None:
    (picture,) = make_pictures(tmp_path / "pictures", 1, 128)
    assert (read_cv2(str(picture), 128) == read_pil(str(picture), 128)).all()
    halves = [read(str(picture), 64).astype(int) for read in (read_cv2, read_pil)]
    assert np.abs(halves[0] - halves[1]).max() <= 1


def test_throughput_covers_whole_epochs(tmp_path: Path) -> None:
    info = shards.read_info(write_shards(tmp_path / "shards", {"train": 3 * BATCH_SIZE, "val": 8}))
    pace = read_epochs(shard_stream(info), 2)
    assert pace.rows == 2 * 3 * BATCH_SIZE
    assert len(pace.first_batch_s) == 2
    assert 0 < pace.first_batch_again_s <= pace.seconds


def test_memory_of_children_counts() -> None:
    grown = "import time; kept = bytearray(200 << 20); print('made', flush=True); time.sleep(60)"
    with PeakMemory() as before:
        pass
    with subprocess.Popen([sys.executable, "-c", grown], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with PeakMemory() as after:
            pass
        child.kill()
    assert after.peak_bytes - before.peak_bytes > 150 << 20


def test_chart_shows_each_group(tmp_path: Path) -> None:
    groups = {"Training input, 256 px": {"DataLoader, cv2": 240.0, "shards": 6000.0}, "A step": {"ours": 1.0}}
    uri = save_chart(groups, {"Training input, 256 px": 10}, ("shards", "ours"), str(tmp_path))
    assert Path(uri).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.ray
def test_quick_run_gives_all_ratios(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/benchmark_input.py", "--quick", "--sizes", "128", "--out", str(tmp_path / "out")]
    subprocess.run([*command, "--scratch", str(tmp_path)], cwd=REPOSITORY, check=True, timeout=280)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    ratios = ("shards_over_dataloader", "stream_over_dataloader", "ingest_over_one_core", "train_over_bare_loop")
    assert all(result["metrics"][name] > 0 for name in (*ratios, "memory_growth", "first_batch_s"))
    assert result["metrics"]["spilled_bytes"] == 0
    assert Path(result["pictures"][0]).exists()
    assert list(tmp_path.glob("cxr-input-*")) == []
