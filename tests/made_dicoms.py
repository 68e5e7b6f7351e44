"""Small DICOM X-rays in several transfer syntaxes, and scoring runs on them, for tests of exports."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydicom import Dataset, uid

from cxr import schema
from cxr.imaging.geometry import ResizeTransform
from tests import odd_files
from tests.written_runs import write_scored

SHA256 = "0123456789abcdef" * 4
SYNTAXES = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
    uid.JPEGBaseline8Bit,
)


def made_uid(*names: object) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'cxr test {names}').int}"


def xray(number: int, **tags: Any) -> Dataset:
    """A digital X-ray as a hospital has it: 12 bits, 96 rows, 80 columns. `tags` add, replace or (None) remove."""
    pixels = odd_files.radiograph(12, seed=number)
    ds = odd_files.dataset(pixels, BitsStored=12, HighBit=11)
    ds.SOPInstanceUID, ds.SeriesInstanceUID = made_uid("image", number), made_uid("series", number)
    ds.StudyInstanceUID = made_uid("study", number // 2)  # two images in each study
    ds.PatientName, ds.PatientID, ds.PatientSex = f"Doe^Jane{number // 2}", f"ID-{number // 2}", "F"
    ds.PatientBirthDate, ds.PatientAge = "19700102", "056Y"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20260301", "101500", "S1", f"ACC{number // 2}"
    ds.ReferringPhysicianName, ds.StudyDescription = "House^Gregory", "XR CHEST PA"
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber, ds.BodyPartExamined = "DX", 1, number % 2 + 1, "CHEST"
    ds.ViewPosition, ds.PatientOrientation = "PA", ["L", "F"]
    ds.WindowCenter, ds.WindowWidth = [2048, 1500], [4096, 2000]
    ds.PixelSpacing = [0.2, 0.2]
    for keyword, value in tags.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def xray_file(ds: Dataset, syntax: uid.UID = uid.ExplicitVRLittleEndian) -> bytes:
    """The file of `xray` in one of SYNTAXES."""
    ds = deepcopy(ds)
    pixels = np.frombuffer(ds.PixelData, np.uint16).reshape(ds.Rows, ds.Columns)
    if syntax == uid.JPEGLosslessSV1:
        return odd_files.dicom(ds, syntax, odd_files.lossless_jpeg(pixels, 12))
    if syntax == uid.JPEGBaseline8Bit:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.WindowCenter, ds.WindowWidth = 128, 256
        jpeg = BytesIO()
        odd_files.Image.fromarray((pixels >> 4).astype(np.uint8)).save(jpeg, "JPEG", quality=95)
        return odd_files.dicom(ds, syntax, jpeg.getvalue())
    return odd_files.dicom(ds, syntax)


def write_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    columns: pa.Schema,
    *,
    family: str,
    findings: Sequence[str] = (),
    archive: Path,
    **settings: Any,
) -> str:
    """Write OUT of `cxr score` with these rows; identity columns that a row lacks are null. Returns the folder."""
    fields = pa.schema([*schema.SCORES, *columns])
    filled = [
        {schema.SPLIT: "test", schema.RESIZE_TRANSFORM: ResizeTransform().as_dict(), schema.ERROR: None} | row
        for row in rows
    ]
    table = pa.table({f.name: pa.array([row.get(f.name) for row in filled], f.type) for f in fields}, schema=fields)
    metadata = {schema.FINDINGS_KEY: json.dumps(list(findings))}
    recorded = {"archive": str(archive), "checkpoint_sha256": SHA256, "recipe": {"family": family}, **settings}
    return write_scored(folder, recorded, table.replace_schema_metadata(metadata))


def scored(ds: Dataset, path: Path, **columns: Any) -> dict[str, Any]:
    """A row of scores of an image."""
    return {
        schema.IMAGE_ID: str(ds.SOPInstanceUID),
        schema.SOURCE_URI: str(path),
        schema.STUDY_ID: str(ds.get("StudyInstanceUID", "")) or None,
        schema.HEIGHT_PX: int(ds.Rows),
        schema.WIDTH_PX: int(ds.Columns),
        **columns,
    }
