"""Measure how fast archives are scored, compared with bare loops, and how much memory scoring needs.

cxr benchmark score --out runs/benchmark_score  # 15 minutes on two cores

cxr benchmark score --quick  # two minutes; the figures are not meaningful
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxr.benchmarks.throughput.score import HEAVY, Plan, ScoreBenchmark
from cxr.runtime import cluster


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_score"
    """Folder or URI of result.json."""
    light: int = 10_000
    """Number of images for a small network."""
    heavy: int = 128
    """Number of images for a large network."""
    panel: int = 1_000
    """Number of images for four networks."""
    dicom: int = 16
    """Number of DICOM files in each transfer syntax."""
    rounds: int = 3
    """Number of alternating rounds of scoring and bare loops; the median of their ratios is reported."""
    only: tuple[str, ...] = ("light", "heavy", "panel", "dicom", "memory")
    """Which comparisons to make."""
    scratch: str = ""
    """Folder for temporary files. Empty: the system's default."""
    quick: bool = False
    """Run everything once with a few small images."""

    def plan(self) -> Plan:
        if self.quick:
            small = HEAVY.replace(size=64)
            sizes: dict[str, Any] = {"pictures": 8, "picture_px": 128, "dicom_px": (300, 250)}
            return Plan(64, 32, 32, 2, few=32, many=64, rounds=1, heavy_recipe=small, **sizes)
        return Plan(
            self.light,
            self.heavy,
            self.panel,
            self.dicom,
            few=1_000,
            many=20_000,
            rounds=self.rounds,
            pictures=96,
            picture_px=1024,
        )


def main(options: Options) -> dict[str, Any]:
    cluster.connect()
    with tempfile.TemporaryDirectory(prefix="cxr-score-", dir=options.scratch or None) as scratch:
        benchmark = ScoreBenchmark(options.plan(), Path(scratch))
        for name in options.only:
            getattr(benchmark, name)()
    measured = benchmark.measured
    for name, value in measured.metrics.items():
        print(f"{name:<28} {value:>9.3f}")
    print(f"load average: {os.getloadavg()[1]:.1f}", flush=True)
    return asdict(measured) | {"load_average": os.getloadavg()}
