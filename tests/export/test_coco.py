"""COCO JSON of predictions: the result format's fields, and boxes and masks as our own reader reads them back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cxr import schema
from cxr.cli.commands.export_coco import Options, main
from cxr.cli.exports import check_formats, export_all
from cxr.errors import UserError
from cxr.export import coco
from cxr.sources import rle
from cxr.sources.coco import boxes, mask_code, read_coco
from tests.export.scored_parts import box, image, part, probabilities, write_run

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


def exported(tmp_path: Path, family: str, *rows: dict[str, Any], min_score: float = 0.0) -> dict[str, Any]:
    parts = [part(family, [row]) for row in rows]
    coco.write_coco(parts, str(tmp_path / "coco.json"), family, ["/archive"], min_score)
    content = json.loads((tmp_path / "coco.json").read_text())
    assert [annotation["id"] for annotation in content["annotations"]] == [*range(1, len(content["annotations"]) + 1)]
    for annotation in content["annotations"]:  # https://cocodataset.org/#format-results, and what pycocotools needs
        assert {"image_id", "category_id", "bbox", "score", "area", "iscrowd"} <= set(annotation)
        assert 0 <= annotation["score"] <= 1
        assert annotation["image_id"] in {image["id"] for image in content["images"]}
        assert annotation["category_id"] in {category["id"] for category in content["categories"]}
    return content


def test_boxes_are_read_back(tmp_path: Path) -> None:
    found = [box("Nodule", 0.75, 1.5, 2, 11.5, 22), box("Mass", 0.125, 0, 0, 40, 30)]
    content = exported(
        tmp_path,
        "detect",
        image("1/a.png", pred_boxes=found),
        image("1/b.png", pred_boxes=[]),
        image("1/c.png", error="truncated PNG"),
    )
    assert content["images"] == [
        {"id": 1, "file_name": "1/a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "1/b.png", "width": 40, "height": 30},
    ]
    assert content["annotations"][0] == {
        **{"id": 1, "image_id": 1, "category_id": 2, "bbox": [1.5, 2, 10, 20], "area": 200, "score": 0.75},
        "iscrowd": 0,
    }
    read = read_coco(str(tmp_path / "coco.json"))
    assert read.labels == ("Mass", "Nodule")
    assert read.sizes_px == {"1/a": [30, 40], "1/b": [30, 40]}
    corners = (schema.LABEL, schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)
    assert [[entry[name] for name in corners] for entry in boxes(read)["1/a"]] == [
        ["Nodule", 1.5, 2, 11.5, 22],
        ["Mass", 0, 0, 40, 30],
    ]
    assert boxes(read)["1/b"] == []


def test_masks_are_read_back(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:12, 20:26] = True
    scores = {"mask_rle": rle.encode(mask), "mask_area_px": int(mask.sum()), "mask_probability": 0.25}
    empty = {"mask_rle": rle.EMPTY, "mask_area_px": 0, "mask_probability": 0.0}
    content = exported(tmp_path, "pneumothorax", image("a.png", **scores), image("b.png", **empty))
    (annotation,) = content["annotations"]
    assert (annotation["bbox"], annotation["area"], annotation["score"]) == ([20, 5, 6, 7], 42, 0.25)
    read = read_coco(str(tmp_path / "coco.json"))
    assert read.labels == (schema.PNEUMOTHORAX,)
    code, form, size = mask_code(read, read.annotations[0])
    assert size == [30, 40]
    assert np.array_equal(rle.decode(code, 30, 40, form), mask)


def test_a_mask_without_a_probability_has_the_score_1(tmp_path: Path) -> None:
    scores = {"mask_rle": "0 30", "mask_area_px": 30, "mask_probability": math.nan}
    content = exported(tmp_path, "lungs", image("a.png", **scores))
    assert content["annotations"][0]["score"] == 1
    assert content["categories"] == [{"id": 1, "name": schema.LUNGS}]


@given(MASKS)
def test_counts_bounds_and_text_of_any_mask(mask: np.ndarray) -> None:
    counts = rle.to_counts(rle.encode(mask), mask.size)
    assert sum(counts) == mask.size
    assert rle.from_counts(counts) == rle.encode(mask)
    assert rle.uncompressed(rle.compressed(counts)) == counts
    if mask.any():
        y, x = np.nonzero(mask)
        expected = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert coco._bounds(counts, len(mask)) == expected


@given(st.lists(st.integers(0, 10**9), max_size=20))
def test_compressed_text_of_any_counts(counts: list[int]) -> None:
    assert rle.uncompressed(rle.compressed(counts)) == counts


def test_boxes_below_the_minimum_score_are_left_out(tmp_path: Path) -> None:
    found = [box("Mass", score, 1, 2, 3, 4) for score in (0.75, 0.25)]
    content = exported(tmp_path, "detect", image("a.png", pred_boxes=found), min_score=0.5)
    assert [annotation["score"] for annotation in content["annotations"]] == [0.75]


def test_a_file_outside_the_archive_is_named_by_its_id(tmp_path: Path) -> None:
    elsewhere = image("0123abcd", source_uri="89ef", pred_boxes=[])
    assert exported(tmp_path, "detect", elsewhere)["images"][0]["file_name"] == "0123abcd"


def test_the_command_reads_a_run_and_refuses_classifiers(tmp_path: Path) -> None:
    rows = [[image("a.png", pred_boxes=[box("Mass", 0.5, 1, 2, 3, 4)])], [image("b.png", error="blank")]]
    run = write_run(tmp_path / "run", "detect", rows)
    result = main(Options(run=run, out=str(tmp_path / "out")))
    assert result["metrics"] == {"images": 1, "annotations": 1, "errors": 1}
    assert json.loads((tmp_path / "out" / "coco.json").read_text())["annotations"][0]["bbox"] == [1, 2, 2, 2]
    classified = write_run(tmp_path / "classified", "classify", [[image("a.png", **probabilities(0.5, 0.5))]])
    with pytest.raises(UserError, match="got one of family classify"):
        main(Options(run=classified, out=str(tmp_path / "out")))


def test_formats_that_no_checkpoint_fills_are_refused_before_scoring() -> None:
    check_formats(["csv"], ["classify"])
    check_formats(["csv", "coco"], ["classify", "lungs"])
    with pytest.raises(UserError, match="COCO JSON cannot contain its scores"):
        check_formats(["coco"], ["classify"])


def test_scoring_can_export_all_formats(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "detect", [[image("a.png", pred_boxes=[])]])
    assert export_all(run, ["csv", "coco"]) == [f"{run}/exports/scores.csv", f"{run}/exports/coco.json"]
    assert all(Path(uri).exists() for uri in export_all(run, ["csv", "coco"]))
    assert export_all(run, []) == []
