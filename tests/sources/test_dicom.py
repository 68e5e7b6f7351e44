"""Source `dicom`: identity from headers, pseudonyms, splits by patient, other objects, copies, and resumed scans."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom import Dataset, dcmread, uid

from cxr import schema, storage
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources import find_source, header_scan, image_files, open_manifest
from cxr.sources.manifest import Manifest
from cxr.sources.options import ReadOptions
from cxr.sources.pseudonyms import Pseudonyms
from cxr.storage import s3
from tests.made_containers import container
from tests.odd_files import dataset, dicom, radiograph
from tests.servers import faulty
from tests.servers.faulty import Faulty

PLANTED = ("Zebrafish^Quentin", "MRN-77123", "ACC-55987", "19511224")
KEY = "a secret of at least sixteen bytes"


def xray(number: int, patient: str | None = "MRN-77123", **tags: Any) -> Dataset:
    """An X-ray with a unique UID and all attributes that identify a patient."""
    named = {
        "SOPInstanceUID": f"1.2.3.{number}",
        "StudyInstanceUID": f"1.2.9.{number}",
        "SeriesInstanceUID": f"1.2.8.{number}",
        "PatientName": PLANTED[0],
        "PatientID": patient,
        "AccessionNumber": PLANTED[2],
        "PatientBirthDate": PLANTED[3],
        "StudyDate": "20200102",
        "PatientSex": "F",
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "Manufacturer": "Acme",
    }
    ds = dataset(radiograph(seed=number))
    for keyword, value in (named | tags).items():
        if value is not None:
            setattr(ds, keyword, value)
        elif keyword in ds:
            delattr(ds, keyword)
    return ds


def write(folder: Path, name: str, content: Dataset | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dicom(content) if isinstance(content, Dataset) else content)
    return path


def read(folder: Path | str, **options: Any) -> tuple[Manifest, dict[str, dict[str, Any]]]:
    manifest = open_manifest(str(folder), ReadOptions(**options))
    manifest.table.validate(full=True)
    assert manifest.table.schema.equals(schema.MANIFEST)
    return manifest, {row[schema.IMAGE_ID]: row for row in manifest.table.to_pylist()}


def test_headers_give_the_manifest(tmp_path: Path) -> None:
    write(tmp_path, "a.dcm", xray(1, PixelSpacing=[0.1, 0.2]))
    write(tmp_path, "export/b", xray(2, ViewPosition="LL", PatientSex=None, PatientBirthDate=None))
    assert find_source(str(tmp_path)).name == "dicom"
    manifest, rows = read(tmp_path)
    assert set(rows) == {"1.2.3.1", "1.2.3.2"}
    row = rows["1.2.3.1"]
    assert (row[schema.STUDY_ID], row[schema.SERIES_ID]) == ("1.2.9.1", "1.2.8.1")
    assert (row[schema.SEX], row[schema.AGE_YEARS], row[schema.VIEW]) == ("F", 68.0, "PA")
    assert (row[schema.MODALITY], row[schema.BODY_PART]) == ("DX", "CHEST")
    assert row[schema.SPACING_MM] == pytest.approx([0.1, 0.2])
    assert '"manufacturer": "Acme"' in row[schema.EXTRA]
    assert row[schema.SOURCE_URI] == str(tmp_path / "a.dcm")
    assert (rows["1.2.3.2"][schema.VIEW], rows["1.2.3.2"][schema.SEX]) == ("LL", None)
    assert manifest.notes == ["patients by PatientID: 1 patient"]


def test_all_studies_of_a_patient_are_in_one_split_under_every_key(tmp_path: Path) -> None:
    for number in range(120):
        write(tmp_path / "archive", f"{number}.dcm", xray(number, f"MRN-{number // 3}"))
    splits = []
    for key in ("first key of sixteen bytes", "second key of sixteen bytes"):
        (tmp_path / key).write_text(key)
        _, rows = read(tmp_path / "archive", id_key=str(tmp_path / key))
        by_patient: dict[str, set[str]] = {}
        for number in range(120):
            row = rows[f"1.2.3.{number}"]
            by_patient.setdefault(row[schema.PATIENT_ID], set()).add(row[schema.SPLIT])
        assert len(by_patient) == 40
        assert {len(each) for each in by_patient.values()} == {1}
        splits.append(({image: row[schema.SPLIT] for image, row in rows.items()}, set(by_patient)))
    assert splits[0][0] == splits[1][0]
    assert set(splits[0][0].values()) == set(schema.SPLITS)
    assert not splits[0][1] & splits[1][1], "another key gives other ids"


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_nothing_of_a_patient_is_stored_or_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    for number in range(3):
        write(archive, f"{number}.dcm", xray(number, BodyPartExamined="Zebrafish", ViewPosition="Zebrafish"))
    write(archive, "cut.dcm", dicom(xray(9))[:700])
    manifest, _ = read(archive, headers=str(out / "headers"))
    rows = make_rows(manifest.table, PixelFormat(16))
    shown = [*capfd.readouterr(), *manifest.notes, str(manifest.table.to_pylist()), str(rows.to_pylist())]
    stored = [path for path in (out / "headers").iterdir() if path.suffix == ".parquet"]
    assert stored
    shown += [str(pq.read_table(path).to_pylist()) for path in stored]
    for planted in (*PLANTED, "Zebrafish"):
        assert not any(planted in text for text in shown)
        assert not any(planted.encode() in path.read_bytes() for path in stored)
    key = out / "headers" / "id_key.txt"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_text()) == 64


def test_ids_are_kept_on_request(tmp_path: Path) -> None:
    write(tmp_path / "archive", "a.dcm", xray(1))
    _, rows = read(tmp_path / "archive", keep_ids=True, headers=str(tmp_path / "headers"))
    assert rows["1.2.3.1"][schema.PATIENT_ID] == "MRN-77123"
    (part,) = (tmp_path / "headers").glob("*.parquet")
    assert pq.read_table(part)[header_scan.ACCESSION].to_pylist() == ["ACC-55987"]


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "archive", "a.dcm", xray(1))
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "short").write_text("short")

    def patient(**options: str) -> str:
        return read(tmp_path / "archive", **options)[1]["1.2.3.1"][schema.PATIENT_ID]

    from_file = patient(id_key=str(tmp_path / "key"))
    assert from_file != patient()
    monkeypatch.setenv("CXR_ID_KEY", KEY)
    assert patient() == from_file
    with pytest.raises(UserError, match=r"expected a key of at least 16 bytes in --id-key .*short, got 5"):
        patient(id_key=str(tmp_path / "short"))


def test_other_objects_are_left_out_by_class_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "xray.dcm", xray(1))
    write(tmp_path, "report.dcm", xray(2, SOPClassUID=uid.BasicTextSRStorage, PixelData=None))
    write(tmp_path, "dose.dcm", xray(3, SOPClassUID=uid.XRayRadiationDoseSRStorage, PixelData=None))
    write(tmp_path, "ct.dcm", xray(4, SOPClassUID=uid.CTImageStorage, Modality="CT"))
    write(tmp_path, "screen.dcm", xray(5, SOPClassUID=uid.SecondaryCaptureImageStorage, Modality="CT"))
    write(tmp_path, "private.dcm", xray(6, SOPClassUID="1.3.6.1.4.1.99999.1"))
    manifest, rows = read(tmp_path)
    assert set(rows) == {"1.2.3.1", "1.2.3.6"}
    assert manifest.notes[0] == (
        "left out 4 DICOM files that are not X-ray images: 1 CT Image Storage, 1 X-Ray Radiation Dose SR Storage, "
        "1 Basic Text SR Storage, 1 modality CT"
    )
    for name in ("xray.dcm", "private.dcm"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"expected X-rays in .*, got none"):
        read(tmp_path)


def test_a_copy_that_is_replaced_by_another_image_of_the_same_size_is_no_copy_any_more(tmp_path: Path) -> None:
    archive, headers = tmp_path / "archive", str(tmp_path / "headers")
    write(archive, "a.dcm", xray(1))
    write(archive, "b.dcm", xray(1))
    assert [*read(archive, headers=headers)[1]] == ["1.2.3.1"]
    changed = xray(1)
    changed.PixelData = radiograph(seed=77).tobytes()
    write(archive, "b.dcm", changed)
    assert [*read(archive, headers=headers)[1]] == ["a.dcm", "b.dcm"]


def test_copies_are_used_once_and_different_files_with_one_uid_all(tmp_path: Path) -> None:
    write(tmp_path, "a.dcm", xray(1))
    write(tmp_path, "copy/a.dcm", xray(1))
    write(tmp_path, "b.dcm", xray(2))
    changed = xray(2)
    changed.PixelData = radiograph(seed=77).tobytes()  # same header, same size
    write(tmp_path, "c.dcm", changed)
    write(tmp_path, "d.dcm", dicom(xray(3)).replace(b"1.2.3.3", b"invalid"))
    manifest, rows = read(tmp_path, headers=str(tmp_path / "headers"))
    assert read(tmp_path, headers=str(tmp_path / "headers"))[1] == rows, "the hashes of the copies are stored, too"
    assert set(rows) == {"1.2.3.1", "b.dcm", "c.dcm", "d.dcm"}
    assert rows["1.2.3.1"][schema.SOURCE_URI] == str(tmp_path / "a.dcm")
    assert "copies of the same DICOM file: 1; one of each is used" in manifest.notes
    assert "files that share a SOPInstanceUID but differ: 2; each is used, with its path as its id" in manifest.notes
    assert "DICOM files without SOPInstanceUID: 1; their paths are their ids" in manifest.notes


def test_unreadable_headers_and_other_files_are_images_that_decoding_rejects(tmp_path: Path) -> None:
    write(tmp_path, "a.dcm", xray(1))
    write(tmp_path, "broken.dcm", bytes(128) + b"DICM" + b"\x02\0\x10\0UI\x04\x001.2\0" + b"\xff" * 40)
    write(tmp_path, "notes.dcm", b"no DICOM file")
    cv2.imwrite(str(tmp_path / "b.png"), radiograph())
    manifest, rows = read(tmp_path, source="dicom")
    assert set(rows) == {"1.2.3.1", "broken.dcm", "notes.dcm", "b.png"}
    assert "files that are not DICOM: 2; each counts as the only image of a patient" in manifest.notes
    assert any(
        note.startswith("DICOM files whose header cannot be read: 1 (1 x damaged DICOM") for note in manifest.notes
    )
    decoded = make_rows(manifest.table, PixelFormat(16))
    errors = dict(zip(decoded[schema.IMAGE_ID].to_pylist(), decoded[schema.ERROR].to_pylist(), strict=True))
    assert [image for image, error in errors.items() if error is None] == ["1.2.3.1", "b.png"]


def test_studies_stand_in_for_patients_without_an_id_or_with_a_placeholder(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "none", f"{number}.dcm", xray(number, None, StudyInstanceUID=f"1.5.{number // 2}"))
    manifest, rows = read(tmp_path / "none")
    assert {row[schema.PATIENT_ID] for row in rows.values()} == {"1.5.0", "1.5.1"}
    assert manifest.notes == [
        "PatientID is missing: 4 images, whose studies count as one patient each (2 patients in all)"
    ]
    for number in range(20):
        write(tmp_path / "anonymous", f"{number}.dcm", xray(number, "ANON" if number < 15 else f"P{number}"))
    manifest, rows = read(tmp_path / "anonymous")
    assert len({row[schema.PATIENT_ID] for row in rows.values()}) == 20
    assert manifest.notes[0].startswith("PatientID is missing or the same in most studies: 15 images")


def test_a_stopped_scan_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_scan, "_FEWEST", 4)
    for number in range(12):
        write(tmp_path / "archive", f"{number:02d}.dcm", xray(number))
    options = {"headers": str(tmp_path / "headers")}
    original, written = header_scan.Scan.write, []

    def write_two(scan: header_scan.Scan, part: header_scan.ScanPart) -> int:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part.name)
        return original(scan, part)

    monkeypatch.setattr(header_scan.Scan, "write", write_two)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "archive", **options)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "headers").glob("*.parquet")}
    assert len(first) == 2
    monkeypatch.setattr(header_scan.Scan, "write", original)
    _, rows = read(tmp_path / "archive", **options)
    assert len(rows) == 12
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())

    monkeypatch.setattr(header_scan.Scan, "write", None)  # an unchanged archive is not read again
    assert read(tmp_path / "archive", **options)[1] == rows
    write(tmp_path / "archive", "12.dcm", xray(12))
    with pytest.raises(TypeError):
        read(tmp_path / "archive", **options)


def test_a_later_scan_reads_only_files_that_are_new_or_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write(tmp_path / "archive", f"{number}.dcm", xray(number))
    options = {"headers": str(tmp_path / "headers")}
    read(tmp_path / "archive", **options)
    original, scanned = header_scan.read_headers, []

    def recording(files: pa.Table, *rest: Any) -> pa.Table:
        scanned.extend(files[header_scan.PATH].to_pylist())
        return original(files, *rest)

    monkeypatch.setattr(header_scan, "read_headers", recording)
    write(tmp_path / "archive", "0-new.dcm", xray(100))  # sorted before others
    changed = write(tmp_path / "archive", "3.dcm", xray(3, ViewPosition="AP"))
    (tmp_path / "archive" / "5.dcm").unlink()
    assert changed.stat().st_size == (tmp_path / "archive" / "4.dcm").stat().st_size
    _, rows = read(tmp_path / "archive", **options)
    assert sorted(scanned) == ["0-new.dcm", "3.dcm"]
    assert {image: row[schema.VIEW] for image, row in rows.items()} == {
        f"1.2.3.{number}": "AP" if number == 3 else "PA" for number in (0, 1, 2, 3, 4, 100)
    }
    assert rows["1.2.3.100"][schema.SOURCE_URI] == str(tmp_path / "archive" / "0-new.dcm")


def test_files_that_storage_did_not_give_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        write(tmp_path / "archive", f"{number}.dcm", xray(number))
    stored, read = str(tmp_path / "headers"), storage.read_start

    def denied(uri: str, size: int) -> tuple[bytes, int]:
        if uri.endswith("1.dcm"):
            raise storage.UnreadableError("no permission")
        return read(uri, size)

    reading = ReadOptions(source="dicom", headers=stored)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_start", denied)
        for _ in range(2):
            ids = open_manifest(str(tmp_path / "archive"), reading).table[schema.IMAGE_ID].to_pylist()
            assert sorted(ids) == ["1.2.3.0", "1.dcm"]
    assert sorted(open_manifest(str(tmp_path / "archive"), reading).table[schema.IMAGE_ID].to_pylist()) == [
        "1.2.3.0",
        "1.2.3.1",
    ]


@pytest.mark.parametrize("fork", [True, False])
def test_other_processes_read_many_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: bool) -> None:
    monkeypatch.setattr(header_scan, "_can_fork", lambda uri: fork)
    monkeypatch.setattr(header_scan, "HERE_AT_MOST", 2)
    monkeypatch.setattr(header_scan, "_FEWEST", 2)
    for number in range(5):
        write(tmp_path, f"{number}.dcm", xray(number))
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("CXR_ID_KEY", KEY)
    _, in_children = read(tmp_path, source="dicom")
    monkeypatch.setattr(header_scan, "HERE_AT_MOST", 100)
    assert read(tmp_path, source="dicom")[1] == in_children


@pytest.mark.parametrize(
    "syntax",
    [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless],
    ids=lambda syntax: syntax.name,
)
def test_transfer_syntaxes(tmp_path: Path, syntax: uid.UID) -> None:
    view = Dataset()
    view.CodeValue, view.CodingSchemeDesignator, view.CodeMeaning = "399067008", "SCT", "lateral"
    ds = xray(1, ViewPosition=None, ViewCodeSequence=[view])
    if syntax == uid.ExplicitVRBigEndian:
        ds.PixelData = radiograph(seed=1).astype(">u2").tobytes() if ds.BitsAllocated == 16 else ds.PixelData
    path = write(tmp_path, "a.dcm", dicom(ds, syntax))
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    _, rows = read(tmp_path, headers=str(tmp_path / "headers"), source="dicom")
    assert rows["1.2.3.1"][schema.VIEW] == "LATERAL"
    (part,) = (tmp_path / "headers").glob("*.parquet")
    (row,) = pq.read_table(part).to_pylist()
    assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX]) == (ds.Rows, ds.Columns)
    assert row[header_scan.TRANSFER_SYNTAX] == syntax


def test_a_long_header_is_read_in_further_steps(tmp_path: Path) -> None:
    ds = xray(1)
    ds.add_new(0x00091001, "OB", bytes(100_000))  # before everything that the scan needs
    ds.add_new(0x00280301, "OB", bytes(100_000))
    write(tmp_path, "a.dcm", ds)
    assert read(tmp_path)[1]["1.2.3.1"][schema.SERIES_ID] == "1.2.8.1"


def test_select_leaves_out_laterals(tmp_path: Path) -> None:
    for number, view in enumerate(("PA", "LATERAL", "AP", None)):
        write(tmp_path, f"{number}.dcm", xray(number, ViewPosition=view))
    manifest, rows = read(tmp_path, select="modality in CR,DX and view in PA,AP")
    assert set(rows) == {"1.2.3.0", "1.2.3.2"}
    assert manifest.notes[-1].endswith("left out 2 of 4 images (modality: DX 2; view: LATERAL 1, unknown 1)")
    assert set(read(tmp_path, select="manufacturer == acme and view not in LATERAL")[1]) == {
        "1.2.3.0",
        "1.2.3.2",
        "1.2.3.3",
    }


def test_mixed_folders_are_read_as_folders_unless_asked(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "b.png"), radiograph())
    write(tmp_path, "a.dcm", xray(1))
    assert find_source(str(tmp_path)).name == "folder"
    assert set(read(tmp_path, source="dicom")[1]) == {"1.2.3.1", "b.png"}


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
def test_containers_of_dicom_files_are_read_as_dicom(tmp_path: Path, suffix: str) -> None:
    ct = xray(8, SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT")
    for year, exams in {"2023": (xray(1), ct), "2024": (xray(2), xray(3, patient="MRN-2"))}.items():
        files = {f"{number}/x.dcm": dicom(exam) for number, exam in enumerate(exams)}
        write(tmp_path, f"{year}.{suffix}", container(files | {"viewer.exe": b"MZ"}, suffix))
    write(tmp_path, f"0_notes.{suffix}", container({"readme.txt": b"?"}, suffix))
    write(tmp_path, f"1_broken.{suffix}", b"?")
    assert find_source(str(tmp_path)).name == "dicom"
    _, rows = read(tmp_path)
    assert {"1.2.3.1", "1.2.3.2", "1.2.3.3"} < set(rows)
    assert "1.2.3.8" not in rows
    assert rows["1.2.3.1"][schema.PATIENT_ID] == rows["1.2.3.2"][schema.PATIENT_ID]
    assert rows["1.2.3.1"][schema.PATIENT_ID] != rows["1.2.3.3"][schema.PATIENT_ID]


@pytest.mark.parametrize("name", ["0VERSION", "IM05X", "viewer.exe", "zz"])
def test_a_stray_file_does_not_change_the_source(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the file system lists it."""
    for number in range(20):
        write(tmp_path, f"IM{number:02}", xray(number))
    write(tmp_path, name, b"\0\1" * 100)
    stray_first = sorted(storage.list_files(str(tmp_path)), key=lambda entry: entry.path != name)
    for listed in (stray_first, stray_first[::-1]):
        monkeypatch.setattr(image_files, "list_files", lambda *_, listed=listed: iter(listed))
        assert find_source(str(tmp_path)).name == "dicom"


