"""Offsets between boxes."""

from __future__ import annotations

import numpy as np
import pytest

from cxr.boxes.offsets import moved, offsets


def test_an_offset_is_a_translation_in_sizes_of_the_box_and_the_logarithm_of_the_scale() -> None:
    box, target = np.array([[0.2, 0.2, 0.4, 0.6]]), np.array([[0.3, 0.2, 0.7, 0.4]])
    assert offsets(box, target)[0] == pytest.approx([1.0, -0.25, np.log(2), np.log(0.5)])


def test_boxes_moved_by_their_offsets_are_the_targets() -> None:
    rng = np.random.default_rng(0)
    boxes, targets = (
        np.hstack([low, low + rng.uniform(0.1, 0.4, (20, 2))]) for low in rng.uniform(0, 0.5, (2, 20, 2))
    )
    assert moved(boxes, offsets(boxes, targets)) == pytest.approx(targets)
    assert moved(boxes, np.zeros((20, 4))) == pytest.approx(boxes)
