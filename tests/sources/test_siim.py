"""SIIM-ACR Pneumothorax: both releases, every image with its masks; empty masks differ from unknown ones."""

from __future__ import annotations

import csv
import shutil
from functools import reduce
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.phantom.archive import make_exam
from cxr.phantom.siim import Layout, image_uid, write_siim_phantom
from cxr.schema import PixelFormat
from cxr.sources import find_source, image_files, open_manifest, rle, siim
from cxr.sources.manifest import Manifest
from cxr.sources.options import ReadOptions
from cxr.storage import FileEntry

COUNT, SIZE = 10, 64
PIXELS = PixelFormat(SIZE)
BOTH = pytest.mark.parametrize("layout", ["siim", "siim-png"])
PNG = pytest.mark.parametrize("layout", ["siim-png"])
EMPTY_MASK = dict.fromkeys(field.name for field in schema.MASK_SOURCE_TYPE) | {
    schema.LABEL: "Pneumothorax",
    schema.MASK_RLE: "-1",
}


@pytest.fixture
def archive(tmp_path: Path, layout: Layout) -> Path:
    write_siim_phantom(str(tmp_path), COUNT, layout, size=SIZE, prevalence=0.5)
    return tmp_path


def read(archive: Path) -> tuple[Manifest, dict[str, dict]]:
    manifest = open_manifest(str(archive))
    return manifest, {row[schema.IMAGE_ID]: row for row in manifest.table.to_pylist()}


def decoded(table: pa.Table) -> dict[str, dict]:
    return {row[schema.IMAGE_ID]: row for row in make_rows(table, PIXELS, threads=1).to_pylist()}


def write_lists(folder: Path, codes: str) -> None:
    """A DICOM release of files a to d, whose content is not read."""
    for stem in "abcd":
        (folder / "study" / stem).mkdir(parents=True)
        (folder / "study" / stem / f"{stem}.dcm").write_bytes(b"?")
    (folder / siim.CODES_FILE).write_text(f"ImageId, EncodedPixels\n{codes}")


@BOTH
def test_a_phantom_archive_is_read_with_its_pixels_labels_and_masks(archive: Path, layout: Layout) -> None:
    assert find_source(str(archive)).name == "siim"
    manifest, given = read(archive)
    assert manifest.findings == ("Pneumothorax",)
    assert manifest.table.schema.equals(schema.MANIFEST)
    rows = decoded(manifest.table)
    assert len(rows) == COUNT
    positives = 0
    for index in range(COUNT):
        row, exam = rows[image_uid(index, 0)], make_exam(index, size=SIZE, findings=("Pneumothorax",))
        truth = exam.phantom.masks.get("Pneumothorax", np.zeros((SIZE, SIZE), bool))
        (mask,) = row[schema.MASKS]
        assert mask == {schema.LABEL: "Pneumothorax", schema.MASK_BITS: np.packbits(truth).tobytes()}
        assert row[schema.LABELS] == [int(truth.any())]
        pixels = np.frombuffer(row[schema.PIXELS], np.uint8)
        assert np.corrcoef(pixels, exam.phantom.pixels.ravel())[0, 1] > 0.998
        np.testing.assert_allclose(row[schema.TRUE_THETA], exam.phantom.pose_unit.reshape(-1), rtol=1e-6)
        assert given[image_uid(index, 0)][schema.PATIENT_ID] == image_uid(index, 0)
        assert (row[schema.VIEW], row[schema.SPACING_MM] is None) == (
            (exam.view, False) if layout == "siim" else (None, True)
        )
        positives += truth.any()
        if not truth.any():
            assert given[image_uid(index, 0)][schema.MASKS] == [EMPTY_MASK]
        if layout == "siim-png":
            assert (row[schema.SPLIT] == "test") == exam.is_test
    assert 0 < positives < COUNT


def codes_and_labels(rows: dict[str, dict]) -> dict[str, tuple[list[str] | None, int]]:
    return {
        image: (row[schema.MASKS] and [mask[schema.MASK_RLE] for mask in row[schema.MASKS]], row[schema.LABELS][0])
        for image, row in rows.items()
    }


