"""Throughput and memory of `cxr score`, compared with bare loops over the same images, in alternating rounds."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import ray
import torch

from cxr import schema
from cxr.benchmarks.throughput.archive import make_pictures
from cxr.benchmarks.throughput.memory import PeakMemory, ProcessorTime
from cxr.benchmarks.throughput.peers import read_cv2
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.families.base import Recipe
from cxr.families.classify import ClassifyRecipe
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Panel
from cxr.inference.score import Scored, score
from cxr.runtime import cluster
from cxr.sources.options import ReadOptions

LIGHT = AlignRecipe(size=128, lungs=False)
HEAVY = ClassifyRecipe(size=512, backbone="densenet121")
MEMBERS = {
    "align": LIGHT,
    "align-fine": LIGHT.replace(size=256),
    "classify": ClassifyRecipe(size=128),
    "classify-fine": ClassifyRecipe(size=256),
}
_OPTIONS = ScoreOptions(reading=ReadOptions(gate="off"))
_SMALL_PX = 256  # of the pictures for comparing memory, which are many


@dataclass(frozen=True)
class Plan:
    """Size of the measurements.

    Args:
        light, heavy, panel: images for a small network, for a large one, and for four at a time.
        few, many: images of two archives whose peak memory is compared.
        rounds: number of alternating rounds; the median of their ratios is reported.
        dicom, dicom_px: DICOM files in each transfer syntax, and their height and width.
        pictures, picture_px: number and size of different images.
        heavy_recipe: the large network.
    """

    light: int
    heavy: int
    panel: int
    dicom: int
    few: int
    many: int
    rounds: int
    pictures: int
    picture_px: int
    dicom_px: tuple[int, int] = (2500, 2048)
    heavy_recipe: Recipe = HEAVY


@dataclass
class Measured:
    """Results, under the names in result.json."""

    metrics: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)
    cpu_seconds_per_image: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, paces: list[float], cpu_seconds: list[float]) -> None:
        """Images per second, and seconds of all cores per image, in each round."""
        self.images_per_second[name] = round(statistics.median(paces), 2)
        self.cpu_seconds_per_image[name] = round(statistics.median(cpu_seconds), 5)
        print(f"{name:<16} {self.images_per_second[name]:>9,.1f} images/s", flush=True)

    def compare(self, metric: str, ratios: list[float]) -> None:
        self.rounds[metric] = [round(ratio, 3) for ratio in ratios]
        self.metrics[metric] = statistics.median(ratios)


class ScoreBenchmark:
    """The measurements, which add to `measured`."""

    def __init__(self, plan: Plan, scratch: Path) -> None:
        self.plan, self.scratch = plan, scratch
        self.cores = int(cluster.total("CPU"))
        self.measured = Measured()
        self.pictures = make_pictures(scratch / "pictures", plan.pictures, plan.picture_px)

    def light(self) -> None:
        """A network so small that images are the work, and a bare loop that decodes and resizes on all cores.

        The seconds until the first images are scored count, because images are decoded meanwhile.
        """
        files = self._archive("light", self.pictures, self.plan.light)
        saved = self._saved("light", LIGHT)
        with ProcessPoolExecutor(self.cores, mp_context=get_context("forkserver")) as pool:
            list(pool.map(_one_thread, range(4 * self.cores)))  # starts all processes
            read = partial(_read, size=LIGHT.size)
            bare = partial(pool.map, read, files, chunksize=16)
            ours = partial(self._seconds, "light", Panel.of([saved]))
            self._rounds("light", lambda: len(files) / ours(), lambda: sum(bare()))

    def heavy(self) -> None:
        """A network so large that it is the work, and its bare forward pass on tensors in memory.

        The seconds until the first part is scored do not count.
        """
        recipe, count = self.plan.heavy_recipe, self.plan.heavy
        files = self._archive("heavy", self.pictures, count)
        saved = self._saved("heavy", recipe)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = checkpoint.load(saved).network.to(device)
        pixels = np.stack([read_cv2(file, recipe.size) for file in files[:16]])
        batch = {schema.PIXELS: torch.from_numpy(pixels).to(device)}
        threads = torch.get_num_threads()

        def bare(batches: int = count // 16) -> int:
            with torch.inference_mode():
                for _ in range(batches):
                    recipe.predict(network, batch)[schema.PROBABILITIES].cpu()
            return batches * 16

        torch.set_num_threads(self.cores)
        bare(1)  # the first one loads libraries
        self._rounds("heavy", lambda: self._score("heavy", saved), bare)
        torch.set_num_threads(threads)

    def panel(self) -> None:
        """Four networks in one pass, and in four."""
        self._archive("panel", self.pictures, self.plan.panel)
        saved = [f"{name}={self._saved(name, recipe)}" for name, recipe in MEMBERS.items()]
        ratios = []
        for _ in range(self.plan.rounds):
            together = self._seconds("panel", Panel.of(saved))
            ratios.append(together / sum(self._seconds("panel", Panel.of([one])) for one in saved))
        self.measured.compare("panel_over_sum", ratios)

    def dicom(self) -> None:
        """DICOM files, read as in scoring and ingesting, and a loop over pydicom, by transfer syntax."""
        from cxr.benchmarks.throughput.dicom_reading import dicom_over_pydicom  # needs the extra `dicom`

        height, width = self.plan.dicom_px
        for name, compared in dicom_over_pydicom(
            self.scratch / "dicom",
            self.plan.dicom,
            self.plan.rounds,
            cores=self.cores,
            height_px=height,
            width_px=width,
        ).items():
            self.measured.images_per_second[f"dicom_{name}"] = round(statistics.median(compared.ours), 2)
            self.measured.images_per_second[f"pydicom_{name}"] = round(statistics.median(compared.pydicom), 2)
            self.measured.compare(f"dicom_over_pydicom_{name}", compared.ratios)

    def memory(self) -> None:
        """Peak memory of all processes with few and with many images, each on a new cluster if it is a local one."""
        pictures = make_pictures(self.scratch / "small", 8, min(_SMALL_PX, self.plan.picture_px))
        saved = self._saved("light", LIGHT)
        for name, count in (("few", self.plan.few), ("many", self.plan.many)):
            self._archive(name, pictures, count)
            ray.shutdown()  # otherwise processes of earlier runs would count
            cluster.connect()
            with PeakMemory() as memory:
                self._score(name, saved)
            self.measured.peak_mib[name] = round(memory.peak_bytes / 2**20)
        self.measured.metrics["peak_rss_ratio"] = self.measured.peak_mib["many"] / self.measured.peak_mib["few"]

    def _rounds(self, name: str, ours: Callable[[], float], bare: Callable[[], int]) -> None:
        """Time scoring and a bare loop in turn. `ours` returns its images per second, `bare` its number of images."""
        paces: dict[str, list[float]] = {name: [], f"{name}_bare": []}
        cpu: dict[str, list[float]] = {name: [], f"{name}_bare": []}
        for _ in range(self.plan.rounds):
            with ProcessorTime() as of_ours:
                paces[name].append(ours())
            with ProcessorTime() as of_bare:
                start = time.perf_counter()
                images = bare()
                paces[f"{name}_bare"].append(images / (time.perf_counter() - start))
            cpu[name].append(of_ours.seconds / images)
            cpu[f"{name}_bare"].append(of_bare.seconds / images)
        for each in paces:
            self.measured.add(each, paces[each], cpu[each])
        pairs = list(zip(*paces.values(), strict=True)), list(zip(*cpu.values(), strict=True))
        self.measured.compare(f"{name}_over_bare", [mine / theirs for mine, theirs in pairs[0]])
        self.measured.compare(f"{name}_cpu_over_bare", [theirs / mine for mine, theirs in pairs[1]])

    def _score(self, archive: str, saved: str) -> float:
        """Images per second of scoring an archive, after the first part."""
        return self._scored(archive, Panel.of([saved])).increments[0]["steady_images_per_s"]

    def _seconds(self, archive: str, panel: Panel) -> float:
        """How long scoring an archive takes."""
        start = time.perf_counter()
        self._scored(archive, panel)
        return time.perf_counter() - start

    def _scored(self, archive: str, panel: Panel) -> Scored:
        with tempfile.TemporaryDirectory(dir=self.scratch) as out:
            scored = score(str(self.scratch / archive), panel, out, _OPTIONS)
        assert scored.rejects == 0
        return scored

    def _archive(self, name: str, pictures: list[Path], count: int) -> list[str]:
        """Make an archive of `count` images, all links to `pictures`; the paths of its files."""
        folder = self.scratch / name / "patient"
        folder.mkdir(parents=True)
        files = [folder / f"{number:06d}.png" for number in range(count)]
        for number, file in enumerate(files):
            os.link(pictures[number % len(pictures)], file)
        return list(map(str, files))

    def _saved(self, name: str, recipe: Recipe) -> str:
        """A checkpoint with random weights."""
        folder = self.scratch / f"checkpoint-{name}"
        if not folder.exists():
            task = recipe.task(recipe.network(schema.FINDINGS))
            checkpoint.save(folder, recipe, task, task.network.state_dict(), findings=schema.FINDINGS, metrics={})
        return str(folder)


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)
    time.sleep(0.05)


def _read(file: str, size: int) -> int:
    return len(read_cv2(file, size)) // size
