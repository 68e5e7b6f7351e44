"""The filter for normal images, at and between its two thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from cxr.boxes import ScoredBoxes, add_no_finding
from cxr.errors import UserError

FOUND = ScoredBoxes(np.array([[10.0, 20, 30, 40]]), np.array([0.7]), np.array([3]))


def test_boxes_of_an_abnormal_image_are_unchanged() -> None:
    assert add_no_finding(FOUND, 0.0799) is FOUND


@pytest.mark.parametrize("p_normal", [0.08, 0.5, 0.9499])
def test_no_finding_is_added_between_the_thresholds(p_normal: float) -> None:
    found = add_no_finding(FOUND, p_normal)
    assert found.labels.tolist() == [3, 14]
    assert found.scores.tolist() == [0.7, p_normal]
    assert found.boxes.tolist() == [[10, 20, 30, 40], [0, 0, 1, 1]]


@pytest.mark.parametrize("p_normal", [0.95, 1.0])
def test_no_finding_replaces_the_boxes_of_a_normal_image(p_normal: float) -> None:
    found = add_no_finding(FOUND, p_normal)
    assert (found.labels.tolist(), found.scores.tolist(), found.boxes.tolist()) == ([14], [1], [[0, 0, 1, 1]])


def test_thresholds_are_checked() -> None:
    assert add_no_finding(FOUND, 0.5, low=0.6, high=0.7) is FOUND
    with pytest.raises(UserError, match=r"low=0\.9 and high=0\.1"):
        add_no_finding(FOUND, 0.5, low=0.9, high=0.1)
    with pytest.raises(UserError, match="p_normal from 0 to 1, got 2"):
        add_no_finding(FOUND, 2)
