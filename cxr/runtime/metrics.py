"""Metrics of jobs for Prometheus, which each machine of a Ray cluster exports as `ray_cxr_…` with Ray's own.

Labels are names of runs and kinds of work, never ids. Without Ray, nothing is recorded.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cxr import storage

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

SPEED = "cxr_training_images_per_second"
TIME = "cxr_training_time_share"
EPOCHS = "cxr_training_epochs_done"
IMAGES, REJECTS = "cxr_images_done", "cxr_images_rejected"
REASONS = "cxr_rejects_by_reason"

_DESCRIPTIONS = {  # with the labels
    SPEED: ("Training images per second over all workers, in the last epoch.", ("run",)),
    TIME: (
        "Fraction of the last epoch's duration: data, compute, gradients, validation.",
        ("run", "part"),
    ),
    EPOCHS: ("Epochs that a run has finished.", ("run",)),
    IMAGES: ("Images that a job has read or scored, good and rejected ones.", ("work",)),
    REJECTS: ("Images that a job could not use.", ("work",)),
    REASONS: ("Images that scoring could not use, by the kind of error.", ("reason",)),
}


def record_epoch(out: str, images_per_s: float, epochs: int, shares: Mapping[str, float]) -> None:
    """Record an epoch of the run in OUT.

    Args:
        shares: fractions of its duration, by part.
    """
    if _is_on():
        run = storage.name(out)
        _gauge(SPEED).set(images_per_s, {"run": run})
        _gauge(EPOCHS).set(epochs, {"run": run})
        for part, share in shares.items():
            _gauge(TIME).set(share, {"run": run, "part": part})


def count_images(work: str, images: int, rejects: int) -> None:
    """Count images of which `rejects` could not be used."""
    if _is_on():
        for name, count in ((IMAGES, images), (REJECTS, rejects)):
            if count:
                _counter(name).inc(count, {"work": work})


def count_reasons(errors: Iterable[str]) -> None:
    """Count rejected images by the kind of their error, which is what stands before its details."""
    if _is_on():
        for error in errors:
            _counter(REASONS).inc(1, {"reason": error.partition(":")[0]})


def _is_on() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@functools.cache
def _gauge(name: str) -> Gauge:
    from ray.util.metrics import Gauge

    return Gauge(name, *_DESCRIPTIONS[name])


@functools.cache
def _counter(name: str) -> Counter:
    from ray.util.metrics import Counter

    return Counter(name, *_DESCRIPTIONS[name])
