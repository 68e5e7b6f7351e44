"""Our metrics reach Ray's exporter with their labels, and are not recorded without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cxr.runtime import metrics
from cxr.runtime.progress import Progress


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """What is recorded, by name and labels."""
    values: dict[tuple[str, ...], float] = {}

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.tag_keys
            values[self.name, *tags.values()] = value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            self.set(values.get((self.name, *tags.values()), 0) + value, tags)

    metrics._gauge.cache_clear()
    metrics._counter.cache_clear()
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorder)
    monkeypatch.setattr("ray.util.metrics.Counter", Recorder)
    yield values
    metrics._gauge.cache_clear()
    metrics._counter.cache_clear()


def record() -> None:
    metrics.record_epoch("s3://bucket/run", 100.0, 3, {"data": 0.25, "compute": 0.75}, 0.5)
    progress = Progress("score", 10)
    progress.add(4, 1, {"storage": 0.5, "decoding": 1.0})
    progress.add(3, seconds={"decoding": 0.25, "networks": 0.0})
    Progress("upload", 10, unit="files").add(5)
    metrics.count_reasons("score", ["too large: expected …, got 9", "too large: got 8", "empty file: 0 bytes"])


def test_values_and_labels(recorded: dict[tuple[str, ...], float], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    record()
    assert recorded == {
        ("cxr_training_images_per_second", "run"): 100.0,
        ("cxr_training_epochs_done", "run"): 3,
        ("cxr_training_time_share", "run", "data"): 0.25,
        ("cxr_training_time_share", "run", "compute"): 0.75,
        ("cxr_images_done", "score"): 7,
        ("cxr_images_rejected", "score"): 1,
        ("cxr_step_seconds", "score", "storage"): 0.5,
        ("cxr_step_seconds", "score", "decoding"): 1.25,
        ("cxr_gpu_busy_share", "run"): 0.5,
        ("cxr_rejects_by_reason", "score", "too large"): 2,
        ("cxr_rejects_by_reason", "score", "empty file"): 1,
    }


def test_the_share_of_gpus_is_that_of_the_last_seconds(
    recorded: dict[tuple[str, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    now = [0.0]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    share, key = metrics.GpuShare("s3://bucket/scores", gpus=2), ("cxr_gpu_busy_share", "scores")
    for now[0], busy, expected in ((10.0, 5.0, None), (20.0, 5.0, 0.25), (30.0, 8.0, 0.25), (40.0, 8.0, 0.4)):
        share.add(busy)
        assert recorded.get(key) == expected


def test_nothing_is_recorded_without_ray(
    recorded: dict[tuple[str, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(metrics.sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    record()
    assert recorded == {}


def test_ray_has_these_kinds_of_metrics() -> None:
    from ray.util.metrics import Counter, Gauge

    for kind in (Counter, Gauge):
        made: Any = kind("cxr_test", "A test.", ("run",))
        assert made.info["tag_keys"] == ("run",)
