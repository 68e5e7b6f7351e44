"""JSRT with SCR's masks: raw images with dense tissue bright, lung masks from both folds, nodules as labels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.phantom.archive import make_exam
from cxr.phantom.jsrt import write_jsrt_phantom
from cxr.schema import PixelFormat
from cxr.sources import find_source, open_manifest
from cxr.sources.manifest import Manifest

COUNT, SIZE = 4, 64
PIXELS = PixelFormat(SIZE, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jsrt")
    write_jsrt_phantom(str(folder), COUNT, size=SIZE)
    return folder


@pytest.fixture
def archive(made: Path, tmp_path: Path) -> Path:
    """A copy made of links, which tests may modify."""
    for path in made.rglob("*.*"):
        link = tmp_path / path.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return tmp_path


def read(archive: Path) -> tuple[Manifest, list[dict]]:
    manifest = open_manifest(str(archive))
    return manifest, make_rows(manifest.table, PIXELS, threads=1).to_pylist()


def test_a_phantom_archive_is_read_with_its_pixels_nodules_and_lungs(archive: Path) -> None:
    assert find_source(str(archive)).name == "jsrt"
    manifest, rows = read(archive)
    assert manifest.findings == ("Nodule",)
    assert manifest.table.schema.equals(schema.MANIFEST)
    exams = [make_exam(i, size=SIZE, findings=("Nodule",), prevalence=0.62) for i in range(COUNT)]
    with_nodule = [exam.phantom for exam in exams if exam.phantom.labels]
    phantoms = [*with_nodule, *(exam.phantom for exam in exams if not exam.phantom.labels)]
    assert 0 < len(with_nodule) < COUNT
    for row, phantom in zip(rows, phantoms, strict=True):
        assert row[schema.LABELS] == [int(bool(phantom.labels))]
        assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX]) == (2048, 2048)
        assert row[schema.SPACING_MM] == pytest.approx([0.175, 0.175])
        pixels = np.frombuffer(row[schema.PIXELS], np.uint16) / 257
        assert np.abs(pixels - phantom.pixels.ravel()).mean() < 5  # it was enlarged and shrunk again
        (mask,) = row[schema.MASKS]
        lungs = np.unpackbits(np.frombuffer(mask[schema.MASK_BITS], np.uint8)).reshape(SIZE, SIZE)
        assert mask[schema.LABEL] == schema.LUNGS
        np.testing.assert_array_equal(lungs.astype(bool), phantom.masks[schema.LUNGS])
        np.testing.assert_allclose(row[schema.TRUE_THETA], phantom.pose_unit.reshape(-1), rtol=1e-6)


def test_masks_outside_of_fold_folders(archive: Path) -> None:
    _, before = read(archive)
    for path in list(archive.glob("fold*/masks/*/*.gif")):
        target = archive / "masks" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    _, after = read(archive)
    assert [row[schema.MASKS] for row in before] == [row[schema.MASKS] for row in after]


def test_other_files_of_scr_and_jsrt_are_skipped(archive: Path) -> None:
    for path in ("fold1/masks/heart/JPCLN001.gif", "fold1/landmarks/JPCLN001.pfs", "CLNDAT_EN.txt"):
        (archive / path).parent.mkdir(exist_ok=True, parents=True)
        (archive / path).write_bytes(b"?")
    manifest = open_manifest(str(archive))
    assert manifest.table.num_rows == COUNT
    assert "skipped files that are neither images of the database nor lung masks: 2" in manifest.notes


@pytest.mark.parametrize("side", ["left lung", "right lung"])
def test_one_lung_alone_is_not_a_mask(archive: Path, side: str) -> None:
    (archive / "fold1" / "masks" / side / "JPCLN001.gif").unlink()
    manifest, rows = read(archive)
    assert manifest.table[schema.MASKS].is_null().to_pylist() == [True, False, False, False]
    assert f"without lung masks: 1 of {COUNT} images" in manifest.notes
    assert not any(row[schema.ERROR] for row in rows)


def test_a_damaged_mask_is_a_row_with_the_reason(archive: Path) -> None:
    path = archive / "fold1" / "masks" / "left lung" / "JPCLN001.gif"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    errors = [row[schema.ERROR] for row in read(archive)[1]]
    assert errors[0].startswith("mask of Lungs: damaged GIF")
    assert errors[1:] == [None] * (COUNT - 1)


def test_copies_as_png_of_another_size_keep_their_spacing(archive: Path) -> None:
    pixels = make_exam(0, size=512).phantom.pixels
    assert cv2.imwrite(str(archive / "JPCNN093.png"), pixels)
    (row,) = [row for row in read(archive)[1] if row[schema.IMAGE_ID] == "JPCNN093.png"]
    assert (row[schema.PATIENT_ID], row[schema.LABELS], row[schema.MASKS]) == ("JPCNN093", [0], [])
    assert row[schema.SPACING_MM] == pytest.approx([0.7, 0.7])


def test_copies_in_another_format_keep_masks_and_labels(archive: Path) -> None:
    published = open_manifest(str(archive)).table.to_pylist()
    for path in [*archive.glob("*.IMG"), *archive.rglob("left lung/*.gif")]:
        path.rename(path.with_suffix(".Tiff"))
    copies = open_manifest(str(archive)).table.to_pylist()
    for name in (schema.PATIENT_ID, schema.SPLIT, schema.LABELS):
        assert [row[name] for row in copies] == [row[name] for row in published]
    assert [len(row[schema.MASKS]) for row in copies] == [2] * COUNT


@pytest.mark.parametrize(
    "place", ["JPCNN001.IMG", "JPCLN001.jpg", "All247images/JPCLN001.IMG", "scratch/fold1/masks/left lung/x.gif"]
)
def test_layout_is_detected_in_any_unpacked_folder(tmp_path: Path, place: str) -> None:
    assert find_source(str(tmp_path)).name == "folder"
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"?")
    assert find_source(str(tmp_path)).name == "jsrt"


def test_error_without_images(tmp_path: Path) -> None:
    (tmp_path / "fold1" / "masks" / "left lung").mkdir(parents=True)
    (tmp_path / "fold1" / "masks" / "left lung" / "JPCLN001.gif").write_bytes(b"?")
    with pytest.raises(UserError, match=r"expected images named JPCLN001\.IMG … JPCNN093\.IMG in"):
        open_manifest(str(tmp_path))
