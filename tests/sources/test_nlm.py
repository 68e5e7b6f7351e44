"""Montgomery and Shenzhen: every image, with its lung mask if there is one."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.data.batch import NO_MASK, to_columns, to_tensors
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.phantom.archive import make_exam
from cxr.phantom.nlm import Layout, write_masked_phantom
from cxr.schema import PixelFormat
from cxr.sources import find_source, nlm, open_manifest

COUNT, SIZE = 4, 64
PIXELS = PixelFormat(SIZE)
BOTH = pytest.mark.parametrize("layout", ["montgomery", "shenzhen"])


@pytest.fixture
def archive(tmp_path: Path, layout: Layout) -> Path:
    write_masked_phantom(str(tmp_path), COUNT, layout, size=SIZE)
    return tmp_path


def read(archive: Path, pixels: PixelFormat = PIXELS) -> tuple[pa.Table, np.ndarray]:
    """Decoded rows, and the masks of the good ones as in a batch."""
    rows = make_rows(open_manifest(str(archive)).table, pixels, threads=1)
    good = rows.filter(rows[schema.ERROR].is_null())
    columns = to_columns(good, [schema.MASKS], pixels)
    return rows, to_tensors(columns, pixels)[schema.MASKS].numpy()


@BOTH
def test_a_phantom_archive_is_read_with_its_masks_and_poses(archive: Path, layout: Layout) -> None:
    assert find_source(str(archive)).name == layout
    manifest = open_manifest(str(archive))
    assert manifest.findings == ()
    assert manifest.table.schema.equals(schema.MANIFEST)
    assert manifest.table[schema.PATIENT_ID].to_pylist() == manifest.table[schema.IMAGE_ID].to_pylist()
    rows, masks = read(archive)
    for index, (row, mask) in enumerate(zip(rows.to_pylist(), masks, strict=True)):
        phantom = make_exam(index, size=SIZE).phantom
        np.testing.assert_array_equal(mask.astype(bool), phantom.masks[schema.LUNGS])
        np.testing.assert_allclose(row[schema.TRUE_THETA], phantom.pose_unit.reshape(-1), rtol=1e-6)
        assert row[schema.EXTRA] == f'{{"tuberculosis": {int(bool(phantom.labels))}}}'


@pytest.mark.parametrize("layout", ["montgomery"])
def test_left_is_the_patients_left(archive: Path) -> None:
    for path in (archive / "ManualMask" / "leftMask").iterdir():
        left, right = (
            cv2.imread(str(archive / "ManualMask" / f"{side}Mask" / path.name), cv2.IMREAD_UNCHANGED)
            for side in ("left", "right")
        )
        assert left.any()
        assert right.any()
        assert not (left & right).any()
        assert np.nonzero(left)[1].mean() > np.nonzero(right)[1].mean() + SIZE / 4


@BOTH
def test_other_files_of_the_full_releases_are_skipped(archive: Path) -> None:
    for path in ("ClinicalReadings/MCUCXR_0001_0.txt", "CXR_png/Thumbs.db", "NLM-MontgomeryCXRSet-ReadMe.pdf"):
        (archive / path).parent.mkdir(exist_ok=True)
        (archive / path).write_bytes(b"?")
    assert open_manifest(str(archive)).table.num_rows == COUNT


@BOTH
def test_incomplete_masks_are_null(archive: Path, layout: Layout) -> None:
    masks = sorted((archive / ("mask" if layout == "shenzhen" else "ManualMask/rightMask")).iterdir())
    masks[1].unlink()
    manifest = open_manifest(str(archive))
    assert manifest.table[schema.MASKS].is_null().to_pylist() == [False, True, False, False]
    assert any(f"without lung masks: 1 of {COUNT} images" in note for note in manifest.notes)
    rows, read_masks = read(archive)
    assert rows[schema.ERROR].null_count == COUNT
    assert (read_masks[1] == NO_MASK).all()
    assert read_masks[0].max() == 1


@BOTH
def test_all_images_are_listed_without_mask_folders(archive: Path, layout: Layout) -> None:
    folder = archive / nlm.IMAGES
    folder.rename(archive.parent / f"bare_{layout}")
    bare = archive.parent / f"alone_{layout}"
    bare.mkdir()
    (archive.parent / f"bare_{layout}").rename(bare / nlm.IMAGES)
    manifest = open_manifest(str(bare))
    assert find_source(str(bare)).name == layout
    assert manifest.table[schema.MASKS].null_count == COUNT


@BOTH
def test_a_damaged_mask_is_a_row_with_the_reason(archive: Path, layout: Layout) -> None:
    masks = sorted((archive / ("mask" if layout == "shenzhen" else "ManualMask/leftMask")).iterdir())
    masks[2].write_bytes(masks[2].read_bytes()[:60])
    rows, _ = read(archive)
    errors = rows[schema.ERROR].to_pylist()
    assert [error is None for error in errors] == [True, True, False, True]
    assert errors[2].startswith("mask of Lungs: ")


@pytest.mark.parametrize("layout", ["shenzhen"])
def test_a_mask_of_another_size_is_resized_to_its_image(archive: Path) -> None:
    _, before = read(archive)
    path = min((archive / "mask").iterdir())
    small = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert cv2.imwrite(str(path), cv2.resize(small, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST))
    _, after = read(archive)
    np.testing.assert_array_equal(before, after)


def test_an_unknown_layout_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected layout montgomery or shenzhen"):
        write_masked_phantom(str(tmp_path), 1, "jsrt")  # type: ignore[arg-type]


@pytest.mark.parametrize(("layout", "count"), [("montgomery", 138), ("shenzhen", 120)])
def test_real_archives(real_data: Path, layout: str, count: int) -> None:
    assert find_source(str(real_data / layout)).name == layout
    rows, masks = read(real_data / layout)
    assert rows.num_rows == count
    assert rows[schema.ERROR].null_count == count
    share = masks.mean((1, 2))
    assert masks.max() == 1  # every image has its mask
    assert share.min() > 0.05
    assert share.max() < 0.45
    left, right = masks[:, :, : SIZE // 2].mean((1, 2)), masks[:, :, SIZE // 2 :].mean((1, 2))
    assert np.median(left) > 0.1
    assert np.median(right) > 0.1
    stored = schema.pixels_array(rows[schema.PIXELS], PIXELS)
    assert np.mean([_darker_within(*pair) for pair in zip(stored, masks, strict=True)]) > 0.97  # on its own image


def _darker_within(image: np.ndarray, mask: np.ndarray) -> bool:
    """Fraction of masks whose rim (air) is darker than its surroundings; lower with another image's mask."""
    square = np.ones((5, 5), np.uint8)
    around, rim = (cv2.dilate(mask, square) > mask), (mask > cv2.erode(mask, square))
    return bool(image[rim].mean() < image[around].mean())


@BOTH
def test_copies_in_another_format_keep_masks_splits_and_tuberculosis(archive: Path, layout: Layout) -> None:
    published = open_manifest(str(archive)).table.to_pylist()
    for path in (archive / "CXR_png").iterdir():
        path.rename(path.with_suffix(".JPG"))
    for path in [*archive.glob("mask/*"), *archive.glob("ManualMask/leftMask/*")]:
        path.rename(path.with_suffix(".PNG"))
    assert find_source(str(archive)).name == layout
    copies = open_manifest(str(archive)).table.to_pylist()
    for name in (schema.PATIENT_ID, schema.SPLIT, schema.EXTRA):
        assert [row[name] for row in copies] == [row[name] for row in published]
    assert [len(row[schema.MASKS]) for row in copies] == [len(row[schema.MASKS]) for row in published]
