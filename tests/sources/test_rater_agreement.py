"""Several readers of an image: fusion, labels by vote, inter-reader agreement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.sources import rater_agreement
from tests.reader_agreement import matches, pair_f1

FINDINGS = ("a", "b")
NEAR = [[0, 0, 100, 100], [0, 0, 100, 90], [20, 20, 120, 120]]  # IoU with the first: .9, .47; with their mean .48
FAR = [300, 300, 400, 400]


def box(label: str, reader: str, corners: list[float]) -> dict[str, Any]:
    return {schema.LABEL: label, schema.READER: reader, **dict(zip(rater_agreement.CORNERS, corners, strict=True))}


def fused(name: str, boxes: list[list[float]], labels: list[int], who: list[str], looked: int = 3):
    return rater_agreement.FUSIONS[name](
        np.array(boxes, np.float64).reshape(-1, 4), np.array(labels), np.array(who), looked
    )


def test_union_keeps_all_boxes() -> None:
    found = fused("union", [*NEAR, FAR], [0, 0, 0, 1], ["r1", "r2", "r3", "r3"])
    np.testing.assert_array_equal(found.boxes, [*NEAR, FAR])
    assert found.labels.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(found.scores, 1 / 3)


def test_wbf_fuses_boxes_and_scores_the_fraction_of_readers() -> None:
    found = fused("wbf", [*NEAR, FAR], [0, 0, 0, 0], ["r1", "r2", "r3", "r3"])
    np.testing.assert_allclose(found.boxes, [np.mean(NEAR, 0), FAR])
    np.testing.assert_allclose(found.scores, [1, 1 / 3])


def test_majority_counts_readers_within_a_finding() -> None:
    twice = fused("majority", NEAR[:2], [0, 0], ["r1", "r1"])
    assert len(twice.boxes) == 0
    apart = fused("majority", NEAR[:2], [0, 1], ["r1", "r2"])
    assert len(apart.boxes) == 0
    agreed = fused("majority", [*NEAR[:2], FAR], [1, 1, 1], ["r1", "r2", "r3"])
    np.testing.assert_allclose(agreed.boxes, [np.mean(NEAR[:2], 0)])
    assert agreed.labels.tolist() == [1]
    assert agreed.scores == pytest.approx([2 / 3])


def test_boxes_with_low_overlap_are_not_fused() -> None:
    low, high = [0, 0, 100, 100], [50, 0, 150, 100]  # IoU 1/3
    assert len(fused("wbf", [low, high], [0, 0], ["r1", "r2"]).boxes) == 2
    assert len(fused("majority", [low, high], [0, 0], ["r1", "r2"]).boxes) == 0


def test_readers_without_boxes_count() -> None:
    assert fused("majority", [FAR], [0], ["r1"], looked=1).scores == pytest.approx([1])
    assert len(fused("majority", [FAR], [0], ["r1"], looked=2).boxes) == 0


@pytest.mark.parametrize("name", rater_agreement.FUSIONS)
def test_an_image_without_boxes(name: str) -> None:
    found = fused(name, [], [], [])
    assert (found.boxes.shape, found.labels.shape, found.scores.shape) == ((0, 4), (0,), (0,))


def test_arrays_of_a_row() -> None:
    row = [box("b", "r2", [1, 2, 3, 4]), box("other", "r1", [0, 0, 1, 1]), box("a", "r1", [5, 6, 7, 8])]
    boxes, labels, who = rater_agreement.arrays(row, FINDINGS)
    np.testing.assert_array_equal(boxes, [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert (labels.tolist(), who.tolist()) == ([1, 0], ["r2", "r1"])


def test_labels_by_one_reader_or_by_more() -> None:
    drawn = [box("a", "r1", FAR), box("a", "r1", NEAR[0]), box("b", "r1", FAR), box("b", "r2", FAR)]
    labels = rater_agreement.labels([drawn, [], None], FINDINGS)
    assert labels.tolist() == [[1, 1], [0, 0], [-1, -1]]
    extras = [None, '{"readers": ["r1"]}', None]
    assert rater_agreement.agreed(labels, [drawn, [], None], extras, FINDINGS, 2).tolist() == [
        [0, 1],
        [0, 0],
        [-1, -1],
    ]
    assert rater_agreement.labels([], FINDINGS).shape == (0, 2)


def test_image_labels_count_as_votes_and_a_consensus_is_unchanged() -> None:
    seen = ['{"readers": ["r1", "r2"], "image_labels": {"a": ["r1", "r2"], "b": ["r1"]}}', None]
    consensus = [{**box("a", "r1", FAR), schema.READER: None}]
    labels = np.array([[1, 1], [1, 0]], np.int8)
    assert rater_agreement.agreed(labels, [[box("b", "r1", FAR)], consensus], seen, FINDINGS, 2).tolist() == [
        [1, 0],
        [1, 0],
    ]


def test_fused_boxes_without_readers_are_unchanged() -> None:
    """Shards contain one fused set of boxes and the names of the readers."""
    extra = '{"readers": ["r1", "r2"]}'
    own = [box("a", "r1", NEAR[0]), box("a", "r2", NEAR[1])]
    (fused,) = rater_agreement.one_set([own], [extra], "wbf")
    assert fused is not None
    assert len(fused) == 1
    union = rater_agreement.one_set([own], [extra], "union")
    assert rater_agreement.one_set(union, [extra], "wbf") == union


def test_pair_f1() -> None:
    one = [box("a", "r1", NEAR[0]), box("a", "r2", NEAR[1]), box("b", "r1", FAR)]
    other = [box("a", "r1", FAR)]
    looked = ("r1", "r2", "r3")
    # a: r1-r2 match; r1 and r2 each alone against r3: 2 boxes; in the second image 2 pairs with one box
    expected_a = 2 * 1 / (2 + 1 + 1 + 2)
    np.testing.assert_allclose(pair_f1([(one, looked), (other, looked)], FINDINGS), [expected_a, 0])
    assert np.isnan(pair_f1([([], looked)], FINDINGS)).all()


def test_matches_are_one_to_one_in_order_of_iou() -> None:
    assert sorted(matches(np.array(NEAR), np.array([NEAR[0], NEAR[1]]))) == [(0, 0), (1, 1)]
    assert list(matches(np.zeros((0, 4)), np.array([FAR]))) == []


def test_readers_are_counted_by_image() -> None:
    """Those who drew boxes and those whom the source lists, each once; other boxes have no readers."""
    box = {schema.LABEL: "Mass", schema.X_MIN: 0.0, schema.Y_MIN: 0.0, schema.X_MAX: 1.0, schema.Y_MAX: 1.0}
    boxes = [
        [box | {schema.READER: "R1"}] * 2,
        None,
        [],
        [box | {schema.READER: each} for each in ("R2", "R3")],
        [box],
    ]
    extras = ['{"readers": ["R1", "R2"]}', None, '{"readers": ["R4"]}', '{"readers": ["R3", "R9"]}', "{}"]
    columns = (
        pa.chunked_array([pa.array(boxes, schema.MANIFEST.field(schema.BOXES).type)]),
        pa.chunked_array([pa.array(extras, pa.string())]),
    )
    assert rater_agreement.reader_counts(*columns).tolist() == [2, 0, 1, 3, 0]
    none = [column.slice(0, 0) for column in columns]
    assert rater_agreement.reader_counts(*none).tolist() == []
