"""The benchmark of scoring: one quick run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cxr.benchmarks.throughput.memory import ProcessorTime
from tests.conftest import REPOSITORY

BUSY = "import time\nwhile time.process_time() < 3: pass"


@pytest.mark.slow
def test_processor_time_of_children_counts_also_after_their_end() -> None:
    with ProcessorTime() as time:
        subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert 1 < time.seconds < 20


@pytest.mark.slow
@pytest.mark.ray
def test_quick_run_gives_all_ratios(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/benchmark_score.py", "--quick", "--out", str(tmp_path / "out")]
    subprocess.run([*command, "--scratch", str(tmp_path)], cwd=REPOSITORY, check=True, timeout=280)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    ratios = ("light_over_bare", "heavy_over_bare", "panel_over_sum", "peak_rss_ratio")
    assert all(result["metrics"][name] > 0 for name in ratios)
    assert result["metrics"]["dicom_over_pydicom_jpeg_lossless"] > 0
    assert result["cpu_seconds_per_image"]["heavy"] > 0
    assert list(tmp_path.glob("cxr-score-*")) == []
