"""Fixtures that all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.two_workers import TwoWorkers

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_worker_niceness", "0")  # by default workers would yield to the other process of the tests

REPOSITORY = Path(__file__).parent.parent
hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine may stop a test for a moment
hypothesis.settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that need Ray come first: they take longest. Those of training are next."""
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, "tests/training/" not in item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes that share the tests (`pytest -n 2`) take whole files, or a folder: `tests/ray` or `tests/training`.

    Only one Ray cluster and one pair of workers is started then. (The groups of pytest-xdist 3.8 have no effect with
    pytest 9.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.rpartition("/")[0]
            return folder if folder in ("tests/ray", "tests/training") else file

    return ByFile(config, log)


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
def _new_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that an earlier test ran in this process has ended its console."""
    console = sys.modules.get("cxr.runtime.console")
    if console is not None:
        monkeypatch.setattr(console, "_console", console.Console())


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)
