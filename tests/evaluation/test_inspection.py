"""What inspection says about archives and shards: counts, reasons, and a page that needs no other file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr import schema
from cxr.errors import UserError
from cxr.evaluation.inspection import inspect
from cxr.reporting import archive as pictures
from cxr.reporting.archive import Tile
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, Labeling
from tests.made_shards import write_shards

SIZE = 48
NAMES = [f"p{number}/exam/{number}.png" for number in range(6)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Six images of six patients, of which the last is damaged."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "archive" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE), np.uint8)).save(path)
    (tmp_path / "archive" / NAMES[-1]).write_text("not an image")
    return tmp_path / "archive"


def boxes(tmp_path: Path) -> str:
    annotations = [{"image_id": n, "category_id": 0, "bbox": [6, 12, 24, 12]} for n in (0, 0, 1)]
    content = {
        "images": [{"id": n, "file_name": name, "height": SIZE, "width": SIZE} for n, name in enumerate(NAMES)],
        "categories": [{"id": 0, "name": "Cavity"}, {"id": 1, "name": "Scar"}],
        "annotations": annotations,
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return str(tmp_path / "boxes.json")


def test_an_archive_with_boxes_and_masks(archive: Path, tmp_path: Path) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[10:30, 10:30] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/2.png")
    labeling = Labeling(boxes=boxes(tmp_path), masks=str(tmp_path / "masks"), mask_label="Heart")
    facts = inspect(str(archive), ALL_IMAGES, labeling, str(tmp_path / "out"), images=6)
    assert (facts["images"], facts["patients"], sum(facts["splits"].values())) == (6, 6, 6)
    cavity = facts["findings"]["Cavity"]
    assert (cavity["positive"], cavity["negative"], cavity["unknown"]) == (2, 4, 0)
    assert sum(cavity["positive_by_split"].values()) == 2
    assert facts["boxes"] == {
        "images_known": 6,
        "images_with": 2,
        "total": 3,
        "most_per_image": 2,
        "by_finding": {"Cavity": 3},
    }
    assert (facts["masks"], facts["file_kinds"]) == ({"Heart": 1}, {".png": 6})
    sample = facts["sample"]
    assert (sample["images"], sample["readable"], sample["sizes_px"]) == (6, 5, {"48 x 48": 5})
    assert sum(sample["reasons"].values()) == 1
    page = Path(facts["page"]).read_text()
    assert page.count('src="data:image/') == 3  # labels, boxes and the contact sheet
    assert "unsupported file type: text" in page
    assert "Areas and centers of all 3 boxes." in page
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "boxes.png",
        "contact_sheet.png",
        "labels.png",
    ]
    json.dumps(facts)


def test_an_archive_without_any_label(archive: Path, tmp_path: Path) -> None:
    facts = inspect(str(archive), ALL_IMAGES, SOURCE_LABELS, str(tmp_path / "out"), images=2, seed=3)
    assert (facts["findings"], facts["boxes"]["total"], facts["sample"]["images"]) == ({}, 0, 2)
    text = Path(facts["report"]).read_text()
    assert "Add some with `--labels` or `--boxes`" in text
    assert "No view, modality, sex or age is known." in text


def test_shards(tmp_path: Path) -> None:
    whole = {"x_scale": 1.0, "y_scale": 1.0, "x_offset": 0.0, "y_offset": 0.0}
    bits = np.packbits(np.ones((32, 32), bool)).tobytes()
    masks = [{schema.LABEL: "Lungs", schema.MASK_BITS: bits}]
    known = {schema.RESIZE_TRANSFORM: whole, schema.MASKS: masks}
    stored = write_shards(tmp_path / "shards", {"train": 9, "val": 3}, known=lambda split, number: known)
    facts = inspect(stored, ALL_IMAGES, SOURCE_LABELS, str(tmp_path / "out"), images=4)
    assert facts["splits"] == {"train": 9, "val": 3}
    assert (facts["kind"], facts["sample"]["readable"], facts["masks"]) == ("shards", 4, {"Lungs": 12})
    with pytest.raises(UserError, match="contains shards, whose labels cannot be changed: omit --boxes"):
        inspect(stored, ALL_IMAGES, Labeling(boxes="/boxes.json"), str(tmp_path / "out"))


def test_the_contact_sheet_draws_boxes_and_masks_where_they_are() -> None:
    black = np.zeros((SIZE, SIZE))
    mask = np.zeros((SIZE, SIZE), bool)
    mask[24:36, 24:36] = True
    plain, drawn = (
        Tile("a", black),
        Tile("b", black, ["x" * 200], np.array([[6.0, 6, 18, 18]]), [""], {"Heart": mask}),
    )
    figure = pictures.contact_sheet([plain, drawn])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["box of a finding", "mask: Heart"]
    empty, full = figure.axes
    assert (len(empty.patches), len(empty.collections)) == (0, 0)
    corners = full.transData.inverted().transform(full.patches[0].get_window_extent().get_points())
    np.testing.assert_allclose(np.sort(corners, 0), [[5.5, 5.5], [17.5, 17.5]])
    (outline,) = full.collections
    assert np.round(outline.get_paths()[0].get_extents().extents, 1).tolist() == [23.5, 23.5, 35.5, 35.5]
    with pytest.raises(ValueError, match="expected at least one image"):
        pictures.contact_sheet([])


def test_boxes_are_drawn_as_shares_of_the_image() -> None:
    quarter = np.array([[0.0, 0.0, 0.5, 0.5]])
    figure = pictures.box_places({"Mass": quarter, "Nodule": np.repeat(quarter / 10, 3, 0)})
    areas, centers = figure.axes
    assert [label.get_text() for label in areas.get_yticklabels()] == ["Nodule (3)", "Mass (1)"]
    medians = [np.asarray(line.get_xydata())[0, 0] for line in areas.lines[2::3]]
    np.testing.assert_allclose(medians, [0.25, 25])
    np.testing.assert_allclose(np.asarray(centers.lines[1].get_xydata()), [[0.25, 0.25]])
