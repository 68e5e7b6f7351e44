"""Run all input measurements in order, and compute their ratios."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr.benchmarks.throughput import reading
from cxr.benchmarks.throughput.archive import make_archive, make_pictures
from cxr.benchmarks.throughput.memory import PeakMemory
from cxr.benchmarks.throughput.peers import READERS, Loader, one_core, scan
from cxr.benchmarks.throughput.reading import BATCH_SIZE, Step, on_worker, read_epochs, shard_stream
from cxr.benchmarks.throughput.training import both_paces
from cxr.data import shards
from cxr.data.ingest import ingest
from cxr.families.base import Recipe
from cxr.runtime import ray_private
from cxr.schema import PixelFormat
from cxr.training.options import ShardReader

_ROOM = 1.1  # size of shards on disk, as a multiple of their pixels


@dataclass(frozen=True)
class Plan:
    """Size of the measurements.

    Args:
        rows: training images per epoch.
        sizes: stored pixels of shards; the first one is also that of ingest, streaming and training.
        few: images of the small archive, for comparing memory.
        sample: images for timing a loader or a loop.
        rounds: number of alternating measurements of loaders and shards.
        pictures, picture_px: number and size of different images.
    """

    rows: int
    sizes: tuple[int, ...]
    few: int
    sample: int
    rounds: int
    workers: int
    pictures: int
    picture_px: int
    train_steps: int


@dataclass
class Measured:
    """Results, under the names in result.json."""

    rows_per_second: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def pace(self, name: str, value: float) -> None:
        self.rows_per_second[name] = round(value, 1)
        print(f"{name:<28} {value:>9,.1f} images/s", flush=True)


class Benchmark:
    """The measurements, which add to `measured`."""

    def __init__(self, plan: Plan, recipe: Recipe, scratch: Path) -> None:
        self.plan, self.recipe, self.scratch = plan, recipe, scratch
        self.measured = Measured()

    def run(self) -> Measured:
        begun = time.monotonic()
        self._prepare()
        for part in (self._ingest, self._memory, self._stream, self._train, *self._by_size()):
            part()
            print(f"… {time.monotonic() - begun:.0f} s", flush=True)
        self.measured.metrics["spilled_bytes"] = float(ray_private.spilled_bytes())
        return self.measured

    def _prepare(self) -> None:
        plan = self.plan
        print(f"{plan.pictures} images of {plan.picture_px} px under {plan.rows:,} names", flush=True)
        pictures = make_pictures(self.scratch / "pictures", plan.pictures, plan.picture_px)
        weight = statistics.fmean(file.stat().st_size for file in pictures) / 1000
        self.measured.notes.append(f"{plan.pictures} different PNGs of {weight:.0f} KB on average")
        self.files = make_archive(self.scratch / "archive", pictures, plan.rows)
        make_archive(self.scratch / "few", pictures, plan.few)

    def _ingest(self) -> None:
        """Ingest including start-up, between two runs of the bare loop; then of a small archive, for its memory."""
        size, sample = self.plan.sizes[0], self.files[: self.plan.sample]
        bare = [one_core(sample, size)]
        pace = self._timed_ingest("archive", size)
        bare.append(one_core(sample, size))
        self._timed_ingest("few", size)
        measured = self.measured
        measured.pace("one_core_cv2", statistics.fmean(bare))
        measured.pace("ingest", pace)
        measured.pace("ingest_warm", _warm_pace(self.scratch / f"archive-{size}"))
        measured.metrics["ingest_over_one_core"] = pace / statistics.fmean(bare)

    def _timed_ingest(self, archive: str, size: int) -> float:
        out, start = self.scratch / f"{archive}-{size}", time.monotonic()
        with PeakMemory() as memory:
            result = ingest(str(self.scratch / archive), str(out), pixels=PixelFormat(size))
        self.measured.peak_mib[f"ingest_{archive}_{size}"] = memory.peak_bytes / 2**20
        assert result.rejects == 0
        return sum(result.counts.values()) / (time.monotonic() - start)

    def _memory(self) -> None:
        """Read shards of the small and of the whole archive on a worker."""
        size = self.plan.sizes[0]
        for archive in ("few", "archive"):
            pace = self._on_worker(f"{archive}-{size}", f"shards_{archive}", epochs=3)
        self.measured.metrics["first_batch_s"] = pace.first_batch_again_s
        self.measured.pace("shards_on_worker", pace.rows_per_second)
        by_ray = self._on_worker(f"archive-{size}", "shards_ray", epochs=3, shard_reader="ray")
        self.measured.pace("shards_by_ray_data_on_worker", by_ray.rows_per_second)
        self.measured.metrics["ray_reader_over_own"] = by_ray.rows_per_second / pace.rows_per_second
        self.measured.metrics["first_batch_s_ray_reader"] = by_ray.first_batch_again_s
        self._grown("memory_growth_ingest", f"ingest_few_{size}", f"ingest_archive_{size}")
        self._grown("memory_growth_shards", "shards_few", "shards_archive")

    def _stream(self) -> None:
        """Stream the raw archive with Ray Data, between two runs of the loaders."""
        size, metrics = self.plan.sizes[0], self.measured.metrics
        self._on_worker("few", "stream_few", epochs=1)
        before = self._paces(self._loaders(size))
        pace = self._on_worker("archive", "stream_archive", epochs=2)
        after = self._paces(self._loaders(size))
        fastest = max((before[reader] + after[reader]) / 2 for reader in READERS)
        self.measured.pace(f"stream_{size}", pace.rows_per_second)
        metrics["stream_over_dataloader"] = pace.rows_per_second / fastest
        metrics["first_batch_s_stream"] = pace.first_batch_again_s
        self._grown("memory_growth_stream", "stream_few", "stream_archive")
        metrics["memory_growth"] = max(metrics[f"memory_growth_{way}"] for way in ("ingest", "shards", "stream"))

    def _on_worker(self, archive: str, name: str, epochs: int, shard_reader: ShardReader = "own") -> reading.Pace:
        size, runs = self.plan.sizes[0], str(self.scratch / "runs")
        with PeakMemory() as memory:
            pace = on_worker(str(self.scratch / archive), size, epochs, runs, shard_reader)
        self.measured.peak_mib[name] = memory.peak_bytes / 2**20
        return pace

    def _grown(self, metric: str, few: str, whole: str) -> None:
        self.measured.metrics[metric] = self.measured.peak_mib[whole] / self.measured.peak_mib[few]

    def _train(self) -> None:
        plan = self.plan
        uri = str(self.scratch / f"archive-{plan.sizes[0]}")
        ours, bare = both_paces(self.recipe, uri, plan.train_steps, 2 * plan.rounds + 1, str(self.scratch / "runs"))
        self.measured.pace("train", ours)
        self.measured.pace("train_bare_loop", bare)
        self.measured.metrics["train_over_bare_loop"] = ours / bare

    def _by_size(self) -> list[Callable[[], None]]:
        return [lambda size=size: self._shards(size) for size in self.plan.sizes]

    def _shards(self, size: int) -> None:
        """Alternate between loaders and shards; the first epoch of the shards counts too."""
        out = self._shards_of(size)
        info = shards.read_info(str(out))
        stream = shard_stream(info)
        loaders = self._loaders(size)
        loads: dict[str, list[float]] = {reader: [] for reader in READERS}
        paces = []
        for turn in range(self.plan.rounds):
            for reader, pace in self._paces(loaders).items():
                loads[reader].append(pace)
            paces.append(read_epochs(stream, 2, first=2 * turn))
        ours = sum(pace.rows for pace in paces) / sum(pace.seconds for pace in paces)
        means = {reader: statistics.fmean(values) for reader, values in loads.items()}
        for reader, value in means.items():
            self.measured.pace(f"dataloader_{reader}_{size}", value)
        self.measured.pace(f"shards_{size}", ours)
        self.measured.pace(f"scan_{size}", scan(info, "train"))
        ending = "" if size == self.plan.sizes[0] else f"_{size}"
        self.measured.metrics[f"shards_over_dataloader{ending}"] = ours / max(means.values())
        waits = [paces[0].first_batch_again_s, *(wait for pace in paces[1:] for wait in pace.first_batch_s)]
        self.measured.metrics["first_batch_s"] = max(self.measured.metrics["first_batch_s"], *waits)
        shutil.rmtree(out)

    def _loaders(self, size: int) -> dict[str, Loader]:
        """A DataLoader for each reader, over enough images for a sample; its throughput is steady."""
        files, workers = self.files[: self.plan.sample + 16 * BATCH_SIZE], self.plan.workers
        return {reader: Loader(files, size, reader, batch_size=BATCH_SIZE, workers=workers) for reader in READERS}

    def _paces(self, loaders: dict[str, Loader]) -> dict[str, float]:
        return {reader: loader.rows_per_second(self.plan.sample, Step()) for reader, loader in loaders.items()}

    def _shards_of(self, size: int) -> Path:
        """Shards of the whole archive, or of as much as fits on the disk."""
        out = self.scratch / f"archive-{size}"
        if out.exists():
            return out
        needed = self.plan.rows * PixelFormat(size).row_bytes * _ROOM
        fraction = min(1.0, 0.8 * shutil.disk_usage(self.scratch).free / needed)
        if fraction < 1:
            self.measured.notes.append(f"{size} px: {fraction:.0%} of the rows, because of limited disk space")
        limit = None if fraction == 1 else int(fraction * self.plan.rows)
        start = time.monotonic()
        ingest(str(self.scratch / "archive"), str(out), pixels=PixelFormat(size), limit=limit)
        self.measured.pace(f"ingest_{size}", (limit or self.plan.rows) / (time.monotonic() - start))
        return out

    def groups(self) -> dict[str, dict[str, float]]:
        """The chart's panels of bars."""
        pace, size = self.measured.rows_per_second, self.plan.sizes[0]
        panels = {
            f"Training input, {side} px": {
                "DataLoader, PIL": pace[f"dataloader_pil_{side}"],
                "DataLoader, cv2": pace[f"dataloader_cv2_{side}"],
                "shards": pace[f"shards_{side}"],
            }
            for side in self.plan.sizes
        }
        panels[f"Without shards, {size} px"] = {
            "DataLoader, PIL": pace[f"dataloader_pil_{size}"],
            "DataLoader, cv2": pace[f"dataloader_cv2_{size}"],
            "stream": pace[f"stream_{size}"],
        }
        panels[f"Decoding once, {size} px"] = {"one core, cv2": pace["one_core_cv2"], "ingest": pace["ingest"]}
        panels["A training step"] = {"bare loop": pace["train_bare_loop"], "Ray Train": pace["train"]}
        return panels


def _warm_pace(out: Path) -> float:
    """Images per second of an ingest from the end of its first part to the end of its last."""
    parts: list[Any] = sorted((path.stat().st_mtime, path) for path in out.glob("*/part-*.parquet"))
    about = shards.read_info(str(out))
    rows = {part.uri: part.rows for split in about.parts.values() for part in split}
    counted = sum(rows[str(path)] for _, path in parts[1:])
    return counted / max(1e-9, parts[-1][0] - parts[0][0])
