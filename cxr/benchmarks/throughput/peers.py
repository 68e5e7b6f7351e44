"""Baselines on the same files: a torch DataLoader, a bare loop on one core, a bare scan of the Parquet files."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cxr import schema
from cxr.data.shards import ShardInfo

Reader = Literal["pil", "cv2"]
READERS: tuple[Reader, ...] = ("pil", "cv2")
_WARM_BATCHES = 8  # not timed, while workers start and their queues fill


def read_cv2(path: str, size: int) -> np.ndarray:
    """Read a gray image as uint8 (size, size) with OpenCV."""
    pixels = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    assert pixels is not None
    if pixels.shape == (size, size):
        return pixels
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)


def read_pil(path: str, size: int) -> np.ndarray:
    """Read a gray image as uint8 (size, size) with Pillow."""
    with Image.open(path) as picture:
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BOX)
        return np.array(picture)


_READ: dict[str, Callable[[str, int], np.ndarray]] = {"cv2": read_cv2, "pil": read_pil}


class Pictures(Dataset[torch.Tensor]):
    """A typical dataset: one path per item, decoded and resized on access."""

    def __init__(self, files: list[Path], size: int, reader: Reader) -> None:
        self.files, self.size, self.reader = [str(file) for file in files], size, reader

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        cv2.setNumThreads(0)  # every core has its own worker
        return torch.from_numpy(_READ[self.reader](self.files[index], self.size))


class Loader:
    """A DataLoader with persistent workers, so that it can be timed repeatedly."""

    def __init__(self, files: list[Path], size: int, reader: Reader, *, batch_size: int, workers: int) -> None:
        context = multiprocessing.get_context("forkserver")  # forking a process with Ray's threads is unsafe
        context.set_forkserver_preload(["cxr.benchmarks.throughput.peers"])
        self._batches = DataLoader(
            Pictures(files, size, reader),
            batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=True,
            multiprocessing_context=context,
        )

    def rows_per_second(self, rows: int, step: Callable[[torch.Tensor], None]) -> float:
        """Throughput of `rows` rows into `step`, without the start of the workers."""
        batches = iter(self._batches)
        for _ in range(min(_WARM_BATCHES, len(self._batches) // 2)):
            step(next(batches))
        start, seen = time.perf_counter(), 0
        for batch in batches:
            step(batch)
            seen += len(batch)
            if seen >= rows:
                break
        return seen / (time.perf_counter() - start)


def one_core(files: list[Path], size: int) -> float:
    """Images per second that a bare loop decodes and resizes with OpenCV on one core."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    start = time.perf_counter()
    for file in files:
        read_cv2(str(file), size)
    cv2.setNumThreads(threads)
    return len(files) / (time.perf_counter() - start)


def scan(info: ShardInfo, split: str) -> float:
    """Rows per second at which pyarrow reads a split's pixels, row group by row group, on one thread."""
    start = time.perf_counter()
    rows = sum(group for part in info.parts[split] for group in _row_group_sizes(part.uri))
    return rows / (time.perf_counter() - start)


def _row_group_sizes(path: str) -> Iterator[int]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=[schema.PIXELS], use_threads=False).num_rows
