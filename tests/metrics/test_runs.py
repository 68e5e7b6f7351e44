"""Counting runs of masks gives what counting their pixels gives."""

from __future__ import annotations

import numpy as np
import pytest

from cxr.metrics.segmentation import runs


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_runs_count_as_pixels_do(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    for _ in range(20):
        height, width = rng.integers(1, 12, 2)
        ours, theirs = rng.random((2, height, width)) < share
        of_ours, of_theirs = runs.from_mask(ours), runs.from_mask(theirs)
        assert runs.area(of_ours) == ours.sum()
        assert runs.intersection(of_ours, of_theirs) == (ours & theirs).sum()
        if len(of_ours):
            first, end = runs.columns_of(of_ours, height)
            assert ours[:, :first].sum() + ours[:, end:].sum() == 0
            np.testing.assert_array_equal(runs.to_mask(of_ours, height, (first, end)), ours[:, first:end])


def test_a_union_is_in_order_without_overlaps() -> None:
    listed = np.array([[8, 9], [0, 3], [2, 5], [5, 6], [7, 7], [1, 2], [12, 14], [12, 13]])
    assert runs.union(listed).tolist() == [[0, 6], [8, 9], [12, 14]]
    assert runs.union(np.zeros((0, 2), np.int64)).tolist() == []
    assert runs.union(np.array([[4, 4]])).tolist() == []