def test_union_of_pieces_and_empty_masks_differ_from_unknown_ones(tmp_path: Path) -> None:
    write_lists(tmp_path, "a,0 3\nb, -1\na, 10 2\nc,5 5\n")
    manifest, rows = read(tmp_path)
    assert codes_and_labels(rows) == {"a": (["0 3", "10 2"], 1), "b": (["-1"], 0), "c": (["5 5"], 1), "d": (None, -1)}
    assert "not listed in train-rle.csv, so pneumothorax is unknown: 1 image" in manifest.notes


def test_a_blank_code_is_an_empty_mask(tmp_path: Path) -> None:
    write_lists(tmp_path, 'a,\nb, \nc,""\nd,-1\n')
    assert codes_and_labels(read(tmp_path)[1]) == dict.fromkeys("abcd", (["-1"], 0))


def test_repeated_rows_count_once_and_contradictory_rows_are_unknown(tmp_path: Path) -> None:
    write_lists(tmp_path, "a,0 3\na,0 3\nb,-1\nb,-1\nc,-1\nc,5 5\nd,\nd,1 1\n")
    manifest, rows = read(tmp_path)
    assert codes_and_labels(rows) == {"a": (["0 3"], 1), "b": (["-1"], 0), "c": (None, -1), "d": (None, -1)}
    assert manifest.notes[1:] == ["contradictory rows in train-rle.csv: 2 images; the values that differ are unknown"]


def test_an_invalid_code_is_unknown_and_noted(tmp_path: Path) -> None:
    write_lists(tmp_path, "a,none\nb,1 2 3\nc,1 2\nc,1 x\nd,-1\nd,?\n")
    manifest, rows = read(tmp_path)
    assert codes_and_labels(rows) == {"a": (None, -1), "b": (None, -1), "c": (None, 1), "d": (None, -1)}
    note = "'none' (1), '1 2 3' (1), '1 x' (1), '?' (1): the masks of these images are unknown"
    assert any(each.endswith(note) for each in manifest.notes)
    assert "with a pneumothorax but without a readable mask: 1 image" in manifest.notes


@pytest.mark.parametrize("line", ["{}.png,{}", "{}.DCM,{}", "train\\{}.dcm , {}", '"study/{}",{}'])
def test_image_ids_may_have_folders_and_suffixes(tmp_path: Path, line: str) -> None:
    codes = {"a": "0 3", "b": "-1", "c": "5 5", "d": "-1"}
    write_lists(tmp_path, "\n".join(line.format(*each) for each in codes.items()))
    (tmp_path / "study" / "a" / "a.dcm").rename(tmp_path / "a.PNG")
    found = codes_and_labels(read(tmp_path)[1])
    assert {image: found[image][0] for image in found} == {image: [code] for image, code in codes.items()}


def test_stage_2_list_is_detected(tmp_path: Path) -> None:
    write_lists(tmp_path, "a,-1\n")
    (tmp_path / "stage_2_train.csv").write_text("ImageId,EncodedPixels\na,-1\nb,1 2\n")
    assert codes_and_labels(read(tmp_path)[1])["b"] == (["1 2"], 1)
    (tmp_path / siim.CODES_FILE).unlink()
    assert find_source(str(tmp_path)).name == "siim"
    (tmp_path / "stage_2_train.csv").write_text("ID,Label\na,1\n")  # of another challenge
    assert find_source(str(tmp_path)).name == "folder"


def test_unlisted_and_some_listed_images_are_test_images(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(200)]
    for each in ("unlisted", *names):
        (tmp_path / f"{each}.dcm").write_bytes(b"?")
    (tmp_path / siim.CODES_FILE).write_text("\n".join(["ImageId, EncodedPixels", *(f"{each},-1" for each in names)]))
    splits = {image: row[schema.SPLIT] for image, row in read(tmp_path)[1].items()}
    assert splits.pop("unlisted") == "test"
    assert 5 < sum(split == "test" for split in splits.values()) < 60


def test_a_hash_chooses_test_images_if_all_are_listed(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(200)]
    for each in names:
        (tmp_path / f"{each}.dcm").write_bytes(b"?")
    (tmp_path / siim.CODES_FILE).write_text("\n".join(["ImageId, EncodedPixels", *(f"{each},-1" for each in names)]))
    splits = [row[schema.SPLIT] for row in read(tmp_path)[1].values()]
    assert {split: splits.count(split) > 5 for split in schema.SPLITS} == {"train": True, "val": True, "test": True}


