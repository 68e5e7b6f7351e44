"""Time weighted boxes fusion of many images beside the package ensemble-boxes, and compare what they give.

python jobs/benchmark_fusion.py --out runs/benchmark_fusion
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
from cxr.runtime.job import run_job

Images = list[list[ScoredBoxes]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_fusion"
    """Folder or URI of the results: OUT/fusion.md."""
    images: int = 1000
    """How many."""
    models: int = 5
    """That have found boxes in each image."""
    boxes: int = 100
    """That each model has found in an image."""
    labels: tuple[int, ...] = (14, 1)
    """Numbers of labels that are tried: VinBigData's, and one, which is the slowest for both."""
    seed: int = 0
    """Of the boxes."""

    def __post_init__(self) -> None:
        if min(self.images, self.models, self.boxes, *self.labels) < 1:
            raise UserError("images, models, boxes and labels: wanted 1 or more of each")


def main(options: Options) -> dict[str, Any]:
    fuse_package = _package()
    rows, metrics = [], {}
    for labels in options.labels:
        images = made_images(options, labels)
        ours, our_s = _timed(lambda images=images: wbf(images))
        theirs, their_s = _timed(lambda images=images: [fuse_package(image) for image in images])
        apart = largest_difference(ours, theirs)
        rows.append([str(labels), f"{our_s:.2f}", f"{their_s:.2f}", f"{their_s / our_s:.1f}", f"{apart:.1e}"])
        metrics |= {
            f"seconds_{labels}": our_s,
            f"package_seconds_{labels}": their_s,
            f"ratio_{labels}": their_s / our_s,
        }
        metrics |= {f"largest_difference_{labels}": apart}
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
        raise UserError("the package ensemble-boxes is not installed: pip install ensemble-boxes") from None

    def fuse(image: Sequence[ScoredBoxes]) -> ScoredBoxes:
        boxes, scores, labels = ([found[of] for found in image] for of in range(3))
        return ScoredBoxes(*weighted_boxes_fusion(boxes, scores, labels))

    return fuse


def _timed(work: Callable[[], list[ScoredBoxes]]) -> tuple[list[ScoredBoxes], float]:
    """What it gives, and the processor's seconds, of which other processes take none."""
    start = time.process_time()
    return work(), time.process_time() - start


def largest_difference(ours: Sequence[ScoredBoxes], theirs: Sequence[ScoredBoxes]) -> float:
    """Of any coordinate or score; infinite where the number or the labels of an image's boxes differ."""
    apart = [0.0]
    for mine, other in zip(ours, theirs, strict=True):
        if not np.array_equal(mine.labels, other.labels):
            return float("inf")
        apart += [float(np.abs(a - b).max(initial=0)) for a, b in zip(mine[:2], other[:2], strict=True)]
    return max(apart)


def made_images(options: Options, labels: int, objects: int = 20) -> Images:
    """Models find an image's objects several times, jittered, four times of five with their right label."""
    rng = np.random.default_rng(options.seed)
    return [_image(rng, options, labels, objects) for _ in range(options.images)]


def _image(rng: np.random.Generator, options: Options, labels: int, objects: int) -> list[ScoredBoxes]:
    corner, side = rng.uniform(0, 0.8, (objects, 2)), rng.uniform(0.03, 0.3, (objects, 2))
    label, count = rng.integers(labels, size=objects), options.boxes
    found = []
    for _ in range(options.models):
        of = rng.integers(objects, size=count)
        low = corner[of] + rng.normal(0, 0.15, (count, 2)) * side[of]
        edges = np.clip(np.hstack([low, low + side[of] * np.exp(rng.normal(0, 0.15, (count, 2)))]), 0, 1)
        said = np.where(rng.random(count) < 0.8, label[of], rng.integers(labels, size=count))
        found.append(ScoredBoxes(edges, rng.uniform(0.01, 1, count), said))
    return found


if __name__ == "__main__":
    run_job(main, Options)
