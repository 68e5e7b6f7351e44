"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.two_workers import TwoWorkers

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")

REPOSITORY = Path(__file__).parent.parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Processes that share the tests (`pytest -n 2 --dist loadgroup`) take whole files.

    One of them takes all tests that need Ray, which come first since they take longest, so that only one cluster is
    started; likewise for the tests with two workers.
    """
    if not config.pluginmanager.has_plugin("xdist"):
        return
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        shared = [name for name in ("ray_cluster", "two_workers") if name in fixtures]
        group = "ray" if item.get_closest_marker("ray") else shared[0] if shared else item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real X-rays; where there is none, the test is skipped."""
    folder = Path(os.environ.get("CXR_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "chestxray14").is_dir():
        pytest.skip(f"no real X-rays in {folder} (set CXR_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private cluster of two CPUs for all tests marked `ray`."""
    import ray

    from cxr.runtime.cluster import connect

    connect(cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    from tests.two_workers import TwoWorkers  # imports torch

    workers = TwoWorkers(tmp_path_factory.mktemp("two_workers"))
    yield workers
    workers.stop()


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)
