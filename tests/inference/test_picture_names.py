"""Pictures of images: one file for each image id, with a name that file systems accept, in the palette's colors."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cxr.families.outlines import outlined_boxes, outlined_masks
from cxr.inference.part_scorer import picture_name, png
from cxr.reporting import palette

IDS = [
    *("IM0001", "IM0001.png", "IM0001.PNG", "IM0001.png.png", "IM0001.dcm", "IM0001.dcm.png", "IM0001.png/IM0001"),
    *("x/b.dcm", "x//b.dcm", "/x/b.dcm", "./x/b.dcm", "../x/b.dcm", "../../etc/passwd", "..", ".", "", "x.", "x "),
    *("%", "%2E", "%25", "x%b", "x%25b", "n" * 255, "n" * 254 + "m", "é" * 120, "é" * 119 + "è", "x/" + "n" * 255),
    *("/".join("n" * 150 for _ in range(folders)) for folders in (20, 40)),
    *("a\0b", "a%00b", "a\nb", "a\\b", "a:b", "a?b", "x./b", "x%2E/b", "x.png/b", "x%.png/b"),
    *("CON", "%43ON", "CON.dcm", "con", "nul/b", "COM1.x/b", "CONTRAST"),
]


def test_every_image_id_has_a_picture_file_of_its_own() -> None:
    assert len({picture_name(image_id) for image_id in IDS}) == len(IDS)
    assert picture_name("IM0001") == "IM0001.png"
    assert picture_name("study/IM0001.dcm") == "study/IM0001.dcm.png"


def test_pictures_stay_in_their_folder_and_can_be_written(tmp_path: Path) -> None:
    for image_id in IDS:
        path = tmp_path / "aligned" / picture_name(image_id)
        assert Path(os.path.normpath(path)).is_relative_to(tmp_path / "aligned")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)


def test_names_that_windows_reserves_are_not_used() -> None:
    reserved = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[. ]", re.IGNORECASE)
    for image_id in IDS:
        assert not re.search(r'[\x00-\x1f"*:<>?\\|]', picture_name(image_id))
        assert not any(map(reserved.fullmatch, picture_name(image_id).split("/")))
    assert picture_name("CONTRAST") == "CONTRAST.png"


def test_a_saved_outline_has_the_color_of_predictions() -> None:
    images = torch.full((1, 1, 32, 32), 0.5)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 9:24, 9:24] = True
    boxes = torch.tensor([[[0.25, 0.25, 0.75, 0.75]]])
    for drawn in (outlined_boxes(images, boxes), outlined_masks(images, mask)):
        saved = np.asarray(Image.open(io.BytesIO(png(drawn[0].numpy()))))
        assert tuple(saved[8, 16]) == palette.rgb(palette.PREDICTION)
        assert tuple(saved[16, 16]) == (128, 128, 128)
