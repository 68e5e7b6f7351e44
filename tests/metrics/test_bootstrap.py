"""Resamples depend only on the number of patients and the seed: neither on memory nor on threads."""

from __future__ import annotations

import numpy as np
import pytest

from cxr.metrics import bootstrap
from cxr.metrics.bootstrap import mean_interval, resample


@pytest.mark.parametrize("most_values", [1, 700, 1 << 30])
@pytest.mark.parametrize("cpus", [1, 3])
def test_blocks_and_threads_change_nothing(most_values: int, cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = resample(101, 37, 5, np.transpose)
    sizes: list[int] = []

    def measure(times_PR: np.ndarray) -> np.ndarray:
        sizes.append(times_PR.size)
        return times_PR.T

    monkeypatch.setattr(bootstrap, "_MOST_VALUES", most_values)
    monkeypatch.setattr(bootstrap, "_HERE_AT_MOST", 0)
    monkeypatch.setattr(bootstrap, "_cpus", lambda: cpus)
    np.testing.assert_array_equal(resample(101, 37, 5, measure), expected)
    assert max(sizes) <= max(101, most_values)
    assert expected.shape == (37, 101)
    assert (expected.sum(1) == 101).all()


def test_resamples_differ_from_each_other_and_by_seed() -> None:
    both = np.concatenate([resample(50, 40, seed, np.transpose) for seed in (0, 1)])
    assert len(np.unique(both, axis=0)) == 80


def test_an_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(size=4000)
    interval = mean_interval(values, np.arange(4000), resamples=2000)
    half = 1.96 * values.std() / np.sqrt(4000)
    assert interval.value == pytest.approx(values.mean())
    assert [interval.low, interval.high] == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.1 * half
    )
