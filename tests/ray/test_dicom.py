"""DICOM archives on the cluster: headers read by its workers, selected shards, and scores that identify exams."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data import dicom_headers
from cxr.data.ingest import ingest
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources import dicom, header_scan, open_manifest
from cxr.sources.options import ReadOptions
from tests.sources.test_dicom import PLANTED, write, xray

pytestmark = pytest.mark.ray
VIEWS = ("PA", "AP", "LATERAL", "PA")


@pytest.fixture
def archive(tmp_path: Path) -> str:
    for number in range(48):
        write(
            tmp_path / "archive",
            f"{number}.dcm",
            xray(number, f"MRN-77123-{number // 4}", ViewPosition=VIEWS[number % 4]),
        )
    return str(tmp_path / "archive")


@pytest.mark.slow
def test_workers_read_the_headers_of_large_archives(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    monkeypatch.setattr(dicom_headers, "ON_CLUSTER", 20)
    monkeypatch.setattr(header_scan, "_FEWEST", 8)
    reading = ReadOptions().with_headers(str(tmp_path / "out"))
    dicom_headers.read_large_archive(archive, reading)
    with dicom.planned(archive, reading) as (scan, _):
        assert (len(scan.read), scan.parts) == (6, [])
    monkeypatch.setattr(header_scan.Scan, "write", None)
    assert open_manifest(archive, reading).table.num_rows == 48


@pytest.mark.slow
def test_shards_have_the_selected_images_of_whole_patients(archive: str, tmp_path: Path, ray_cluster: None) -> None:
    out = tmp_path / "shards"
    reading = ReadOptions(select="view in PA,AP", gate="off")
    result = ingest(archive, str(out), reading=reading, pixels=PixelFormat(16))
    assert sum(result.counts.values()) == 36
    assert "--select 'view in PA,AP' left out 12 of 48 images (view: LATERAL 12)" in result.notes
    assert storage.read_json(str(out / "archive.json"))["select"] == "view in PA,AP"
    parts = [path for split in schema.SPLITS for path in (out / split).glob("*.parquet")]
    rows = [row for path in parts for row in pq.read_table(path).to_pylist()]
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row[schema.PATIENT_ID], set()).add(row[schema.SPLIT])
        assert (row[schema.SEX], row[schema.AGE_YEARS], row[schema.MODALITY]) == ("F", 68.0, "DX")
        assert row[schema.STUDY_ID] == row[schema.IMAGE_ID].replace("1.2.3.", "1.2.9.")
    assert len(splits) == 12
    assert {len(each) for each in splits.values()} == {1}
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in written for planted in PLANTED if planted.encode() in path.read_bytes()]
    with pytest.raises(UserError, match="select was 'view in PA,AP', is now 'view in PA'"):
        ingest(archive, str(out), reading=ReadOptions(select="view in PA", gate="off"), pixels=PixelFormat(16))
