"""Measure input throughput: shards, streaming, ingest and training compared with plain loops.

cxr benchmark input --out runs/benchmark_input  # 14 minutes on two cores, 12 GB of disk

cxr benchmark input --quick  # one minute; the figures are not meaningful
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxr import storage
from cxr.benchmarks.throughput.chart import save_chart
from cxr.benchmarks.throughput.measure import Benchmark, Plan
from cxr.families.align import AlignRecipe
from cxr.runtime import cluster

TARGETS = {"Training input, 256 px": 10, "Training input, 512 px": 8, "Training input, 1024 px": 4}
OURS = ("shards", "stream", "ingest", "Ray Train")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_input"
    """Folder or URI of result.json and the chart."""
    rows: int = 10_000
    """Training images per epoch."""
    sizes: tuple[int, ...] = (256, 512, 1024)
    """Sizes of stored pixels to measure. Ingest, streaming and training are measured at the first size."""
    sample: int = 600
    """Number of images for timing a DataLoader or a bare loop."""
    rounds: int = 2
    """Number of alternating rounds of loaders and shards."""
    workers: int = 2
    """Number of DataLoader worker processes."""
    scratch: str = ""
    """Folder for temporary files. Empty: the system's default."""
    quick: bool = False
    """Run everything once with a few small images."""

    def plan(self) -> Plan:
        if self.quick:
            return Plan(
                96, self.sizes[:1], 48, 32, 1, self.workers, pictures=8, picture_px=self.sizes[0], train_steps=2
            )
        return Plan(
            self.rows,
            self.sizes,
            few=max(64, self.rows // 10),
            sample=self.sample,
            rounds=self.rounds,
            workers=self.workers,
            pictures=96,
            picture_px=1024,
            train_steps=12,
        )


def main(options: Options) -> dict[str, Any]:
    cluster.connect()
    with tempfile.TemporaryDirectory(prefix="cxr-input-", dir=options.scratch or None) as scratch:
        benchmark = Benchmark(options.plan(), AlignRecipe(), Path(scratch))
        measured = benchmark.run()
    picture = save_chart(benchmark.groups(), TARGETS, OURS, storage.normalize(options.out))
    for name, value in measured.metrics.items():
        print(f"{name:<28} {value:>9.3f}")
    print(f"picture: {picture}", flush=True)
    return asdict(measured) | {"pictures": [picture]}
