"""Compare the predicted and the ground-truth mask of an image, as runs where both are at the size of the original.

Many images are compared in several processes, each of which gets the codes and the places of some images.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data.decode import original_mask
from cxr.errors import ImageRejectedError
from cxr.imaging import geometry
from cxr.imaging.geometry import ResizeTransform
from cxr.metrics.segmentation import runs
from cxr.metrics.segmentation.boundary import hd95
from cxr.runtime.child_processes import available_cpus, prepare_child
from cxr.sources import rle

_AT_A_TIME = 32  # images that a process compares for one request
_HERE_AT_MOST = 128  # images of which so few are compared in this process: others take seconds to start


class MaskSource(Protocol):
    """Where the ground-truth mask of an image is."""

    def true_mask(self, height: int, width: int) -> tuple[np.ndarray, ResizeTransform]:
        """The ground-truth mask, bool, and the transform from its pixels to those of the original (height, width).

        Raises:
            ImageRejectedError: it cannot be read, or does not fit the image.
        """
        ...

    def pair(self, code: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The predicted mask, from its relative code at the original size, and the true one, bool and of one size;
        raises like `true_mask`."""
        ...

    def runs(self, code: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """The runs of both, as `metrics.segmentation.runs.union` returns them, and the height and width to which
        they refer; raises like `true_mask`."""
        ...


@dataclass(frozen=True)
class PublishedMask:
    """A mask of a raw archive, at the size of the original.

    Args:
        entries: values of `schema.MASK_SOURCE_TYPE`, whose union is the mask.
    """

    entries: Sequence[dict[str, Any]]

    def true_mask(self, height: int, width: int) -> tuple[np.ndarray, ResizeTransform]:
        true = np.zeros((height, width), bool)
        for entry in self.entries:
            true |= original_mask(entry, height, width)
        return true, ResizeTransform()

    def pair(self, code: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        return rle.decode(code, height, width), self.true_mask(height, width)[0]

    def runs(self, code: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        true = [_runs_of(entry, height, width) for entry in self.entries]
        return runs.union(rle.runs(code, height, width)), runs.union(np.concatenate(true)), (height, width)


def _runs_of(entry: dict[str, Any], height: int, width: int) -> np.ndarray:
    form = entry[schema.MASK_FORM] or "relative"
    own = entry[schema.MASK_HEIGHT_PX] or height, entry[schema.MASK_WIDTH_PX] or width
    if entry[schema.MASK_RLE] is not None and form in ("relative", "absolute") and own == (height, width):
        return rle.runs(entry[schema.MASK_RLE], height, width, form)
    return runs.from_mask(original_mask(entry, height, width))


@dataclass(frozen=True)
class StoredMask:
    """A mask of shards, at the size of the stored pixels.

    Args:
        uri, row_group, row: the file, and the row in a row group of it.
        transform: of the image, from stored pixels to the original.
    """

    uri: str
    row_group: int
    row: int
    label: str
    size: int
    transform: ResizeTransform

    def true_mask(self, height: int, width: int) -> tuple[np.ndarray, ResizeTransform]:
        masks = _stored_masks(self.uri, self.row_group)[self.row].as_py()
        (bits,) = (mask[schema.MASK_BITS] for mask in masks if mask[schema.LABEL] == self.label)
        true = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.size**2)
        return true.astype(bool).reshape(self.size, self.size), self.transform

    def pair(self, code: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        predicted = geometry.fit_mask(rle.decode(code, height, width), self.size, self.transform)
        return predicted, self.true_mask(height, width)[0]

    def runs(self, code: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        predicted, true = self.pair(code, height, width)
        return runs.from_mask(predicted), runs.from_mask(true), (self.size, self.size)


@lru_cache(maxsize=2)
def _stored_masks(uri: str, row_group: int) -> pa.ChunkedArray:
    return storage.read_parquet(uri, row_groups=[row_group], columns=[schema.MASKS])[schema.MASKS]


@dataclass(frozen=True)
class ImageMasks:
    """The masks of an image that are to be compared.

    Args:
        code: relative code of the predicted mask.
        height, width: of the original.
        spacing_mm: of the compared pixels, between rows and between columns; None if unknown.
    """

    source: MaskSource
    code: str
    height: int
    width: int
    spacing_mm: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """How two masks agree: numbers of pixels in the order of `overlap_metrics`, and distances.

    Args:
        hd95_px, hd95_mm: NaN if a mask is empty, in mm also if the spacing is unknown.
    """

    counts: tuple[int, int, int, int]
    hd95_px: float
    hd95_mm: float


def compare(masks: ImageMasks) -> Comparison | str:
    """Compare the masks of an image; the reason if one of them cannot be read.

    Distances are computed only if neither is empty, in the columns in which there is one.
    """
    try:
        predicted, true, (height, width) = masks.source.runs(masks.code, masks.height, masks.width)
    except ImageRejectedError as rejected:
        return str(rejected)
    counts = runs.intersection(predicted, true), runs.area(predicted), runs.area(true), height * width
    if not len(predicted) or not len(true):
        return Comparison(counts, math.nan, math.nan)
    spans = [runs.columns_of(each, height) for each in (predicted, true)]
    columns = min(first for first, _ in spans), max(end for _, end in spans)
    both = runs.to_mask(predicted, height, columns), runs.to_mask(true, height, columns)
    hd95_px, spacing = hd95(*both), masks.spacing_mm
    if spacing is None:
        return Comparison(counts, hd95_px, math.nan)
    y_spacing, x_spacing = spacing
    hd95_mm = hd95_px * y_spacing if y_spacing == x_spacing else hd95(*both, spacing)
    return Comparison(counts, hd95_px, hd95_mm)


def compare_all(images: Iterable[ImageMasks], count: int, workers: int = 0) -> Iterator[Comparison | str]:
    """`compare` of each of `count` images, in order.

    Args:
        workers: number of processes; 0: one per CPU. Few images are compared in this process.
    """
    workers = workers or available_cpus()
    if workers == 1 or count <= _HERE_AT_MOST:
        yield from map(compare, images)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, by the server
    running: deque[Future[list[Comparison | str]]] = deque()
    pool = ProcessPoolExecutor(workers, context, initializer=prepare_child)
    try:
        for some in _portions(images):
            running.append(pool.submit(_compare_some, some))
            if len(running) > 2 * workers:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _portions(images: Iterable[ImageMasks]) -> Iterator[list[ImageMasks]]:
    portion: list[ImageMasks] = []
    for image in images:
        portion.append(image)
        if len(portion) == _AT_A_TIME:
            yield portion
            portion = []
    if portion:
        yield portion


def _compare_some(images: Sequence[ImageMasks]) -> list[Comparison | str]:
    return [compare(image) for image in images]