def test_latin_ids_stay_different(tmp_path: Path) -> None:
    kept = Pseudonyms(b"?" * 16, keep_ids=True)
    assert [kept.of("PatientID", text.encode("latin-1")) for text in ("MÜ1", "MÄ1")] == ["M\\xdc1", "M\\xc41"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A server with an empty bucket `xrays` that counts the bytes of responses."""
    with faulty.moto() as backend, faulty.before(backend) as server:
        for name, value in faulty.variables(server.url).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="xrays")
        yield server


def test_only_the_beginning_of_an_object_is_read(bucket: Faulty, tmp_path: Path) -> None:
    large = xray(1)
    large.Rows = large.Columns = 1024
    large.PixelData = bytes(1 << 20)
    storage.write_bytes("s3://xrays/archive/large.dcm", dicom(large))
    storage.write_bytes("s3://xrays/archive/empty.dcm", b"")
    ranges: list[bytes | None] = []
    client = s3.client("xrays")
    client.meta.events.register(
        "before-send.s3.GetObject",
        lambda request, **_: ranges.append(request.headers.get("Range")) if request.url.endswith("dcm") else None,
    )
    _, rows = read("s3://xrays/archive", source="dicom", headers="s3://xrays/out/headers")
    assert set(rows) == {"1.2.3.1", "empty.dcm"}
    assert set(ranges) == {b"bytes=0-32767"}
