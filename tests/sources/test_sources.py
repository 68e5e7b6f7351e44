"""Detect the source of an archive and open it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import SOURCES, find_source, open_manifest
from cxr.sources.options import ReadOptions

ENTRY = "Image Index,Finding Labels,Patient ID,View Position\n00000001_000.png,Mass,1,PA\n"


def test_layouts_are_detected_by_their_files(tmp_path: Path) -> None:
    assert find_source(str(tmp_path)).name == "folder"
    (tmp_path / "Data_Entry_2017.csv").write_text(ENTRY)
    assert find_source(str(tmp_path)).name == "chestxray14"
    assert find_source(str(tmp_path), "folder").name == "folder"
    assert SOURCES[-1].name == "folder"


def test_opening_by_detection_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017.csv").write_text(ENTRY)
    (tmp_path / "00000001_000.png").write_bytes(b"?")
    assert open_manifest(str(tmp_path)).findings == schema.FINDINGS
    assert open_manifest(str(tmp_path), ReadOptions(source="folder")).findings == ()
    assert open_manifest(f"file://{tmp_path}/").table[schema.IMAGE_ID].to_pylist() == ["00000001_000.png"]


def test_a_single_image_is_an_archive(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"?")
    assert open_manifest(str(tmp_path / "a.dcm")).table[schema.SOURCE_URI].to_pylist() == [str(tmp_path / "a.dcm")]


@pytest.mark.parametrize(
    ("folder", "source", "trouble"),
    [
        ("", "x-rays", r"expected source auto, list, chestxray14, .*, folder, got 'x-rays'"),
        ("", "auto", "expected X-rays in .*, got no files"),
        ("", "chestxray14", "expected Data_Entry_2017_v2020.csv or Data_Entry_2017.csv in"),
        ("missing", "auto", "missing"),
    ],
)
def test_user_errors_say_what_was_expected(tmp_path: Path, folder: str, source: str, trouble: str) -> None:
    with pytest.raises(UserError, match=trouble):
        open_manifest(str(tmp_path / folder), ReadOptions(source=source))
