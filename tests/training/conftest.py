"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.two_workers import TwoWorkers


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    workers = TwoWorkers(tmp_path_factory.mktemp("two_workers"))
    yield workers
    workers.stop()
