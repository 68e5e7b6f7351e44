"""Archives in ZIP and TAR files give the same manifest and the same rows as the same files in a folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.phantom.archive import write_phantom
from cxr.phantom.jsrt import write_jsrt_phantom
from cxr.phantom.nlm import write_masked_phantom
from cxr.phantom.siim import write_siim_phantom
from cxr.phantom.vinbigdata import write_vinbigdata_phantom
from cxr.schema import PixelFormat
from cxr.sources import find_source, image_files, open_manifest
from cxr.sources.image_files import PATH, list_images
from cxr.sources.manifest import Manifest
from cxr.sources.options import ReadOptions
from tests.made_containers import SUFFIXES, container, saved, tarred, zipped
from tests.odd_files import dataset, dicom

COUNT, SIZE = 4, 64
PIXELS = PixelFormat(32)
LAYOUTS: Mapping[str, Callable[[str], None]] = {
    "chestxray14": partial(write_phantom, count=COUNT, size=SIZE),
    "montgomery": partial(write_masked_phantom, count=COUNT, layout="montgomery", size=SIZE),
    "shenzhen": partial(write_masked_phantom, count=COUNT, layout="shenzhen", size=SIZE),
    "siim": partial(write_siim_phantom, count=COUNT, size=SIZE),
    "jsrt": partial(write_jsrt_phantom, count=2, size=SIZE),
    "vinbigdata": partial(write_vinbigdata_phantom, count=COUNT, size=SIZE),
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def values(manifest: Manifest, root: str) -> str:
    """All values as text, with URIs relative to the archive."""
    return json.dumps(manifest.table.to_pylist()).replace(f"{root}/", "")


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read_from_containers(tmp_path: Path, layout: str, suffix: str) -> None:
    folder = tmp_path / "folder"
    LAYOUTS[layout](str(folder))
    packed = saved(tmp_path / f"packed.{suffix}", container(files_of(folder), suffix))
    assert find_source(packed).name == layout
    expected, got = open_manifest(str(folder)), open_manifest(packed)
    assert values(got, f"{packed}!") == values(expected, str(folder))
    assert (got.findings, got.notes, got.boxes_frame_px) == (
        expected.findings,
        expected.notes,
        expected.boxes_frame_px,
    )
    rows, packed_rows = (make_rows(each.table, PIXELS) for each in (expected, got))
    assert packed_rows[schema.ERROR].null_count == packed_rows.num_rows
    names = [name for name in rows.column_names if name != schema.SOURCE_URI]
    assert packed_rows.select(names).equals(rows.select(names))


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 4000, (40, 50)).astype(np.uint16)


DICOM_FILES = {f"p{number % 3}/e/{number}.dcm": dicom(dataset(picture(number))) for number in range(6)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_with_nothing_but_containers_is_read(tmp_path: Path, suffix: str) -> None:
    saved(tmp_path / "export" / f"a.{suffix}", container(DICOM_FILES, suffix))
    saved(
        tmp_path / "export" / "deep" / f"b.{suffix}",
        container({"x.dcm.gz": gzip.compress(DICOM_FILES["p0/e/0.dcm"], mtime=0)}, suffix),
    )
    saved(tmp_path / "export" / "labels.csv", b"a,b\n")
    assert find_source(str(tmp_path / "export")).name == "dicom"
    manifest = open_manifest(str(tmp_path / "export"), ReadOptions(source="folder"))
    paths = [f"a.{suffix}/{path}" for path in sorted(DICOM_FILES)]
    assert manifest.table[schema.IMAGE_ID].to_pylist() == [*paths, f"deep/b.{suffix}/x.dcm.gz"]
    assert "the images are read from 2 ZIP or TAR files without unpacking" in manifest.notes
    rows = make_rows(manifest.table, PIXELS)
    assert rows[schema.ERROR].null_count == 7
    assert rows[schema.HEIGHT_PX].to_pylist() == [40] * 7


def test_containers_beside_images_are_skipped_with_a_note(tmp_path: Path) -> None:
    saved(tmp_path / "1.dcm", b"?")
    saved(tmp_path / "a.zip", zipped(DICOM_FILES))
    files, notes = list_images(str(tmp_path))
    assert files[PATH].to_pylist() == ["1.dcm"]
    assert notes == ["skipped 1 ZIP or TAR file beside the images: to read one, name it as --archive"]


def test_containers_in_containers_are_not_opened(tmp_path: Path) -> None:
    inner = zipped(DICOM_FILES)
    saved(tmp_path / "a.zip", zipped({"1.dcm": b"?", "inner.zip": inner, "inner.tar": tarred(DICOM_FILES)}))
    files, notes = list_images(str(tmp_path))
    assert files[PATH].to_pylist() == ["a.zip/1.dcm"]
    assert notes[0] == "skipped files that are not images: 1 .tar, 1 .zip"
    saved(tmp_path / "a.zip", zipped({"inner.zip": inner}))
    with pytest.raises(UserError, match=r"got no images .*1 \.zip"):
        open_manifest(str(tmp_path))
    with pytest.raises(UserError, match=r"got no images .*1 \.zip"):
        open_manifest(str(tmp_path / "a.zip"))


def test_skipped_members_of_containers_are_counted(tmp_path: Path) -> None:
    saved(tmp_path / "a.zip", zipped({"../1.dcm": b"?", "/2.dcm": b"?", "3.dcm": b"?", "__MACOSX/._3.dcm": b"?"}))
    saved(tmp_path / "b.tar", tarred({"../1.dcm": b"?", "4.dcm": b"?"}))
    files, notes = list_images(str(tmp_path))
    assert files[PATH].to_pylist() == ["a.zip/3.dcm", "b.tar/4.dcm"]
    assert notes[0] == "skipped files that are not images: 1 hidden, 3 unsafe name"


def test_unusable_members_and_containers_are_rows_with_the_reason(tmp_path: Path) -> None:
    good = DICOM_FILES["p0/e/0.dcm"]
    data = zipped(
        {"1.dcm": good, "2.dcm": good, "3.txt": b"", "4.dcm": b"PK\x03\x04", "5.dcm.gz": b"\x1f\x8b" + bytes(40)}
    )
    second = data.rindex(b"PK\x01\x02", 0, data.index(b"2.dcm", data.index(b"PK\x01\x02")))
    saved(tmp_path / "a.zip", data[: second + 8] + b"\x01" + data[second + 9 :])
    saved(tmp_path / "b.zip", data[: len(data) // 2])
    tar = tarred({"1.dcm": good, "2.dcm": good})
    saved(tmp_path / "c.tar", tar[: tar.index(b"2.dcm") + 600])
    manifest = open_manifest(str(tmp_path))
    rows = make_rows(manifest.table, PIXELS)
    assert dict(zip(rows[schema.IMAGE_ID].to_pylist(), rows[schema.ERROR].to_pylist(), strict=True)) == {
        "a.zip/1.dcm": None,
        "a.zip/2.dcm": "unusable file: it is encrypted",
        "a.zip/4.dcm": "unsupported file type: ZIP archive; expected DICOM, PNG or JPEG",
        "a.zip/5.dcm.gz": "unusable file: its compressed data are damaged",
        "b.zip!": "unusable file: its directory is missing or damaged (File is not a zip file)",
        "c.tar!": "unusable file: damaged or truncated after 2 members (unexpected end of data)",
        "c.tar/1.dcm": None,
        "c.tar/2.dcm": "unusable file: it is truncated",
    }
    with pytest.raises(UserError, match="repair, repack or remove it"):
        open_manifest(str(tmp_path / "b.zip"))


def test_members_larger_than_an_image_may_be_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.imaging.image.MAX_FILE_BYTES", 10_000)
    large = dicom(dataset(np.random.default_rng(0).integers(0, 4000, (100, 100)).astype(np.uint16)))
    for suffix in SUFFIXES:
        saved(
            tmp_path / f"a.{suffix}", container({"1.dcm": large, "2.dcm.gz": gzip.compress(large, mtime=0)}, suffix)
        )
    manifest = open_manifest(str(tmp_path), ReadOptions(source="folder"))  # which uses all copies of a file
    rows = make_rows(manifest.table, PIXELS)
    assert rows.num_rows == 8
    assert all(
        (error or "").startswith("too large: expected a file of at most") for error in rows[schema.ERROR].to_pylist()
    )


def test_labels_join_compressed_dicom_files() -> None:
    assert image_files.image_key("a/1.2.3.dcm.gz") == image_files.image_key("1.2.3.DICOM.GZ") == "1.2.3"
    assert image_files.image_key("labels.csv.gz") == "labels.csv.gz"
