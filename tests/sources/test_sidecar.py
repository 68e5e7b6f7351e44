"""truth.parquet is joined by image id, with any source."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import open_manifest, sidecar

POSE = [1.0, 0.0, 0.25, 0.0, 1.0, -0.5]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"?")
    return tmp_path


def test_poses_and_masks_join_by_image_id(archive: Path) -> None:
    mask = of_uri(None, "0 4")
    columns = {
        schema.IMAGE_ID: ["c.png", "a.png", "z.png"],
        schema.TRUE_THETA: [POSE, None, POSE],
        schema.MASKS: [[mask], [], []],
    }
    types = pa.schema([schema.MANIFEST.field(name) for name in columns])
    pq.write_table(pa.table(columns, schema=types), archive / "truth.parquet")
    manifest = open_manifest(str(archive))
    assert manifest.table.schema.equals(schema.MANIFEST)
    assert manifest.table[schema.IMAGE_ID].to_pylist() == ["a.png", "b.png", "c.png"]
    assert manifest.table[schema.TRUE_THETA].to_pylist() == [None, None, POSE]
    assert manifest.table[schema.MASKS].to_pylist() == [[], None, [mask]]
    assert "truth.parquet covers 2 of 3 images" in manifest.notes


def test_a_single_column_of_plain_lists(archive: Path) -> None:
    pq.write_table(pa.table({schema.IMAGE_ID: ["b.png"], schema.TRUE_THETA: [POSE]}), archive / "truth.parquet")
    table = open_manifest(str(archive)).table
    assert table[schema.TRUE_THETA].to_pylist() == [None, POSE, None]
    assert table[schema.MASKS].null_count == 3


def test_join_keeps_the_image_size_of_boxes(real_data: Path, tmp_path: Path) -> None:
    for file in (real_data / "chestxray14").glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "00000001_000.png").write_bytes(b"?")
    pq.write_table(
        pa.table({schema.IMAGE_ID: ["00000001_000.png"], schema.TRUE_THETA: [POSE]}),
        tmp_path / "truth.parquet",
    )
    manifest = open_manifest(str(tmp_path))
    assert manifest.table[schema.TRUE_THETA].to_pylist() == [POSE]
    assert manifest.boxes_frame_px == 1024


def write_truth(archive: Path, ids: list[str | None], **columns: list) -> None:
    types = pa.schema([schema.MANIFEST.field(name) for name in (schema.IMAGE_ID, *columns)])
    pq.write_table(pa.table({schema.IMAGE_ID: ids, **columns}, schema=types), archive / "truth.parquet")


def of_uri(uri: str | None, rle: str | None = None, label: str | None = schema.LUNGS) -> dict[str, str | None]:
    fields = dict.fromkeys(field.name for field in schema.MASK_SOURCE_TYPE)
    return fields | {schema.LABEL: label, schema.MASK_RLE: rle, schema.MASK_URI: uri}


@pytest.mark.parametrize(
    "given", ["masks/a.png", "./x/../masks/a.png", "{archive}/masks/a.png", "file://{archive}/masks/a.png"]
)
def test_masks_are_resolved_against_the_archive(archive: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    write_truth(archive, ["a.png"], masks=[[of_uri(given.format(archive=archive)), of_uri(None, "0 4")]])
    masks = open_manifest(str(archive)).table[schema.MASKS].to_pylist()
    assert masks == [[of_uri(f"{archive}/masks/a.png"), of_uri(None, "0 4")], None, None]


@pytest.mark.parametrize(
    "given",
    [
        "../secret.png",
        "x/../../secret.png",
        "/etc/hostname",
        "file:///etc/hostname",
        "s3://other/a.png",
        "{archive}-2/a.png",
        "{archive}/../a.png",
        "a\0.png",
        "..",
        "http://x/a.png",
    ],
)
def test_masks_outside_the_archive_are_an_error(archive: Path, given: str) -> None:
    write_truth(archive, ["a.png"], masks=[[of_uri(given.format(archive=archive))]])
    reasons = "expected masks inside the archive|expected a local path, file:///path|contains a NUL character"
    with pytest.raises(UserError, match=reasons):
        open_manifest(str(archive))


def test_masks_elsewhere_are_read_if_the_user_allows_it(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_ALLOW_OUTSIDE_MASKS", "1")
    write_truth(archive, ["a.png"], masks=[[of_uri("../m/a.png"), of_uri("s3://other/a.png")]])
    masks = open_manifest(str(archive)).table[schema.MASKS][0].as_py()
    assert [mask[schema.MASK_URI] for mask in masks] == [str(archive.parent / "m" / "a.png"), "s3://other/a.png"]


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("m/a.png", "s3://b/x/m/a.png"),
        ("s3://b/x/./m/a.png", "s3://b/x/m/a.png"),
        ("../y/a.png", None),
        ("s3://b/x/../y/a.png", None),
        ("s3://b/xy/a.png", None),
    ],
)
def test_masks_of_an_archive_in_a_bucket(given: str, uri: str | None) -> None:
    table = pa.table(
        {schema.IMAGE_ID: ["a.png"], schema.MASKS: [[of_uri(given)]]},
        schema=pa.schema([schema.MANIFEST.field(name) for name in (schema.IMAGE_ID, schema.MASKS)]),
    )
    if uri is None:
        with pytest.raises(UserError, match="expected masks inside the archive"):
            sidecar.with_masks_inside(table, "s3://b/x/truth.parquet", "s3://b/x")
    else:
        resolved = sidecar.with_masks_inside(table, "s3://b/x/truth.parquet", "s3://b/x")
        assert resolved[schema.MASKS].to_pylist() == [[of_uri(uri)]]


@pytest.mark.parametrize("mask", [of_uri(None), of_uri("", ""), of_uri("a.png", label=None), None])
def test_a_mask_without_label_or_data_is_an_error(archive: Path, mask: dict | None) -> None:
    write_truth(archive, ["a.png"], masks=[[mask]])
    with pytest.raises(UserError, match="expected a label and either a code or a URI"):
        open_manifest(str(archive))


def test_repeated_rows_count_once_and_contradictory_rows_are_unknown(archive: Path) -> None:
    other = [*POSE[:5], 0.5]
    write_truth(
        archive,
        ["a.png", "b.png", "a.png", "b.png", "c.png"],
        true_theta=[POSE, POSE, POSE, other, POSE],
        masks=[[of_uri(None, "0 4")]] * 5,
    )
    manifest = open_manifest(str(archive))
    assert manifest.table[schema.TRUE_THETA].to_pylist() == [POSE, None, POSE]
    assert manifest.table[schema.MASKS].null_count == 0
    assert manifest.notes[-1].startswith("contradictory rows in truth.parquet: 1 image;")


@pytest.mark.parametrize("content", ["no table", "no ids", "damaged", "cut off", "twice"])
def test_an_invalid_truth_file_is_an_error(archive: Path, content: str) -> None:
    path = archive / "truth.parquet"
    write_truth(archive, ["a.png"] * 1_000, true_theta=[POSE] * 1_000)
    data = path.read_bytes()
    path.write_bytes({"no table": b"no table", "cut off": data[: len(data) // 2]}.get(content, data))
    if content == "damaged":
        path.write_bytes(data[:10] + bytes(60) + data[70:])
    elif content == "no ids":
        pq.write_table(pa.table({"name": ["a.png"]}), path)
    elif content == "twice":
        pq.write_table(pa.table([["a.png"], ["a.png"]], [schema.IMAGE_ID] * 2), path)
    with pytest.raises(UserError, match=r"truth\.parquet: expected a table with the columns image_id"):
        open_manifest(str(archive))
