"""A list of URIs as an archive: CSV and Parquet, relative and absolute entries, and which files it may name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources import find_source, open_manifest
from tests.made_containers import saved, zipped
from tests.odd_files import dataset, dicom

IMAGE = dicom(dataset(np.arange(2000, dtype=np.uint16).reshape(40, 50)))


def columns(uri: str, *names: str) -> list[tuple]:
    table = open_manifest(uri).table
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_relative_and_absolute_entries(tmp_path: Path) -> None:
    saved(tmp_path / "images" / "1.dcm", IMAGE)
    saved(tmp_path / "packed.zip", zipped({"2.dcm": IMAGE}))
    entries = [
        "images/1.dcm",
        "packed.zip!/2.dcm",
        f"file://{tmp_path}/images/3.dcm",
        "s3://other/4.dcm",
        "../5.dcm",
        "images\\6.dcm",
    ]
    uri = saved(
        tmp_path / "list" / "images.csv",
        "\n".join(["Path", *entries[:0], *(f"../{e}" if i < 2 else e for i, e in enumerate(entries))]).encode(),
    )
    assert find_source(uri).name == "list"
    assert columns(uri, schema.IMAGE_ID, schema.SOURCE_URI) == [
        ("../images/1.dcm", f"{tmp_path}/images/1.dcm"),
        ("../packed.zip!/2.dcm", f"{tmp_path}/packed.zip!/2.dcm"),
        (entries[2], f"{tmp_path}/images/3.dcm"),
        ("s3://other/4.dcm", "s3://other/4.dcm"),
        ("../5.dcm", f"{tmp_path}/5.dcm"),
        ("images\\6.dcm", f"{tmp_path}/list/images/6.dcm"),
    ]
    rows = make_rows(open_manifest(uri).table.slice(0, 3), PixelFormat(32))
    assert rows[schema.ERROR].to_pylist() == [None, None, "file not found"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_optional_columns(tmp_path: Path, suffix: str) -> None:
    text = (
        b"uri,image_id,patient_id,split,view,age\n"
        b"a.dcm,A,p1,Training,PA,1\nb.dcm,B,p1,,LATERAL,2\nc.dcm,C,p2,test,,3\nd.dcm,D,,dev,,4\na.dcm,A,p1,Training,PA,1\n"
    )
    uri = saved(tmp_path / "images.csv", text)
    if suffix == "parquet":
        header, *lines = [line.split(",") for line in text.decode().split()]
        table = pa.table({name: [line[at] or None for line in lines] for at, name in enumerate(header)})
        sink = io.BytesIO()
        pq.write_table(table.set_column(5, "age", pa.array([1, 2, 3, 4, 1])), sink)
        uri = saved(tmp_path / "images.parquet", sink.getvalue())
    expected = [
        ("A", "p1", "train", "PA"),
        ("B", "p1", "train", "LATERAL"),
        ("C", "p2", "test", None),
        ("D", "D", "val", None),
    ]
    assert columns(uri, schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT, schema.VIEW) == expected
    assert open_manifest(uri).notes == ["repeated rows: 1; each image is used once"]


def test_without_patients_each_image_counts_as_a_patient(tmp_path: Path) -> None:
    uri = saved(tmp_path / "images.csv", b"file\n" + b"".join(b"%d.dcm\n" % number for number in range(200)))
    assert {split for (split,) in columns(uri, schema.SPLIT)} == set(schema.SPLITS)
    assert "each image counts as a patient" in open_manifest(uri).notes[0]
    uri = saved(tmp_path / "b.csv", b"file,patient_id,split\n1,p,train\n2,p,test\n")
    assert open_manifest(uri).notes == ["patients that the list puts into several splits: 1"]


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("name\na.dcm\n", "expected one of the columns source_uri, uri, path.* got 'name'"),
        ("", "empty file"),
        ("uri\n", "got no rows"),
        ("uri,view\n,PA\n", "line 2: expected a path or URI, got ''"),
        ("uri\nhttp://host/a.dcm\n", "line 2: expected a local path.*got 'http://host/a.dcm'"),
        ("uri,split\na.dcm,train\nb.dcm,nowhere\n", "line 3: expected the split train, val or test, got 'nowhere'"),
        ("uri,image_id\na.dcm,1\nb.dcm,1\n", "line 3: expected one row per image, got '1'"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, trouble: str) -> None:
    uri = saved(tmp_path / "images.csv", text.encode())
    with pytest.raises(UserError, match=trouble):
        open_manifest(uri)


def test_a_damaged_parquet_file_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a Parquet file"):
        open_manifest(saved(tmp_path / "images.parquet", b"PAR1 no PAR1"))
    with pytest.raises(UserError, match="does not exist"):
        open_manifest(str(tmp_path / "none.csv"))


def test_a_list_in_a_container_refers_only_to_its_members(tmp_path: Path) -> None:
    saved(tmp_path / "secret.dcm", IMAGE)
    files = {"lists/good.csv": b"uri\n../1.dcm\n", "1.dcm": IMAGE}
    outside = [
        "../../secret.dcm",
        f"{tmp_path}/secret.dcm",
        f"file://{tmp_path}/secret.dcm",
        "s3://b/1.dcm",
        "../../a.zip!x",
    ]
    for number, entry in enumerate(outside):
        files[f"lists/{number}.csv"] = f"uri\n{entry}\n".encode()
    uri = saved(tmp_path / "a.zip", zipped(files))
    assert columns(f"{uri}!/lists/good.csv", schema.SOURCE_URI) == [(f"{uri}!/1.dcm",)]
    for number in range(len(outside)):
        with pytest.raises(UserError, match="line 2: expected a member of the container"):
            open_manifest(f"{uri}!/lists/{number}.csv")
