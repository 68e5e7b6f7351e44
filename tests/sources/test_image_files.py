"""Which files are listed as images, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from cxr.errors import UserError
from cxr.sources import image_files


def _write(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"?")


def test_any_extension_and_no_extension_are_accepted(tmp_path: Path) -> None:
    images = ["1.2.840.113619.5", "a/b.dcm", "a/scan", "b.JPG", "c.png", "d.unheard-of", "empty.png"]
    _write(tmp_path, *images)
    files, notes = image_files.list_images(str(tmp_path))
    assert files[image_files.PATH].to_pylist() == images
    assert [Path(uri).relative_to(tmp_path).as_posix() for uri in files["source_uri"].to_pylist()] == images
    assert notes == []


def test_files_that_are_clearly_not_images_are_skipped_and_noted(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "x.png",
        "a.csv",
        "b.CSV",
        "README",
        "study/DICOMDIR",
        ".git/x.png",
        "a/._x.png",
        "images.tar.gz",
    )
    files, notes = image_files.list_images(str(tmp_path))
    assert files[image_files.PATH].to_pylist() == ["x.png"]
    assert notes == [
        "skipped files that are not images: 2 .csv, 1 dicomdir, 2 hidden, 1 readme",
        "skipped 1 ZIP or TAR file beside the images: to read one, name it as --archive",
    ]


def test_special_files_and_links_to_them_are_counted_in_the_note(tmp_path: Path) -> None:
    _write(tmp_path, "x.png", "a.csv")
    os.mkfifo(tmp_path / "pipe")
    for number in range(2):
        (tmp_path / f"scan-{number}").symlink_to(tmp_path / "pipe")
    (tmp_path / "screen").symlink_to(os.devnull)
    files, notes = image_files.list_images(str(tmp_path))
    assert files[image_files.PATH].to_pylist() == ["x.png"]
    assert notes == ["skipped files that are not images: 1 .csv, 1 device, 3 pipe"]


def test_files_are_sorted_by_path_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_CHUNK", 3)
    names = [f"{number:02d}.png" for number in range(10)]
    _write(tmp_path, *reversed(names))
    assert image_files.list_images(str(tmp_path))[0][image_files.PATH].to_pylist() == names


def test_no_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected X-rays in"):
        image_files.list_images(str(tmp_path))
    _write(tmp_path, "labels.csv")
    with pytest.raises(UserError, match=r"1 \.csv"):
        image_files.list_images(str(tmp_path))
    with pytest.raises(UserError, match="missing"):
        image_files.list_images(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    "name",
    [
        "A.1",
        "A.1.png",
        "A.1.PNG",
        "a/b/A.1.Jpeg",
        "a\\A.1.dcm",
        " A.1.png ",
        "A.1 .png",
        "A.1.dicom.png",
        "./A.1.DICOM",
    ],
)
def test_image_key_ignores_folders_suffix_blanks_and_backslashes(name: str) -> None:
    assert image_files.image_key(name) == "A.1"


@pytest.mark.parametrize("name", ["1.2.840.113619", ".png", "a.unheard-of", "png"])
def test_image_key_keeps_other_suffixes(name: str) -> None:
    assert image_files.image_key(name) == name


def test_image_key_is_case_sensitive() -> None:
    assert image_files.image_key("a.png") != image_files.image_key("A.png")


def test_sizes_and_versions_of_listed_and_of_other_files(tmp_path: Path) -> None:
    _write(tmp_path, "archive/a.png", "archive/b.png", "elsewhere/c.png")
    uris = [str(tmp_path / name) for name in ("archive/b.png", "elsewhere/c.png", "missing.png", "archive/a.png")]
    with image_files.recorded_listings():
        first = image_files.list_images(str(tmp_path / "archive"))
        first[1].append("of the caller")
        _write(tmp_path, "archive/later.png")
        files, notes = image_files.list_images(str(tmp_path / "archive"))
        assert (files.num_rows, notes) == (2, [])
        sizes, versions = image_files.file_versions(pa.chunked_array([uris]))
    assert sizes.to_pylist() == [1, 1, 0, 1]
    times = [str(Path(uri).stat().st_mtime_ns) if Path(uri).exists() else "" for uri in uris]
    assert versions.to_pylist() == times
    assert image_files.list_images(str(tmp_path / "archive"))[0].num_rows == 3


def test_keys_of_many_names_are_those_of_each() -> None:
    names = ["A.1", "a/b/A.1.Jpeg", "a\\A.1.dcm", " A.1.png ", "A.1 .png", "x.dicom.png.png", ".png", "a.unheard-of"]
    names += ["png", "s.DCM.gz", "s.png.gz", "é/ü .TIFF", "a\n.png", "", " ", "dir/", "a. .png", "1.2.840.113619"]
    keys = image_files.image_keys(pa.chunked_array([pa.array(names[:4]), pa.array(names[4:])]))
    assert keys.to_pylist() == [image_files.image_key(name) for name in names]
