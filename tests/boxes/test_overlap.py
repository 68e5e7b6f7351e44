"""IoU and IoBB of boxes with known overlap."""

from __future__ import annotations

import numpy as np

from cxr.boxes import intersections, iobb, iou, paired_iou

A = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 9]])
B = np.array([[0, 0, 2, 2], [1, 0, 2, 4], [5, 5, 5, 9], [9, 9, 8, 8]])


def test_known_overlaps() -> None:
    np.testing.assert_allclose(iou(A, B)[:2], [[1, 2 / 6, 0, 0], [1 / 7, 2 / 6, 0, 0]])
    np.testing.assert_allclose(iobb(A, B)[:2], [[1, 0.5, 0, 0], [0.25, 0.5, 0, 0]])


def test_boxes_without_area_overlap_nothing() -> None:
    assert not iou(A, B)[2].any()
    assert not iobb(A, B)[2].any()
    assert not intersections(A, B)[:, 3].any()


def test_no_boxes() -> None:
    assert iou(np.zeros((0, 4)), B).shape == (0, 4)
    assert iobb(A, np.zeros((0, 4))).shape == (3, 0)


def test_paired_iou_is_the_diagonal_of_iou() -> None:
    np.testing.assert_array_equal(paired_iou(A, B[:3]), np.diagonal(iou(A, B[:3])))