def test_listed_images_that_are_missing_are_counted(tmp_path: Path) -> None:
    write_lists(tmp_path, "a,-1\nb,-1\nc,-1\nd,-1\ne,-1\n")
    expected = "missing from the archive: 1 of 5 images listed in train-rle.csv; continuing with 4 images"
    assert expected in read(tmp_path)[0].notes


def test_two_files_of_an_image_are_in_one_split(tmp_path: Path) -> None:
    write_lists(tmp_path, "a,0 3\nb,-1\nc,-1\n")
    (tmp_path / "a.dcm").write_bytes(b"?")
    _, rows = read(tmp_path)
    assert set(rows) == {"a.dcm", "study/a/a.dcm", "b", "c", "d"}
    one, other = rows["a.dcm"], rows["study/a/a.dcm"]
    assert all(one[name] == other[name] for name in (schema.PATIENT_ID, schema.SPLIT, schema.LABELS, schema.MASKS))


@PNG
def test_the_png_release_takes_precedence(archive: Path) -> None:
    write_siim_phantom(str(archive), 2, "siim", size=SIZE)
    assert read(archive)[0].table.num_rows == COUNT


@PNG
def test_a_positive_image_without_mask_file_has_an_unknown_mask(archive: Path) -> None:
    lost = min(archive.glob("png_masks/*_1_.png"))
    lost.unlink()
    manifest, rows = read(archive)
    (row,) = [row for row in rows.values() if row[schema.SOURCE_URI].endswith(lost.name)]
    assert (row[schema.LABELS], row[schema.MASKS]) == ([1], None)
    assert "with a pneumothorax but without a readable mask: 1 image" in manifest.notes


@PNG
def test_copies_of_the_png_release_keep_labels_masks_and_splits(archive: Path) -> None:
    published = list(read(archive)[1].values())
    for path in (archive / "png_images").iterdir():
        path.rename(path.with_suffix(".JPG"))
    for path in (archive / "png_masks").iterdir():
        path.rename(path.with_suffix(".PNG"))
    copies = list(read(archive)[1].values())
    for name in (schema.IMAGE_ID, schema.LABELS, schema.SPLIT, schema.EXTRA):
        assert [row[name] for row in copies] == [row[name] for row in published]
    assert [row[schema.MASKS] is None for row in copies] == [row[schema.MASKS] is None for row in published]


@PNG
def test_contradictory_png_lists_are_unknown_test_images(archive: Path) -> None:
    lines = (archive / siim.TRAIN_FILE).read_text().splitlines()
    name, image, label = lines[1].split(",")
    again = f"{name},{image},{1 - int(label)}"
    odd = f"{lines[2].rpartition(',')[0]},perhaps"
    (archive / siim.TRAIN_FILE).write_text("\n".join([*lines[:2], lines[1], odd, *lines[3:]]))
    with (archive / siim.TEST_FILE).open("a") as file:
        file.write(f"{again}\n")
    manifest, rows = read(archive)
    assert (rows[image][schema.LABELS], rows[image][schema.MASKS], rows[image][schema.SPLIT]) == ([-1], None, "test")
    assert rows[lines[2].split(",")[1]][schema.LABELS] == [-1]
    assert [note for note in manifest.notes if siim.TRAIN_FILE in note] == [
        "unrecognized words in has_pneumo in stage_1_train_images.csv, 'perhaps' (1): the labels of these images are "
        "unknown",
        "contradictory rows in stage_1_train_images.csv and stage_1_test_images.csv: 1 image; the values that differ "
        "are unknown",
        "listed in both stage_1_train_images.csv and stage_1_test_images.csv, used for testing: 1 image",
    ]


@PNG
def test_mask_files_of_images_without_pneumothorax_are_not_read(archive: Path) -> None:
    for path in archive.glob("png_masks/*_0_.png"):
        path.write_bytes(b"no picture")
    assert not any(row[schema.ERROR] for row in decoded(read(archive)[0].table).values())


