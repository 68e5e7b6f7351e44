"""Crops to the lungs and alignment: stored pixels, reasons for whole images, places in the original, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cxr
from cxr import schema, storage
from cxr.data import shards
from cxr.data.batch import to_columns
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files, image_crop
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import Recipe
from cxr.families.compatibility import check_crop, check_raw
from cxr.families.lungs import LungsRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.imaging.geometry import ResizeTransform, fit_mask, mask_to_original, place
from cxr.imaging.lung_bbox import LungSquare, lung_square
from cxr.schema import PixelFormat
from cxr.sources import rle
from cxr.sources.manifest import manifest_table
from tests.aligners import fixed_aligner
from tests.lung_rule import EVERYWHERE, NOWHERE, save_finder
from tests.made_shards import write_shards

PIXELS = PixelFormat(48)
ALIGN = AlignRecipe(size=32, backbone="conv3", lungs=False, epochs=1)
BOX = {
    schema.LABEL: "Mass",
    schema.READER: None,
    schema.X_MIN: 7,
    schema.Y_MIN: 9,
    schema.X_MAX: 31,
    schema.Y_MAX: 20,
}


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_finder(tmp_path_factory.mktemp("finder"))


def chest(height: int, width: int, dtype: type = np.uint8) -> tuple[np.ndarray, np.ndarray]:
    """A dark body with two bright lungs, as on a negative, right above the middle, and their bool mask."""
    lungs = np.zeros((height, width), np.uint8)
    for x in (0.47, 0.75):
        axes = (int(0.09 * width), int(0.25 * height))
        cv2.ellipse(lungs, (int(x * width), int(0.4 * height)), axes, 0, 0, 360, 1, -1)
    noise = np.random.default_rng(0).normal(0, 4, lungs.shape)
    pixels = (np.where(lungs > 0, 200, 20) + noise) * (np.iinfo(dtype).max / 255)
    return pixels.astype(dtype), lungs > 0


def manifest(folder: Path, images: dict[str, np.ndarray], **columns: list[Any]) -> pa.Table:
    for name, pixels in images.items():
        assert cv2.imwrite(str(folder / name), pixels)
    given = {
        schema.IMAGE_ID: list(images),
        schema.SPLIT: ["train"] * len(images),
        schema.SOURCE_URI: [str(folder / name) for name in images],
        **columns,
    }
    return manifest_table({name: pa.array(v, schema.MANIFEST.field(name).type) for name, v in given.items()}, None)


@pytest.mark.parametrize(("height", "width"), [(120, 120), (90, 160), (160, 100)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lungs_are_segmented_in_originals_of_any_shape(finder: str, height: int, width: int, dtype: type) -> None:
    pixels, lungs = chest(height, width, dtype)
    found = image_crop.by_lungs(finder, margin=0.1).loaded()(pixels)
    wanted = lung_square(lungs, margin=0.1)
    assert found.reason == ""
    for name in ("x", "y", "side"):
        assert abs(getattr(found, name) - getattr(wanted, name)) <= 4 * max(height, width) / 64, name


def test_rows_contain_crops_masks_and_boxes_of_the_original(finder: str, tmp_path: Path) -> None:
    pixels, lungs = chest(90, 160)
    masks = [[{schema.LABEL: schema.LUNGS, schema.MASK_RLE: rle.encode(lungs), schema.MASK_URI: None}]]
    pose = [[1, 0, 0, 0, 1, 0]]
    crop = image_crop.by_lungs(finder, margin=0.0).loaded()
    table = manifest(tmp_path, {"a.png": pixels}, boxes=[[BOX]], masks=masks, true_theta=pose)
    rows = make_rows(table, PIXELS, crop=crop)
    (row,) = rows.to_pylist()
    square = crop(pixels)
    assert rows.schema.equals(schema.row_schema(PIXELS))
    assert (row[schema.CROP_STATUS], row[schema.TRUE_THETA], row[schema.BOXES]) == ("lungs", None, [BOX])
    assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX]) == (90, 160)
    assert ResizeTransform.from_dict(row[schema.RESIZE_TRANSFORM]) == square.transform(48)
    np.testing.assert_array_equal(schema.pixels_array(rows[schema.PIXELS], PIXELS)[0], square.crop(pixels, 48))
    stored = np.unpackbits(np.frombuffer(row[schema.MASKS][0][schema.MASK_BITS], np.uint8)).reshape(48, 48)
    np.testing.assert_array_equal(stored, square.crop(lungs.astype(np.uint8) * 255, 48) >= 128)
    assert stored.sum() * square.transform(48).x_scale ** 2 == pytest.approx(lungs.sum(), rel=0.05)
    (whole,) = make_rows(table, PIXELS).to_pylist()
    assert (whole[schema.CROP_STATUS], whole[schema.TRUE_THETA]) == (None, pose[0])


@pytest.mark.parametrize(
    ("bias", "reason"),
    [
        (NOWHERE, "whole image: the lung mask is empty"),
        (EVERYWHERE, "whole image: the lung mask covers 100.0% of the image, expected at most 60%"),
    ],
)
def test_implausible_masks_leave_the_image_whole_with_a_reason(bias: float, reason: str, tmp_path: Path) -> None:
    crop = image_crop.by_lungs(save_finder(tmp_path / "finder", bias=bias)).loaded()
    pose = [[1, 0, 0, 0, 1, 0]]
    table = manifest(tmp_path, {"a.png": chest(90, 160)[0]}, true_theta=pose)
    whole, kept = make_rows(table, PIXELS), make_rows(table, PIXELS, crop=crop)
    assert kept[schema.CROP_STATUS].to_pylist() == [reason]
    assert kept.drop_columns([schema.CROP_STATUS]).equals(whole.drop_columns([schema.CROP_STATUS]))


def test_rejected_images_keep_their_reason(finder: str, tmp_path: Path) -> None:
    table = manifest(tmp_path, {"a.png": chest(64, 64)[0], "b.png": chest(64, 64)[0]})
    (tmp_path / "a.png").write_bytes(b"")
    bad, good = make_rows(table, PIXELS, crop=image_crop.by_lungs(finder).loaded()).to_pylist()
    assert (bad[schema.ERROR], bad[schema.CROP_STATUS], bad[schema.PIXELS]) == ("empty file: 0 bytes", None, None)
    assert good[schema.CROP_STATUS] == "lungs"


# ---- Alignment


def expected_frame(height: int, width: int, turn_deg: float, scale: float, shift: float) -> ResizeTransform:
    """From the unit square to the image, for `fixed_aligner` with these values."""
    side, cos, sin = max(height, width), np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    linear = scale * side * np.array([[cos, -sin], [sin, cos]])
    middle = np.array([width / 2 + shift * side, height / 2])
    return ResizeTransform.from_matrix(np.column_stack([linear, middle - linear @ (0.5, 0.5)]))


@pytest.mark.parametrize(("height", "width"), [(320, 320), (320, 240)])
def test_aligned_rows_are_resampled_once_from_the_original(height: int, width: int, tmp_path: Path) -> None:
    aligner = fixed_aligner(tmp_path / "aligner", turn_deg=10, scale=0.9, shift=0.05)
    box = BOX | {schema.X_MIN: 107, schema.Y_MIN: 109, schema.X_MAX: 140, schema.Y_MAX: 190}
    pixels, lungs = chest(height, width)
    masks = [[{schema.LABEL: schema.LUNGS, schema.MASK_RLE: rle.encode(lungs), schema.MASK_URI: None}]]
    table = manifest(tmp_path, {"a.png": pixels}, boxes=[[box]], masks=masks, true_theta=[[1, 0, 0, 0, 1, 0]])
    size = 256  # the aligner sees 32 px
    rows = make_rows(table, PixelFormat(size), crop=image_crop.by_aligner(aligner).loaded())
    (row,) = rows.to_pylist()
    assert (row[schema.CROP_STATUS], row[schema.TRUE_THETA], row[schema.BOXES]) == ("aligned", None, [box])
    frame = ResizeTransform.from_dict(row[schema.RESIZE_TRANSFORM])
    expected = ResizeTransform(1 / size, 1 / size).then(expected_frame(height, width, 10, 0.9, 0.05))
    np.testing.assert_allclose(frame.matrix, expected.matrix, atol=1e-3)
    stored = schema.pixels_array(rows[schema.PIXELS], PixelFormat(size))[0]
    np.testing.assert_array_equal(stored, place(pixels, size, frame))
    mask = np.unpackbits(np.frombuffer(row[schema.MASKS][0][schema.MASK_BITS], np.uint8)).reshape(size, size)
    back = mask_to_original(mask.astype(bool), frame, height, width)
    assert (back & lungs).sum() / (back | lungs).sum() > 0.97
    boxes = to_columns(rows, [schema.BOXES], PixelFormat(size), findings=["Mass"])[schema.BOXES][0, :1, 1:]
    np.testing.assert_allclose(boxes * size, frame.boxes_from_original(np.array([[107, 109, 140, 190]])), atol=1e-3)


def test_implausible_alignments_leave_the_image_whole_with_a_reason(tmp_path: Path) -> None:
    table = manifest(tmp_path, {"a.png": chest(90, 160)[0]}, true_theta=[[1, 0, 0, 0, 1, 0]])
    aligner = fixed_aligner(tmp_path / "aligner", scale=0.55)
    whole, kept = make_rows(table, PIXELS), make_rows(table, PIXELS, crop=image_crop.by_aligner(aligner).loaded())
    (status,) = kept[schema.CROP_STATUS].to_pylist()
    assert status.startswith("whole image: implausible alignment, collapsed: expected a mean scale from 0.6 to 1.6")
    assert kept.drop_columns([schema.CROP_STATUS]).equals(whole.drop_columns([schema.CROP_STATUS]))


def test_masks_predicted_in_aligned_images_are_those_of_the_original(tmp_path: Path) -> None:
    aligner = fixed_aligner(tmp_path / "aligner", turn_deg=-12, scale=0.95, shift=0.03)
    predictor = cxr.load(save_finder(tmp_path / "finder", size=128, aligner=aligner))
    pixels, lungs = chest(300, 400)
    (row,) = predictor.predict(pixels).to_pylist()
    predicted = rle.decode(row[schema.PRED_MASK_RLE], 300, 400)
    (heat,) = predictor.segment(pixels)
    assert row[schema.CROP_STATUS] == "aligned"
    for mask in (predicted, heat.on_original(schema.LUNGS) >= 0.5):
        assert (mask & lungs).sum() / (mask | lungs).sum() > 0.85


SIDE = st.integers(20, 200)


@pytest.fixture(scope="module")
def one_image(tmp_path_factory: pytest.TempPathFactory) -> Callable[[np.ndarray], pa.Table]:
    folder = tmp_path_factory.mktemp("one")
    return lambda pixels: manifest(folder, {"a.png": pixels})


@settings(deadline=None, max_examples=60)
@given(height=SIDE, width=SIDE, size=st.integers(16, 150), margin=st.floats(0, 0.5), seed=st.integers(0, 10**6))
def test_points_and_boxes_map_back_exactly(
    one_image: Callable[[np.ndarray], pa.Table], height: int, width: int, size: int, margin: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    (y0, y1), (x0, x1) = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
    mask[y0:y1, x0:x1] = True  # often absurd: then the whole image is stored, padded by `fit`
    square = lung_square(mask, margin)
    pixels = rng.integers(0, 255, (height, width), np.uint8)
    (row,) = make_rows(one_image(pixels), PixelFormat(size), crop=lambda _: square).to_pylist()
    frame = ResizeTransform.from_dict(row[schema.RESIZE_TRANSFORM])
    points = rng.uniform(0, size, (20, 2))
    np.testing.assert_allclose(frame.from_original(frame.to_original(points)), points, atol=1e-6)
    boxes = rng.uniform(0, (width, height), (20, 2))
    np.testing.assert_allclose(frame.to_original(frame.from_original(boxes)), boxes, atol=1e-6)
    if square.reason:
        corners = frame.from_original(np.array([[0, 0], [width, height]]))
        assert corners.min() >= -1e-6
        assert corners.max() == pytest.approx(size)
    else:
        corners = frame.to_original(np.array([[0, 0], [size, size]])) - (square.x, square.y)
        np.testing.assert_allclose(corners, [[0, 0], [square.side, square.side]], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(height=SIDE, width=SIDE, size=st.integers(16, 150), seed=st.integers(0, 10**6))
def test_masks_are_cropped_and_mapped_back(height: int, width: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y, side = (int(value) for value in rng.integers((-20, -20, 16), (width - 8, height - 8, 200)))
    square = LungSquare(x, y, side)
    blobs = cv2.resize(rng.random((5, 5)), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
    frame = square.transform(size)
    stored = fit_mask(blobs, size, frame)
    assert (stored != (square.crop(blobs.astype(np.uint8) * 255, size) >= 128)).mean() < 0.001
    back = mask_to_original(stored, frame, height, width)
    inside = np.zeros_like(blobs)
    inside[max(0, y) : max(0, y + side), max(0, x) : max(0, x + side)] = True
    assert not back[~inside].any()
    near = 2 * int(np.ceil(frame.x_scale)) + 1
    framed = cv2.copyMakeBorder((blobs & inside).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    kernel = np.ones((near, near), np.uint8)
    outline = (cv2.dilate(framed, kernel) != cv2.erode(framed, kernel))[1:-1, 1:-1]
    assert not ((back != (blobs & inside)) & ~outline).any()


# ---- Who may crop, and what fits together


def saved(folder: Path, recipe: Recipe) -> str:
    network = recipe.network(schema.FINDINGS)
    task = recipe.task(network)
    checkpoint.save(folder, recipe, task, network.state_dict(), findings=schema.FINDINGS, metrics={})
    return str(folder)


@pytest.mark.parametrize("recipe", [ALIGN, PneumothoraxRecipe(size=64, architecture="small_unet")])
def test_only_lung_checkpoints_can_crop(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"of family '{recipe.family}', which does not segment lungs"):
        image_crop.by_lungs(saved(tmp_path, recipe))
    with pytest.raises(UserError, match=r"contains no checkpoint\.json"):
        image_crop.of_recipe(ALIGN.replace(lung_crop=str(tmp_path / "none")))


def test_only_aligners_of_whole_images_can_align(finder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of family 'lungs', which does not align images"):
        image_crop.by_aligner(finder)
    cropped = saved(tmp_path / "cropped", ALIGN.replace(lung_crop=finder))
    with pytest.raises(UserError, match="expected a checkpoint for whole images, got one that was trained with lung"):
        image_crop.by_aligner(cropped)
    with pytest.raises(UserError, match="An aligner is trained on whole images"):
        ALIGN.replace(aligner=cropped)
    with pytest.raises(UserError, match="expected one of lung_crop and aligner, got both"):
        PneumothoraxRecipe(lung_crop=finder, aligner=cropped)


def test_a_family_that_aligns_in_its_network_stores_whole_images(finder: str) -> None:
    assert image_crop.of_recipe(AttendRecipe(aligner="/aligner")) is None
    assert image_crop.of_recipe(AttendRecipe(aligner="/aligner", lung_crop=finder)) == image_crop.by_lungs(finder)


def test_invalid_crop_settings_are_rejected(finder: str) -> None:
    with pytest.raises(UserError, match="Lungs are segmented in whole images"):
        LungsRecipe(lung_crop=finder)
    with pytest.raises(UserError, match="lung_margin: expected a fraction from 0 to 1, got 2"):
        ALIGN.replace(lung_margin=2.0)
    check_raw(ALIGN.replace(lung_crop=finder), "/archive")


def test_a_checkpoint_that_was_replaced_is_not_used(tmp_path: Path) -> None:
    crop = image_crop.by_lungs(save_finder(tmp_path))
    save_finder(tmp_path, bias=0.1)
    with pytest.raises(UserError, match="was replaced by another"):
        crop.loaded()


def test_shards_with_another_crop_are_rejected(finder: str, tmp_path: Path) -> None:
    crop = image_crop.by_lungs(finder)
    whole = write_shards(tmp_path / "whole", {"train": 4, "val": 2})
    about = storage.read_json(f"{whole}/{shards.ARCHIVE_FILE}")
    cropped = write_shards(tmp_path / "cropped", {"train": 4, "val": 2})
    storage.write_json(f"{cropped}/{shards.ARCHIVE_FILE}", about | {"crop": crop.describe()})
    elsewhere = dataclasses.replace(crop, uri="/elsewhere")
    check_crop(shards.read_info(whole), None)
    check_crop(shards.read_info(cropped), elsewhere)
    with pytest.raises(
        UserError, match=r"contains whole images, but crops .* are needed: .* with --lung-crop .* --lung-margin"
    ):
        check_crop(shards.read_info(whole), crop)
    with pytest.raises(UserError, match=r"contains crops by .* but whole images are needed: .* without --lung-crop"):
        check_crop(shards.read_info(cropped), None)
    with pytest.raises(UserError, match=r"margin 0.05, but crops .* margin 0.2"):
        check_crop(shards.read_info(cropped), dataclasses.replace(crop, margin=0.2))
    with pytest.raises(UserError, match="expected the same crop in combined archives"):
        shards.join_shards(str(tmp_path / "joined"), [whole, cropped], ["/a", "/b"])
    joined = shards.join_shards(str(tmp_path / "joined"), [cropped, cropped], ["/a", "/b"])
    check_crop(joined, crop)
    alignment = image_crop.by_aligner(fixed_aligner(tmp_path / "aligner"))
    with pytest.raises(UserError, match=r"contains crops by .* but images aligned by .* needed: .* with --aligner /"):
        check_crop(joined, alignment)
    about = storage.read_json(f"{whole}/{shards.ARCHIVE_FILE}") | {"crop": alignment.describe()}
    storage.write_json(f"{whole}/{shards.ARCHIVE_FILE}", about)
    check_crop(shards.read_info(whole), dataclasses.replace(alignment, uri="/elsewhere"))
    with pytest.raises(UserError, match=r"contains images aligned by .* but whole images are needed: .* without"):
        check_crop(shards.read_info(whole), None)


def test_a_copy_for_scoring_includes_the_lung_network(tmp_path: Path) -> None:
    finder = save_finder(tmp_path / "finder")
    recipe = ALIGN.replace(lung_crop=finder, lung_margin=0.2)
    given = image_crop.of_recipe(recipe)
    copy = checkpoint_files.copy_for_scoring(saved(tmp_path / "epoch", recipe), str(tmp_path / "copy"))
    (tmp_path / "finder").rename(tmp_path / "gone")
    again = checkpoint_files.copy_for_scoring(copy, str(tmp_path / "again"))
    found = image_crop.of_checkpoint(checkpoint.load(again))
    assert given is not None
    assert found is not None
    assert found == dataclasses.replace(given, uri=f"{again}/crop")
    pixels, _ = chest(90, 120)
    assert found.loaded()(pixels) == image_crop.by_lungs(str(tmp_path / "gone"), 0.2).loaded()(pixels)


def test_a_copy_for_scoring_includes_the_aligner(tmp_path: Path) -> None:
    recipe = PneumothoraxRecipe(size=64, architecture="small_unet", aligner=fixed_aligner(tmp_path / "aligner"))
    copy = checkpoint_files.copy_for_scoring(saved(tmp_path / "epoch", recipe), str(tmp_path / "copy"))
    given = image_crop.of_recipe(recipe)
    (tmp_path / "aligner").rename(tmp_path / "gone")
    found = image_crop.of_checkpoint(checkpoint.load(copy))
    assert isinstance(given, image_crop.Alignment)
    assert found == dataclasses.replace(given, uri=f"{copy}/crop")


def test_a_lung_checkpoint_may_move_but_not_change_its_margin(finder: str) -> None:
    began = ALIGN.replace(lung_crop=finder).to_dict()
    assert ALIGN.replace(lung_crop="/elsewhere").changes_from(began) == []
    assert ALIGN.replace(lung_crop=finder, lung_margin=0.1).changes_from(began) == ["lung_margin was 0.05, is 0.1"]
    assert all("lung_crop" in family.LOCATION_SETTINGS for family in (AlignRecipe, LungsRecipe, PneumothoraxRecipe))


def test_rows_without_a_crop_column_are_read() -> None:
    wanted = schema.row_schema(PIXELS)
    old = wanted.empty_table().drop_columns([schema.CROP_STATUS])
    one = pa.table([pa.nulls(1, field.type) for field in old.schema], schema=old.schema)
    rows = schema.conform_to_schema(one, wanted)
    assert rows.schema.equals(wanted, check_metadata=True)
    assert rows[schema.CROP_STATUS].to_pylist() == [None]
