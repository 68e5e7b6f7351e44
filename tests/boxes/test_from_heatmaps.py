"""Boxes from heat maps: hand-made maps, both of Wang's thresholds, and the way back to the original image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxr.boxes.from_heatmaps import BoxRule, boxes_of, to_original
from cxr.imaging.geometry import ResizeTransform, fit
from jobs import benchmark_map_boxes

EMPTY = np.zeros((20, 30), np.uint8)


def painted(*spots: tuple[int, int, int, int, int]) -> np.ndarray:
    """A map with rectangles: left, top, right, bottom, heat."""
    made = EMPTY.copy()
    for left, top, right, bottom, heat in spots:
        made[top:bottom, left:right] = heat
    return made


def cells(maps: list[np.ndarray], rule: BoxRule) -> list[tuple[int, ...]]:
    """Map and box in cells of all that is found."""
    found = boxes_of(np.stack(maps), rule)
    return [
        (int(i), *np.rint(b * (30, 20, 30, 20)).astype(int))
        for i, b in zip(found.index_N, found.boxes_N4, strict=True)
    ]


def test_a_box_lies_around_each_region_the_hotter_first() -> None:
    found = boxes_of(painted((2, 3, 8, 9, 150), (20, 10, 25, 18, 200))[None])
    assert np.allclose(found.boxes_N4, [[20 / 30, 10 / 20, 25 / 30, 18 / 20], [2 / 30, 3 / 20, 8 / 30, 9 / 20]])
    assert found.score_N == pytest.approx([200 / 255, 150 / 255])


def test_maps_do_not_run_into_each_other() -> None:
    bottom, top = painted((4, 15, 9, 20, 200)), painted((4, 0, 9, 5, 200))
    assert cells([bottom, EMPTY, top], BoxRule()) == [(0, 4, 15, 9, 20), (2, 4, 0, 9, 5)]


def test_wang_s_two_thresholds_give_a_box_within_a_box() -> None:
    spot = painted((5, 5, 15, 15, 70), (8, 8, 11, 11, 190))
    rule = BoxRule("wang", most=5)
    assert cells([spot], rule) == [(0, 8, 8, 11, 11), (0, 5, 5, 15, 15)]
    assert cells([painted((5, 5, 15, 15, 59))], rule) == []
    assert cells([painted((5, 5, 15, 15, 255))], rule) == [(0, 5, 5, 15, 15)]  # the same at both: once


def test_a_share_of_the_maximum_adapts_to_weak_maps() -> None:
    weak = painted((5, 5, 15, 15, 39), (8, 8, 11, 11, 80))
    assert cells([weak], BoxRule("share", share=0.5)) == [(0, 8, 8, 11, 11)]
    assert cells([weak], BoxRule("share", share=0.4)) == [(0, 5, 5, 15, 15)]
    assert cells([weak], BoxRule("share", share=0.5, least=0.4)) == []


def test_otsu_parts_two_levels() -> None:
    assert cells([painted((0, 0, 30, 20, 40), (8, 8, 20, 16, 160))], BoxRule("otsu")) == [(0, 8, 8, 20, 16)]


def test_cells_that_touch_at_a_corner_are_one_region_and_what_lies_in_a_hole_another() -> None:
    assert cells([painted((2, 2, 5, 5, 200), (5, 5, 8, 8, 200))], BoxRule()) == [(0, 2, 2, 8, 8)]
    ring = painted((2, 2, 18, 18, 100), (4, 4, 16, 16, 0), (8, 8, 12, 12, 100))
    assert sorted(cells([ring], BoxRule())) == [(0, 2, 2, 18, 18), (0, 8, 8, 12, 12)]


def test_the_best_are_kept_and_specks_are_not() -> None:
    many = painted(*[(3 * i, 3 * i, 3 * i + 1, 3 * i + 1, 150 + 10 * i) for i in range(5)], (20, 2, 26, 8, 149))
    assert cells([many, many], BoxRule(most=1)) == [(0, 12, 12, 13, 13), (1, 12, 12, 13, 13)]
    assert cells([many], BoxRule(smallest=0.01)) == [(0, 20, 2, 26, 8)]


def test_no_map_and_cold_maps_have_no_box() -> None:
    assert len(boxes_of(np.zeros((0, 4, 4), np.uint8))) == 0
    assert len(boxes_of(np.zeros((3, 4, 4), np.uint8), BoxRule("wang"))) == 0


def test_floats_are_taken_in_steps_of_255() -> None:
    maps = np.random.default_rng(0).random((4, 20, 30))
    given, stepped = boxes_of(maps), boxes_of(np.rint(255 * maps).astype(np.uint8))
    assert np.array_equal(given.boxes_N4, stepped.boxes_N4)


@pytest.mark.parametrize("wrong", [{"hot": "cold"}, {"share": 0}, {"least": 1.5}, {"most": 0}, {"smallest": 1}])
def test_rules_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        BoxRule(**wrong)  # pyright: ignore[reportArgumentType]


def test_boxes_go_back_to_the_original_through_resizing_and_padding() -> None:
    image = np.zeros((600, 900), np.uint8)
    image[150:300, 450:720] = 255
    square, frame = fit(image, 90)
    found = boxes_of(square[None])
    assert to_original(found.boxes_N4, frame, 90, 600, 900) == pytest.approx(np.array([[450, 150, 720, 300]]), abs=1)


def test_a_box_in_the_padding_comes_out_without_area() -> None:
    frame = ResizeTransform(10, 10, 0, -150)  # the square's first 15 rows are padding
    boxes = to_original(np.array([[0.1, 0, 0.5, 0.1], [0.1, 0, 0.5, 0.5]]), frame, 90, 600, 900)
    assert boxes.tolist() == [[90, 0, 450, 0], [90, 0, 450, 300]]


def test_maps_of_a_hospital_s_day_take_minutes(tmp_path: Path) -> None:
    """14 findings on 64 x 64 cells: 200 images a second are wanted of a core; the bound leaves a busy one room."""
    told = benchmark_map_boxes.main(benchmark_map_boxes.Options(images=40, out=str(tmp_path)))
    assert sorted(told["metrics"]) == ["images_per_s_otsu", "images_per_s_share", "images_per_s_wang"]
    assert min(told["metrics"].values()) > 60
