"""A folder with a DICOMDIR lists exactly the images that it references."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.fileset import FileSet

from cxr import schema
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.image_files import PATH, list_images
from tests.made_containers import saved, zipped
from tests.odd_files import dataset, dicom

PIXELS = np.arange(2000, dtype=np.uint16).reshape(40, 50)


def dicomdir(records: Sequence[tuple[str, str | list[str] | None, int]]) -> bytes:
    """A DICOMDIR with records of (type, referenced file, in-use flag)."""
    file = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    file.file_meta.MediaStorageSOPClassUID = uid.MediaStorageDirectoryStorage
    file.file_meta.MediaStorageSOPInstanceUID = uid.UID("1.2.3")
    file.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    items = []
    for kind, path, in_use in records:
        item = Dataset()
        item.DirectoryRecordType, item.RecordInUseFlag = kind, in_use
        if path:
            item.ReferencedFileID = path
        items.append(item)
    file.DirectoryRecordSequence = items
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


RECORDS = [
    ("PATIENT", None, 0xFFFF),
    ("STUDY", None, 0xFFFF),
    ("IMAGE", ["DICOM", "IM1"], 0xFFFF),
    ("IMAGE", ["DICOM", "IM2"], 0xFFFF),
    ("IMAGE", "ROOT", 0xFFFF),
    ("IMAGE", ["DICOM", "IM1"], 0xFFFF),
    ("IMAGE", ["DICOM", "DELETED"], 0),
    ("SR DOCUMENT", ["DICOM", "SR1"], 0xFFFF),
]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A copy of a CD, with names in lower case as Linux shows them."""
    saved(tmp_path / "cd" / "DICOMDIR", dicomdir(RECORDS))
    for name in ("dicom/im1", "dicom/im2", "DICOM/SR1", "DICOM/DELETED", "ROOT", "VIEWER.EXE", "autorun.inf"):
        saved(tmp_path / "cd" / name, b"?")
    return tmp_path / "cd"


def test_exactly_the_referenced_images_are_listed(media: Path) -> None:
    files, notes = list_images(str(media))
    assert files[PATH].to_pylist() == ["ROOT", "dicom/im1", "dicom/im2"]
    assert files[schema.SOURCE_URI].to_pylist() == [f"{media}/{path}" for path in files[PATH].to_pylist()]
    assert notes == [
        "skipped files that are not images: 1 .exe, 1 .inf",
        "DICOMDIR lists 3 images; files that it does not list are not read: 2",
        "skipped entries of DICOMDIR: 1 not an image",
    ]


def test_a_medium_written_by_pydicom(tmp_path: Path) -> None:
    medium = FileSet()
    for number in range(3):
        ids = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": f"1.2.{number}", "SOPInstanceUID": f"1.2.3.{number}"}
        text = {"PatientID": "p", "StudyDate": "20200101", "StudyTime": "120000", "StudyID": "1", "Modality": "DX"}
        image = dataset(PIXELS, **ids, **text, SeriesNumber=number, InstanceNumber=1)
        medium.add(saved(tmp_path / "in" / f"{number}.dcm", dicom(image)))
    medium.write(tmp_path / "cd")
    saved(tmp_path / "cd" / "other.dcm", b"?")
    table = open_manifest(str(tmp_path / "cd")).table
    assert table.num_rows == 3
    assert make_rows(table, PixelFormat(32))[schema.ERROR].null_count == 3


def test_a_medium_in_a_zip_file(media: Path, tmp_path: Path) -> None:
    files = {str(path.relative_to(media)): path.read_bytes() for path in media.rglob("*") if path.is_file()}
    packed = saved(tmp_path / "cd.zip", zipped({f"CD/{path}": data for path, data in files.items()}))
    table = open_manifest(packed).table
    assert table[schema.IMAGE_ID].to_pylist() == ["ROOT", "dicom/im1", "dicom/im2"]
    assert table[schema.SOURCE_URI].to_pylist()[1] == f"{packed}!/CD/dicom/im1"


def test_missing_files_are_rows_with_the_reason(media: Path) -> None:
    (media / "dicom" / "im1").unlink()
    manifest = open_manifest(str(media))
    assert "DICOMDIR lists 3 images, 1 of which do not exist" in manifest.notes[1]
    rows = make_rows(manifest.table, PixelFormat(32))
    errors = dict(zip(rows[schema.IMAGE_ID].to_pylist(), rows[schema.ERROR].to_pylist(), strict=True))
    assert errors["DICOM/IM1"] == "file not found"
    assert errors["ROOT"].startswith("unsupported file type")


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_references_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "secret", b"?")
    outside: list[str | list[str]] = [["..", "secret"], "../secret", "/etc/passwd", ["A", "", "B"], ["."]]
    records = [("IMAGE", path, 0xFFFF) for path in outside]
    saved(tmp_path / "cd" / "DICOMDIR", dicomdir([*records, ("IMAGE", "IM1", 0xFFFF)]))
    saved(tmp_path / "cd" / "IM1", b"?")
    files, notes = list_images(str(tmp_path / "cd"))
    assert files[schema.SOURCE_URI].to_pylist() == [f"{tmp_path}/cd/IM1"]
    assert "skipped entries of DICOMDIR: 5 outside the folder" in notes


def test_a_dicomdir_in_a_subfolder_is_not_followed(media: Path) -> None:
    files, notes = list_images(str(media.parent))
    assert "cd/DICOM/SR1" in files[PATH].to_pylist()
    assert not any("DICOMDIR" in note for note in notes)


def test_damaged_dicomdirs_are_errors_of_the_user(tmp_path: Path) -> None:
    whole, rng = dicomdir(RECORDS), random.Random(0)
    saved(tmp_path / "ROOT", b"?")
    errors = 0
    for number in range(200):
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(128, len(changed))] = rng.randrange(256)
        saved(tmp_path / "DICOMDIR", bytes(changed[: rng.randrange(len(whole))] if number % 3 else changed))
        try:
            list_images(str(tmp_path))
        except UserError:
            errors += 1
    assert errors > 60
    saved(tmp_path / "DICOMDIR", dicomdir([("PATIENT", None, 0xFFFF)]))
    with pytest.raises(UserError, match="expected references to images, got none"):
        list_images(str(tmp_path))
