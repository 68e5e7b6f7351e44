"""Masks given with an archive: folders of pictures, COCO JSON, run lengths in CSV and CheXmask's tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources import open_manifest, rle
from cxr.sources.manifest import Manifest
from cxr.sources.options import Labeling

HEIGHT, WIDTH = 40, 30
LEFT, RIGHT = np.zeros((2, HEIGHT, WIDTH), bool)
LEFT[5:20, 3:10] = RIGHT[6:25, 15:22] = True
CODES = "ImageId,EncodedPixels\n"


@pytest.fixture
def archive(tmp_path: Path) -> str:
    folder = tmp_path / "archive"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH), np.uint8)).save(folder / f"{name}.png")
    return str(folder)


def save(mask: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def opened(archive: str, masks: Path, **options: Any) -> Manifest:
    return open_manifest(archive, labeling=Labeling(masks=str(masks), **options))


def stored(manifest: Manifest) -> list[dict[str, int] | None]:
    """Area in pixels of each image's masks as ingest stores them, at the images' own scale; None if unknown."""
    rows = make_rows(manifest.table, PixelFormat(HEIGHT), threads=1).to_pylist()
    assert [row[schema.ERROR] for row in rows] == [None] * len(rows)
    return [
        {
            mask[schema.LABEL]: int(np.unpackbits(np.frombuffer(mask[schema.MASK_BITS], np.uint8)).sum())
            for mask in row[schema.MASKS]
        }
        for row in rows
    ]


def along(mask: np.ndarray, *, rows: bool) -> str:
    """An absolute code."""
    flat = np.pad((mask if rows else mask.T).reshape(-1).astype(int), 1)
    edges = np.flatnonzero(np.diff(flat))
    return " ".join(f"{start + 1} {end - start}" for start, end in edges.reshape(-1, 2))


BOTH = int((LEFT | RIGHT).sum())


def test_folders_name_labels_and_a_lung_needs_both_sides(archive: str, tmp_path: Path) -> None:
    save(LEFT, tmp_path / "masks/leftMask/a_mask.png")
    save(RIGHT, tmp_path / "masks/rightMask/a.gif")
    save(LEFT, tmp_path / "masks/leftMask/b.png")
    save(RIGHT, tmp_path / "masks/heart/b.png")
    save(RIGHT, tmp_path / "masks/Old scar/z.png")
    (tmp_path / "masks/readme.txt").write_text("?")
    manifest = opened(archive, tmp_path / "masks")
    assert stored(manifest) == [{"Lungs": BOTH}, {"Heart": int(RIGHT.sum())}, {}]
    assert manifest.table[schema.MASKS].to_pylist()[2] is None
    expected = [
        "masks not used, because an image needs one in each of leftMask and rightMask: 1 image",
        "masks of Old scar in masks: 0 images, of which 0 empty",
        "masks of Heart in masks: 1 image, of which 0 empty",
        "masks of Lungs in masks: 1 image, of which 0 empty",
        "not listed in masks, so that their masks are unknown: 1 of 3 images, such as 'c'",
        "missing from the archive: 1 of 3 images listed in masks, such as 'z'",
    ]
    assert [note for note in manifest.notes if "mask" in note] == expected


def test_the_option_names_what_a_flat_folder_shows(archive: str, tmp_path: Path) -> None:
    save(LEFT, tmp_path / "masks/a.png")
    save(np.zeros_like(LEFT), tmp_path / "masks/sub/b.png")
    assert stored(opened(archive, tmp_path / "masks", mask_label="Mass")) == [
        {"Mass": int(LEFT.sum())},
        {"Mass": 0},
        {},
    ]
    with pytest.raises(UserError, match=r"1 mask in .* itself: say what they show with --mask-label"):
        opened(archive, tmp_path / "masks")


PATIENTS = ("p1/s1/view1.png", "p2/s1/view1.png")


def test_images_with_the_same_name_get_their_own_masks(tmp_path: Path) -> None:
    for path, mask in zip(PATIENTS, (LEFT, RIGHT), strict=True):
        save(LEFT, tmp_path / "archive" / path)
        save(mask, tmp_path / "masks" / path)
        save(mask, tmp_path / "labels" / path.replace("view1", "Mass/view1_mask"))
    rows = "".join(f"{path},{rle.encode(mask)}\n" for path, mask in zip(PATIENTS, (LEFT, RIGHT), strict=True))
    (tmp_path / "codes.csv").write_text(CODES + rows)
    areas = [{"Mass": int(LEFT.sum())}, {"Mass": int(RIGHT.sum())}]
    archive = str(tmp_path / "archive")
    assert stored(opened(archive, tmp_path / "masks", mask_label="Mass")) == areas
    assert stored(opened(archive, tmp_path / "labels")) == areas
    assert stored(opened(archive, tmp_path / "codes.csv", mask_label="Mass", mask_code="relative")) == areas


def test_folders_of_the_same_name_are_one_label_and_not_two_halves(archive: str, tmp_path: Path) -> None:
    save(LEFT, tmp_path / "masks/train/lungs/a.png")
    save(RIGHT, tmp_path / "masks/val/lungs/b.png")
    assert stored(opened(archive, tmp_path / "masks")) == [
        {"Lungs": int(LEFT.sum())},
        {"Lungs": int(RIGHT.sum())},
        {},
    ]


def test_halves_of_a_given_label_are_united_and_other_folders_are_part_of_the_path(
    archive: str, tmp_path: Path
) -> None:
    save(LEFT, tmp_path / "masks/left/a.png")
    save(RIGHT, tmp_path / "masks/right/a.png")
    save(RIGHT, tmp_path / "masks/p7/b.png")
    found = stored(opened(archive, tmp_path / "masks", mask_label="Lungs"))
    assert found == [{"Lungs": BOTH}, {"Lungs": int(RIGHT.sum())}, {}]


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("ImageId,EncodedPixels,class_name\n", "got an empty list: add entries"),
        ("ImageId,EncodedPixels,class_name\na,-1,\nb,,\n", "expected a label in some row, got none"),
    ],
)
def test_a_table_without_entries_or_labels_is_a_mistake(
    text: str, trouble: str, archive: str, tmp_path: Path
) -> None:
    (tmp_path / "codes.csv").write_text(text)
    with pytest.raises(UserError, match=trouble):
        opened(archive, tmp_path / "codes.csv")


def test_masks_in_other_formats_are_not_silently_read_later(archive: str, tmp_path: Path) -> None:
    for name in ("a.bmp", "b.TIFF"):
        save(LEFT, tmp_path / "masks" / name)
    expected = r"expected masks as PNG, GIF or JPEG files in .*masks, got 1 \.bmp, 1 \.tiff: convert them to PNG"
    with pytest.raises(UserError, match=expected):
        opened(archive, tmp_path / "masks", mask_label="Mass")
    save(LEFT, tmp_path / "masks/c.png")
    manifest = opened(archive, tmp_path / "masks", mask_label="Mass")
    assert "masks not used, because they are not PNG, GIF or JPEG files: 1 .bmp, 1 .tiff" in manifest.notes
    assert stored(manifest) == [{}, {}, {"Mass": int(LEFT.sum())}]


def test_masks_replace_those_of_the_same_label_only(tmp_path: Path) -> None:
    for name in ("1_0", "2_0"):
        image = f"MCUCXR_000{name}.png"
        save(LEFT, tmp_path / "CXR_png" / image)
        save(LEFT, tmp_path / "ManualMask/leftMask" / image)
        save(RIGHT, tmp_path / "ManualMask/rightMask" / image)
    save(RIGHT, tmp_path / "mine/Heart/MCUCXR_0001_0.png")
    save(RIGHT, tmp_path / "mine/Lungs/MCUCXR_0002_0.png")
    manifest = open_manifest(str(tmp_path), labeling=Labeling(masks=str(tmp_path / "mine")))
    areas = {"Lungs": BOTH, "Heart": int(RIGHT.sum())}
    assert stored(manifest) == [areas, {"Lungs": int(RIGHT.sum())}]


def coco(segmentations: list[Any], label: str = "Mass") -> str:
    images = [{"id": n, "file_name": f"{name}.png", "height": 40, "width": 30} for n, name in enumerate("ab")]
    return json.dumps(
        {
            "images": images,
            "categories": [{"id": 0, "name": label}],
            "annotations": [{"image_id": 0, "category_id": 0, "segmentation": each} for each in segmentations],
        }
    )


def test_coco_polygons_and_run_lengths_are_united(archive: str, tmp_path: Path) -> None:
    counts = [int(n) for n in rle.encode(LEFT).split()]
    counts.append(HEIGHT * WIDTH - sum(counts))
    polygon = [15, 6, 22, 6, 22, 25, 15, 25]
    (tmp_path / "coco.json").write_text(coco([{"size": [HEIGHT, WIDTH], "counts": counts}, [polygon]], "left lung"))
    assert stored(opened(archive, tmp_path / "coco.json")) == [{"Lungs": BOTH}, {"Lungs": 0}, {}]


@pytest.mark.parametrize(
    ("segmentation", "trouble"),
    [
        (None, "expected a segmentation as polygons or run lengths, got None"),
        ([[1, 2, 3]], "expected a segmentation as polygons or run lengths"),
        ({"counts": [3]}, r"expected a segmentation with size \[height, width\], got None"),
        ({"size": [4, 5], "counts": [3]}, "expected counts that add up to 4 x 5 pixels, got 3"),
        ({"size": [4, 5], "counts": "~~"}, "expected a segmentation with valid counts"),
        ({"size": [4, 5], "counts": None}, "expected a segmentation with counts, got None"),
    ],
)
def test_mistakes_in_coco_name_the_annotation(segmentation: Any, trouble: str, archive: str, tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text(coco([segmentation]))
    with pytest.raises(UserError, match=r"coco.json, annotations\[0\]: " + trouble):
        opened(archive, tmp_path / "coco.json")


def test_relative_and_absolute_codes_are_told_apart(archive: str, tmp_path: Path) -> None:
    """Several rows of an image are pieces of one mask."""
    path, label = tmp_path / "codes.csv", {"mask_label": "Pneumothorax"}
    for form, codes in {
        "relative": (rle.encode(LEFT), rle.encode(RIGHT)),
        "absolute": (along(LEFT, rows=False), along(RIGHT, rows=False)),
    }.items():
        path.write_text(f"{CODES}a,{codes[0]}\na,{codes[1]}\nb.dcm,-1\nz,5 1\n")
        manifest = opened(archive, path, **label)
        assert stored(manifest) == [{"Pneumothorax": BOTH}, {"Pneumothorax": 0}, {}]
        assert f"mask codes in codes.csv are read as {form}" in manifest.notes
        assert "masks of Pneumothorax in codes.csv: 2 images, of which 1 empty" in manifest.notes
    path.write_text(f"{CODES}a,{along(LEFT, rows=True)}\n")
    areas = stored(opened(archive, path, mask_code="absolute-rows", **label))
    assert areas == [{"Pneumothorax": int(LEFT.sum())}, {}, {}]


def test_codes_may_have_labels_and_sizes(archive: str, tmp_path: Path) -> None:
    double = np.kron(LEFT, np.ones((2, 2))).astype(bool)
    rows = f"a,{rle.encode(double)},Mass,80,60\na,-1,right lung,80,60\n"
    (tmp_path / "codes.csv").write_text(f"image_id,rle,class_name,height,width\n{rows}")
    assert stored(opened(archive, tmp_path / "codes.csv")) == [{"Mass": int(LEFT.sum()), "Lungs": 0}, {}, {}]


def test_a_row_without_label_and_code_means_none_of_the_labels(archive: str, tmp_path: Path) -> None:
    rows = f"a,{rle.encode(LEFT)},Mass\nb,-1,\na,-1,Nodule\n"
    (tmp_path / "codes.csv").write_text(f"image_id,rle,class_name\n{rows}")
    areas = [{"Mass": int(LEFT.sum()), "Nodule": 0}, {"Mass": 0, "Nodule": 0}, {}]
    manifest = opened(archive, tmp_path / "codes.csv")
    assert stored(manifest) == areas
    assert "masks of Mass in codes.csv: 2 images, of which 1 empty" in manifest.notes


CHEXMASK = "Image Index,Dice RCA (Max),Dice RCA (Mean),Landmarks,Left Lung,Right Lung,Heart,Height,Width\n"


def chexmask(name: str, quality: float, left: np.ndarray, right: np.ndarray) -> str:
    codes = ",".join(along(mask, rows=True) for mask in (left, right, right))
    return f'{name}.png,.9,{quality},"[[1 2]\n [3 4]]",{codes},{left.shape[0]},{left.shape[1]}\n'


@pytest.mark.parametrize("compressed", [False, True])
def test_chexmask_masks_of_good_quality_become_lungs_and_heart(
    compressed: bool, archive: str, tmp_path: Path
) -> None:
    half = LEFT[::2, ::2], RIGHT[::2, ::2]
    none = np.zeros_like(LEFT)
    rows = chexmask("a", 0.7, LEFT, RIGHT) + chexmask("b", 0.69, LEFT, RIGHT) + chexmask("c", 0.8, none, RIGHT)
    path = tmp_path / "ChestX-Ray8.csv"
    data = (CHEXMASK + rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if compressed else data)
    heart = int(RIGHT.sum())
    manifest = opened(archive, path)
    assert stored(manifest) == [{"Lungs": BOTH, "Heart": heart}, {}, {"Heart": heart}]
    note = "masks of lower quality (Dice RCA (Mean) below 0.7), not used: 1 image"
    assert note in manifest.notes
    assert stored(opened(archive, path, mask_quality=0.6))[1] == {"Lungs": BOTH, "Heart": heart}
    path.write_text(CHEXMASK + chexmask("a", 1, *half))
    resized = np.kron(half[0] | half[1], np.ones((2, 2)))
    assert stored(opened(archive, path))[0] == {"Lungs": int(resized.sum()), "Heart": 4 * int(half[1].sum())}


@pytest.mark.parametrize(
    ("text", "options", "trouble"),
    [
        ("", {}, "expected masks as COCO JSON or as CSV with the columns .* got no header"),
        ("name,box\na,1\n", {}, "got name, box: convert the file"),
        ("ImageId,box\na,1\n", {}, "expected a column EncodedPixels, got none: add it"),
        (f"{CODES}a,1 2\n", {}, "expected a column class_name, or --mask-label, got none"),
        (f"{CODES}a,1 2 3\n", {"mask_label": "Mass"}, "row 2: expected pairs of a position and a length, or -1 for"),
        ("ImageId,rle,label\na,1 2,\n", {}, "row 2: expected a label for this mask, got '': correct the row"),
        (f"{CODES}a,1 2\n", {"mask_label": "Mass"}, "and 1 have a single run: say which with --mask-code"),
        (f"{CODES}a,1 2,3\n", {"mask_label": "Mass"}, "expected 2 fields in each row, got 3 fields after row"),
        (f"{CODES}z,1 2 5 6\n", {"mask_label": "Mass"}, "the archive has 'a', 'b', 'c', the list 'z'"),
        (CHEXMASK.replace(",Width", ""), {}, "got a table without Width"),
        (CHEXMASK + "a,1,x,,1 1,1 1,1 1,4,4\n", {}, r"row 2: expected a number in Dice RCA \(Mean\), got 'x'"),
        (CHEXMASK + "a,1,1,,1 1,1 1,1 1,4,0\n", {}, "row 2: expected the height and width of the mask in pixels"),
    ],
)
def test_mistakes_are_one_line(
    text: str, options: dict[str, Any], trouble: str, archive: str, tmp_path: Path
) -> None:
    (tmp_path / "masks.csv").write_text(text)
    with pytest.raises(UserError, match=trouble) as raised:
        opened(archive, tmp_path / "masks.csv", **options)
    assert "\n" not in str(raised.value)


def test_options_of_masks_need_masks(archive: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected --masks with --mask-label, got none: add it"):
        Labeling(mask_label="Mass")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected masks as PNG, GIF or JPEG files in .*empty, got none"):
        opened(archive, tmp_path / "empty")
