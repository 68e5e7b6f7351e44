"""Decoding a manifest: the columns of rows, and unusable images."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.data import decode_pool
from cxr.data.decode import ImageFormat, make_rows, make_rows_in_formats
from cxr.imaging.geometry import ResizeTransform
from cxr.runtime.step_times import DECODING, STORAGE, StepTimes
from cxr.schema import PixelFormat
from cxr.sources import rle
from cxr.sources.manifest import manifest_table
from tests.odd_files import dataset, dicom, radiograph

PIXELS = PixelFormat(size=32)


def picture(height: int = 64, width: int = 64, dtype: type = np.uint8) -> np.ndarray:
    """Dark at the top, bright at the bottom right."""
    pixels = np.zeros((height, width), dtype)
    pixels[height // 2 :, width // 2 :] = np.iinfo(dtype).max
    return pixels


def saved(path: Path, pixels: np.ndarray) -> str:
    assert cv2.imwrite(str(path), pixels)
    return str(path)


def manifest(uris: list[str], frame_px: int | None = None, **columns: list[Any]) -> pa.Table:
    named: Mapping[str, list[Any]] = {
        schema.IMAGE_ID: [Path(uri).stem for uri in uris],
        schema.SPLIT: ["train"] * len(uris),
        schema.SOURCE_URI: uris,
        schema.LABELS: [[1, 0, -1]] * len(uris),
        **columns,
    }
    arrays = {name: pa.array(values, schema.MANIFEST.field(name).type) for name, values in named.items()}
    return manifest_table(arrays, frame_px)


def box(x_min: float, y_min: float, x_max: float, y_max: float) -> dict[str, Any]:
    corners = {schema.X_MIN: x_min, schema.Y_MIN: y_min, schema.X_MAX: x_max, schema.Y_MAX: y_max}
    return {schema.LABEL: "Mass", schema.READER: None, **corners}


def unpacked(mask: Mapping[str, Any], size: int = 32) -> np.ndarray:
    return np.unpackbits(np.frombuffer(mask[schema.MASK_BITS], np.uint8), count=size * size).reshape(size, size)


def test_good_images_keep_their_order_and_metadata(tmp_path: Path) -> None:
    uris = [saved(tmp_path / f"{name}.png", picture(64, 64 + 2 * i)) for i, name in enumerate("dbac")]
    rows = make_rows(manifest(uris, view=["PA", "AP", None, None]), PIXELS)
    assert rows.schema.equals(schema.row_schema(PIXELS), check_metadata=True)
    assert rows[schema.IMAGE_ID].to_pylist() == list("dbac")
    assert rows[schema.WIDTH_PX].to_pylist() == [64, 66, 68, 70]
    assert rows[schema.VIEW].to_pylist() == ["PA", "AP", None, None]
    assert rows[schema.LABELS].to_pylist() == [[1, 0, -1]] * 4
    assert rows[schema.ERROR].null_count == 4
    stored = schema.pixels_array(rows[schema.PIXELS], PIXELS)
    assert (stored[0] == picture(32, 32)).all()


def test_fetching_and_decoding_are_timed_without_waiting_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [saved(tmp_path / f"{number}.png", picture()) for number in range(6)]
    read, decode, times = storage.read_bytes, decode_pool._Decoder.decode, StepTimes()

    def slow(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: time.sleep(seconds) or function(*arguments, **options)

    monkeypatch.setattr(storage, "read_bytes", slow(0.1, read))
    monkeypatch.setattr(decode_pool._Decoder, "decode", slow(0.1, decode))
    rows = make_rows_in_formats(manifest(uris), [ImageFormat(PIXELS)], times=times)
    assert rows[schema.ERROR].null_count == 6
    assert times.seconds[STORAGE] == pytest.approx(6 * 0.1, rel=0.6)
    assert times.seconds[DECODING] >= 6 * 0.1
    assert StepTimes(json.loads(times.to_json())).seconds.keys() == {STORAGE, DECODING}


def test_transform_maps_back_to_the_original(tmp_path: Path) -> None:
    rows = make_rows(manifest([saved(tmp_path / "wide.png", picture(50, 100))]), PIXELS).to_pylist()
    frame = ResizeTransform.from_dict(rows[0][schema.RESIZE_TRANSFORM])
    assert frame.to_original(np.array([[0, 8], [32, 24]])).tolist() == [[0, 0], [100, 50]]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_use_the_full_range(tmp_path: Path, bits: int, dtype: type) -> None:
    pixels = PixelFormat(size=32, bits=bits)
    rows = make_rows(manifest([saved(tmp_path / "a.png", picture(dtype=dtype))]), pixels)
    stored = schema.pixels_array(rows[schema.PIXELS], pixels)[0]
    assert stored.dtype == pixels.dtype
    assert (stored[0, 0], stored[-1, -1]) == (0, 2**bits - 1)


def test_boxes_and_spacing_are_converted_to_pixels_of_the_file(tmp_path: Path) -> None:
    uri = saved(tmp_path / "half.png", picture(512, 256))
    truth = {"boxes": [[box(100, 200, 300, 400)]], "spacing_mm": [[0.1, 0.2]]}
    (row,) = make_rows(manifest([uri], frame_px=1024, **truth), PIXELS).to_pylist()
    assert row[schema.BOXES] == [box(25, 100, 75, 200)]
    assert row[schema.SPACING_MM] == pytest.approx([0.2, 0.8])
    (row,) = make_rows(manifest([uri], **truth), PIXELS).to_pylist()
    assert row[schema.BOXES] == [box(100, 200, 256, 400)], "clipped to the file's 256 x 512 pixels"
    assert row[schema.SPACING_MM] == pytest.approx([0.1, 0.2])


def test_masks_with_the_same_label_are_merged(tmp_path: Path) -> None:
    left, right = np.zeros((64, 64), bool), np.zeros((128, 128), np.uint8)
    left[:, :16] = True
    right[:, 96:] = 255
    masks = [
        {schema.LABEL: schema.LUNGS, schema.MASK_RLE: rle.encode(left), schema.MASK_URI: None},
        {
            schema.LABEL: schema.LUNGS,
            schema.MASK_RLE: None,
            schema.MASK_URI: saved(tmp_path / "m.png", right),
        },
        {schema.LABEL: "Mass", schema.MASK_RLE: rle.EMPTY, schema.MASK_URI: None},
    ]
    table = manifest([saved(tmp_path / "a.png", picture())], masks=[masks])
    lungs, mass = make_rows(table, PIXELS).to_pylist()[0][schema.MASKS]
    wanted = np.zeros((32, 32), np.uint8)
    wanted[:, :8] = wanted[:, 24:] = 1
    assert lungs[schema.LABEL] == schema.LUNGS
    assert (unpacked(lungs) == wanted).all()
    assert not unpacked(mass).any()


def test_a_blank_mask_file_is_an_empty_mask(tmp_path: Path) -> None:
    uri = saved(tmp_path / "m.png", np.zeros((64, 64), np.uint8))
    masks = [{schema.LABEL: "Mass", schema.MASK_RLE: None, schema.MASK_URI: uri}]
    (row,) = make_rows(manifest([saved(tmp_path / "a.png", picture())], masks=[masks]), PIXELS).to_pylist()
    assert row[schema.ERROR] is None
    assert not unpacked(row[schema.MASKS][0]).any()


def test_unusable_images_become_rows_with_the_reason(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.png", picture())
    data = Path(good).read_bytes()
    contents = {"torn.png": data[:60], "text.png": b"not an image\n", "empty.png": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    names = [*contents, "missing.png", "folder.png", "pipe.png", "circle.png"]
    rows = make_rows(manifest([str(tmp_path / name) for name in names] + [good]), PIXELS).to_pylist()
    for row, word in zip(
        rows, ["truncated", "text", "empty", "not found", "not readable", "a pipe", "Too many"], strict=False
    ):
        assert word in row[schema.ERROR]
        assert str(tmp_path) not in row[schema.ERROR]
        assert (row[schema.PIXELS], row[schema.BOXES], row[schema.LABELS]) == (None, None, [1, 0, -1])
    assert rows[-1][schema.ERROR] is None
    assert rows[-1][schema.PIXELS] == picture(32, 32).tobytes()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ({schema.MASK_RLE: "0 999999", schema.MASK_URI: None}, "exceeds the image"),
        ({schema.MASK_RLE: None, schema.MASK_URI: "/nowhere/m.png"}, "mask of Mass: file not found"),
    ],
)
def test_a_bad_mask_is_the_images_error(tmp_path: Path, mask: dict[str, Any], reason: str) -> None:
    uri = saved(tmp_path / "a.png", picture())
    (row,) = make_rows(manifest([uri], masks=[[{schema.LABEL: "Mass", **mask}]]), PIXELS).to_pylist()
    assert reason in row[schema.ERROR]
    assert row[schema.PIXELS] is None


def test_a_mask_of_another_shape_is_the_images_error(tmp_path: Path) -> None:
    masks = [
        {
            schema.LABEL: "Mass",
            schema.MASK_URI: saved(tmp_path / "m.png", picture(64, 80)),
            schema.MASK_RLE: None,
        }
    ]
    (row,) = make_rows(manifest([saved(tmp_path / "a.png", picture())], masks=[masks]), PIXELS).to_pylist()
    assert row[schema.ERROR] == "mask of Mass: expected the aspect ratio of the image (64 x 64), got 80 x 64"


def test_an_unexpected_exception_reports_its_location_but_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str, check: object) -> bytes:
        raise KeyError("Doe^Jane")

    monkeypatch.setattr(storage, "read_bytes", broken)
    (row,) = make_rows(manifest(["/a.png"]), PIXELS).to_pylist()
    assert row[schema.ERROR].startswith("unexpected KeyError in test_decode.py:")
    assert "Doe" not in row[schema.ERROR]


def test_bucket_errors_are_raised_but_missing_objects_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(uri: str, check: object) -> bytes:
        raise error

    monkeypatch.setattr(storage, "read_bytes", failing)
    error = storage.NotFoundError("s3://b/a.png does not exist")
    (row,) = make_rows(manifest(["s3://b/a.png"]), PIXELS).to_pylist()
    assert row[schema.ERROR] == "file not found"
    error = storage.StorageError("the server rejected the credentials")
    with pytest.raises(storage.StorageError, match="credentials"):
        make_rows(manifest(["s3://b/a.png"]), PIXELS)


def test_rows_have_the_view_of_the_source_else_of_the_file_and_the_files_body_part_and_modality(
    tmp_path: Path,
) -> None:
    tags = {"ViewPosition": "LATERAL", "BodyPartExamined": "HAND", "Modality": "CR"}
    (tmp_path / "a.dcm").write_bytes(dicom(dataset(radiograph(), **tags)))
    uris = [str(tmp_path / "a.dcm")] * 3 + [saved(tmp_path / "b.png", picture())]
    rows = make_rows(manifest(uris, view=["AP ", None, "Jane Doe", "PA"]), PIXELS)
    assert rows[schema.VIEW].to_pylist() == ["AP", "LATERAL", "LATERAL", "PA"]
    assert rows[schema.BODY_PART].to_pylist() == ["HAND", "HAND", "HAND", None]
    assert rows[schema.MODALITY].to_pylist() == ["CR", "CR", "CR", None]


def test_rows_of_older_versions_are_read_with_nulls() -> None:
    wanted = schema.row_schema(PIXELS)
    old = wanted.empty_table().drop_columns([schema.BODY_PART, schema.MODALITY])
    assert schema.conform_to_schema(old, wanted).schema.equals(wanted)


def test_files_that_are_not_images_or_too_large_are_rejected_early(tmp_path: Path) -> None:
    """The files are sparse: 3 GiB that are never read."""
    (tmp_path / "movie.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (tmp_path / "scan.png").write_bytes(Path(saved(tmp_path / "a.png", picture())).read_bytes())
    for name in ("movie.mp4", "scan.png"):
        os.truncate(tmp_path / name, 3 << 30)
    before = psutil.Process().memory_info().vms
    rows = make_rows(manifest([str(tmp_path / name) for name in ("movie.mp4", "scan.png", "a.png")]), PIXELS)
    assert psutil.Process().memory_info().vms - before < 1 << 30
    video, large, good = rows[schema.ERROR].to_pylist()
    assert video == "unsupported file type: HEIC, AVIF or video; expected DICOM, PNG or JPEG"
    assert large == "too large: expected a file of at most 256 MiB, got 3,072 MiB"
    assert good is None


def test_no_image_gives_no_row() -> None:
    assert make_rows(manifest([]), PIXELS).num_rows == 0


def test_real_images(real_data: Path) -> None:
    files = sorted(str(path) for path in (real_data / "chestxray14" / "images").iterdir())[:8]
    rows = make_rows(manifest(files), PixelFormat(size=256))
    assert rows[schema.ERROR].null_count == 8
    stored = schema.pixels_array(rows[schema.PIXELS], PixelFormat(size=256))
    for file, square in zip(files, stored, strict=True):
        gray = cv2.imread(file, cv2.IMREAD_GRAYSCALE)
        assert gray is not None
        assert abs(float(square.mean()) - float(gray.mean())) < 1
