"""Metrics of jobs for Prometheus, which each machine of a Ray cluster exports as `ray_cxr_…` with Ray's own.

Labels are names of runs and kinds of work, never ids. Without Ray, nothing is recorded.
"""

from __future__ import annotations

import functools
import sys
import time
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
STEPS = "cxr_step_seconds"
GPUS = "cxr_gpu_busy_share"

_DESCRIPTIONS = {  # with the labels
    SPEED: ("Training images per second over all workers, in the last epoch.", ("run",)),
    TIME: (
        "Fraction of the last epoch's duration: data, compute, gradients, validation.",
        ("run", "part"),
    ),
    EPOCHS: ("Epochs that a run has finished.", ("run",)),
    IMAGES: ("Images that a job has read or scored, good and rejected ones.", ("work",)),
    REJECTS: ("Images that a job could not use.", ("work",)),
    REASONS: ("Images that a job could not use, by the kind of error.", ("work", "reason")),
    STEPS: ("Seconds that processes spent on images: storage, decoding, networks.", ("work", "step")),
    GPUS: ("Fraction of the time in which the GPUs of a run computed.", ("run",)),
}
_INTERVAL_S = 15.0  # over which the share of GPUs is measured, at least


def record_epoch(
    out: str, images_per_s: float, epochs: int, shares: Mapping[str, float], gpu_share: float | None = None
) -> None:
    """Record an epoch of the run in OUT.

    Args:
        shares: fractions of its duration, by part.
        gpu_share: fraction of the time of its steps in which the GPUs computed.
    """
    if _is_on():
        run = storage.name(out)
        _gauge(SPEED).set(images_per_s, {"run": run})
        _gauge(EPOCHS).set(epochs, {"run": run})
        for part, share in shares.items():
            _gauge(TIME).set(share, {"run": run, "part": part})
        if gpu_share is not None:
            _gauge(GPUS).set(gpu_share, {"run": run})


def count_images(work: str, images: int, rejects: int) -> None:
    """Count images of which `rejects` could not be used."""
    if _is_on():
        for name, count in ((IMAGES, images), (REJECTS, rejects)):
            if count:
                _counter(name).inc(count, {"work": work})


def count_reasons(work: str, errors: Iterable[str]) -> None:
    """Count rejected images by the kind of their error, which is what stands before its details."""
    if _is_on():
        for error in errors:
            _counter(REASONS).inc(1, {"work": work, "reason": error.partition(":")[0]})


def count_seconds(work: str, seconds: Mapping[str, float]) -> None:
    """Count seconds that were spent on images, by step; see `step_times`."""
    if _is_on():
        for step, spent in seconds.items():
            if spent > 0:
                _counter(STEPS).inc(spent, {"work": work, "step": step})


class GpuShare:
    """Records the fraction of the time in which the GPUs of the run in OUT compute, every `_INTERVAL_S` or more."""

    def __init__(self, out: str, gpus: int) -> None:
        self._run, self._gpus = storage.name(out), gpus
        self._since, self._busy = time.monotonic(), 0.0

    def add(self, seconds: float) -> None:
        """Count seconds in which a GPU computed."""
        self._busy += seconds
        elapsed = time.monotonic() - self._since
        if elapsed >= _INTERVAL_S and _is_on():
            _gauge(GPUS).set(min(1.0, self._busy / (elapsed * self._gpus)), {"run": self._run})
            self._since, self._busy = time.monotonic(), 0.0


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
