"""A memory budget: reservations never exceed the total, and no thread waits forever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cxr.data.memory_budget import MemoryBudget


def test_threads_never_exceed_the_budget_and_all_make_progress() -> None:
    budget, lock, held, most = MemoryBudget(100), threading.Lock(), [0], [0]

    def work(size: int) -> None:
        with budget.hold(size):
            with lock:
                held[0] += min(size, 100)
                most[0] = max(most[0], held[0])
            time.sleep(0.001)
            with lock:
                held[0] -= min(size, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 70, 10, 100, 250, 60, 0, 45] * 5, timeout=30))
    assert 70 < most[0] <= 100


def test_a_reservation_is_released_after_an_error() -> None:
    budget = MemoryBudget(10)
    with pytest.raises(RuntimeError), budget.hold(10):
        raise RuntimeError
    with budget.hold(10):
        pass