@PNG
def test_a_mask_of_half_the_size_is_resized_to_its_image(archive: Path) -> None:
    path = min(archive.glob("png_masks/*_1_.png"))
    small = cv2.resize(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), None, fx=0.5, fy=0.5)
    assert cv2.imwrite(str(path), small)
    (row,) = [row for row in decoded(read(archive)[0].table).values() if row[schema.SOURCE_URI].endswith(path.name)]
    area = np.unpackbits(np.frombuffer(row[schema.MASKS][0][schema.MASK_BITS], np.uint8)).sum()
    assert area == 4 * (small > small.max() // 2).sum()


@BOTH
def test_a_code_that_exceeds_the_image_is_a_row_with_the_reason(archive: Path, layout: Layout) -> None:
    if layout == "siim":
        (archive / siim.CODES_FILE).write_text(f"ImageId, EncodedPixels\n{image_uid(0, 0)}, 5000 10\n")
    else:
        shutil.copy(archive / siim.TRAIN_FILE, next(archive.glob("png_masks/*_1_.png")))
    errors = [row[schema.ERROR] for row in decoded(read(archive)[0].table).values() if row[schema.ERROR]]
    assert len(errors) == 1
    assert ("exceeds the image" if layout == "siim" else "mask of Pneumothorax: ") in errors[0]


@pytest.mark.parametrize(
    ("files", "trouble"),
    [
        ({"a.dcm": ""}, "expected train-rle.csv, stage_2_train.csv or png_images/ with stage_1_train_images.csv"),
        ({siim.CODES_FILE: "ImageId, EncodedPixels\na,-1\n"}, "expected X-rays in"),
        ({siim.CODES_FILE: "ImageId\na\n", "a.dcm": ""}, "line 1: .* got 1 columns without EncodedPixels"),
        ({siim.CODES_FILE: "ImageId,EncodedPixels\na\n", "a.dcm": ""}, "line 2: expected 2 fields, .* got 1"),
        ({siim.CODES_FILE: "", "a.dcm": ""}, "expected a header with the columns ImageId, EncodedPixels"),
        ({siim.TRAIN_FILE: "file,ImageId\n", "png_images/a.png": ""}, "without new_filename, has_pneumo"),
    ],
)
def test_user_errors_say_what_was_expected(tmp_path: Path, files: dict[str, str], trouble: str) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    with pytest.raises(UserError, match=trouble):
        open_manifest(str(tmp_path), ReadOptions(source="siim"))


def test_an_unknown_layout_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected layout siim or siim-png"):
        write_siim_phantom(str(tmp_path), 1, "jsrt")  # type: ignore[arg-type]


def test_phantoms_have_the_prevalence_of_the_original() -> None:
    drawn = [make_exam(index, size=64, findings=("Pneumothorax",), prevalence=0.22) for index in range(60)]
    assert 0.08 < np.mean([bool(exam.phantom.labels) for exam in drawn]) < 0.4


@pytest.mark.slow
def test_the_published_codes_with_all_images(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (real_data / "siim" / siim.CODES_FILE).open() as file:
        names = sorted({line[0] for line in csv.reader(file)} - {"ImageId"})
    entries = [FileEntry(f"{tmp_path}/{name}.dcm", f"{name}.dcm", 1) for name in names]
    monkeypatch.setattr(image_files, "list_files", lambda uri, *_: iter(entries))
    manifest = siim.manifest(str(real_data / "siim"))
    assert manifest.notes == []
    rows = manifest.table.to_pylist()
    assert len(rows) == 12_047
    assert sum(row[schema.LABELS] == [1] for row in rows) == 2_669
    assert sum(row[schema.MASKS] == [EMPTY_MASK] for row in rows) == 9_378
    assert max(len(row[schema.MASKS]) for row in rows) == 10
    areas, sums = np.transpose([_areas(row[schema.MASKS]) for row in rows if row[schema.LABELS] == [1]])
    assert (np.median(areas), min(areas), max(areas)) == (8_630, 55, 161_421)
    assert np.median(sums) == 8_771
    assert (areas < sums).sum() == 183


def _areas(masks: list[dict[str, str]]) -> tuple[int, int]:
    """Pixels of the union of an image's masks, and the sum of their pixels: pieces may overlap."""
    pieces = [rle.decode(mask[schema.MASK_RLE], 1024, 1024) for mask in masks]
    return int(reduce(np.logical_or, pieces).sum()), sum(int(piece.sum()) for piece in pieces)


def test_real_dicoms(real_data: Path) -> None:
    assert find_source(str(real_data / "siim")).name == "siim"
    manifest, rows = read(real_data / "siim")
    listed, twin = rows.values()
    assert (listed[schema.LABELS], listed[schema.MASKS]) == ([0], [EMPTY_MASK])
    assert (twin[schema.LABELS], twin[schema.MASKS], twin[schema.SPLIT]) == ([-1], None, "test")
    assert not any(row[schema.ERROR] for row in decoded(manifest.table).values())
