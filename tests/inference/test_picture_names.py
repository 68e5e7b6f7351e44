"""Pictures of images: one file for each image id, inside the folder, with a name that file systems accept."""

from __future__ import annotations

import os
from pathlib import Path

from cxr.inference.score import picture_name

IDS = [
    *("IM0001", "IM0001.png", "IM0001.PNG", "IM0001.png.png", "IM0001.dcm", "IM0001.dcm.png"),
    *("x/b.dcm", "x//b.dcm", "/x/b.dcm", "./x/b.dcm", "../x/b.dcm", "../../etc/passwd", "..", ".", ""),
    *("%", "%2E", "%25", "x%b", "x%25b", "n" * 255, "n" * 254 + "m", "é" * 120, "é" * 119 + "è", "x/" + "n" * 255),
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
