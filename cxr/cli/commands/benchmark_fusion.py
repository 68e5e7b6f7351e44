"""Compare weighted boxes fusion with the ensemble-boxes package: speed and results.

cxr benchmark fusion --out runs/benchmark_fusion
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr import storage
from cxr.boxes import ScoredBoxes, wbf
from cxr.errors import UserError
from cxr.reporting.tables import markdown

Images = list[list[ScoredBoxes]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_fusion"
    """Folder or URI of the results: OUT/fusion.md."""
    images: int = 1000
    """Number of images."""
    models: int = 5
    """Number of models."""
    boxes: int = 100
    """Number of boxes per model and image."""
    labels: tuple[int, ...] = (14, 1)
    """Numbers of labels to try. Default: VinBigData's 14, and 1, the slowest case for both."""
    seed: int = 0
    """Random seed of the boxes."""

    def __post_init__(self) -> None:
        if min(self.images, self.models, self.boxes, *self.labels) < 1:
            raise UserError(
                "expected --images, --models, --boxes and --labels of 1 or more, got less: raise the one that is "
                "below 1"
            )


def main(options: Options) -> dict[str, Any]:
    fuse_package = _package()
    rows, metrics = [], {}
    for labels in options.labels:
        images = made_images(options, labels)
        ours, our_s = _timed(lambda images=images: wbf(images))
        theirs, their_s = _timed(lambda images=images: [fuse_package(image) for image in images])
        difference = largest_difference(ours, theirs)
        rows.append([str(labels), f"{our_s:.2f}", f"{their_s:.2f}", f"{their_s / our_s:.1f}", f"{difference:.1e}"])
        metrics |= {
            f"seconds_{labels}": our_s,
            f"package_seconds_{labels}": their_s,
            f"ratio_{labels}": their_s / our_s,
        }
        metrics |= {f"largest_difference_{labels}": difference}
    head = ["labels", "cxr.boxes.wbf, s", "ensemble-boxes, s", "ratio", "largest difference"]
    table = markdown(head, rows)
    print(f"{options.images:,} images x {options.models} models x {options.boxes} boxes, CPU seconds\n{table}")
    uri = storage.join(storage.normalize(options.out), "fusion.md")
    storage.write_text(uri, table)
    return {"metrics": metrics, "report": uri}


def _package() -> Callable[[Sequence[ScoredBoxes]], ScoredBoxes]:
    try:
        from ensemble_boxes import weighted_boxes_fusion
    except ImportError:
        raise UserError(
            "expected the package ensemble-boxes, which is not installed: run pip install 'cxr[benchmarks]'"
        ) from None

    def fuse(image: Sequence[ScoredBoxes]) -> ScoredBoxes:
        boxes, scores, labels = ([predicted[field] for predicted in image] for field in range(3))
        return ScoredBoxes(*weighted_boxes_fusion(boxes, scores, labels))

    return fuse


def _timed(work: Callable[[], list[ScoredBoxes]]) -> tuple[list[ScoredBoxes], float]:
    """The result, and the CPU seconds, which other processes do not affect."""
    start = time.process_time()
    return work(), time.process_time() - start


def largest_difference(ours: Sequence[ScoredBoxes], theirs: Sequence[ScoredBoxes]) -> float:
    """The largest difference of any coordinate or score; infinite if the boxes of an image differ in number or
    labels."""
    differences = [0.0]
    for first, second in zip(ours, theirs, strict=True):
        if not np.array_equal(first.labels, second.labels):
            return float("inf")
        differences += [float(np.abs(a - b).max(initial=0)) for a, b in zip(first[:2], second[:2], strict=True)]
    return max(differences)


def made_images(options: Options, labels: int, objects: int = 20) -> Images:
    """Each model predicts an image's objects several times, jittered, with the correct label in 80 % of cases."""
    rng = np.random.default_rng(options.seed)
    return [_image(rng, options, labels, objects) for _ in range(options.images)]


def _image(rng: np.random.Generator, options: Options, labels: int, objects: int) -> list[ScoredBoxes]:
    corner, side = rng.uniform(0, 0.8, (objects, 2)), rng.uniform(0.03, 0.3, (objects, 2))
    label, count = rng.integers(labels, size=objects), options.boxes
    predictions = []
    for _ in range(options.models):
        object_index = rng.integers(objects, size=count)
        low = corner[object_index] + rng.normal(0, 0.15, (count, 2)) * side[object_index]
        edges = np.clip(np.hstack([low, low + side[object_index] * np.exp(rng.normal(0, 0.15, (count, 2)))]), 0, 1)
        labels_of_boxes = np.where(rng.random(count) < 0.8, label[object_index], rng.integers(labels, size=count))
        predictions.append(ScoredBoxes(edges, rng.uniform(0.01, 1, count), labels_of_boxes))
    return predictions
