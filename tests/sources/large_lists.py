"""Manifests of large synthetic lists, without images: CPU seconds and peak memory.

    python -m tests.sources.large_lists SOURCE ROWS [FOLDER]

prints {"rows": …, "seconds": …, "peak_gib": …} for one of `MAKERS`; the listing of the files is simulated. With a
folder, the plan of an ingest is stored there, and what that took is added.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.sources import header_scan, open_manifest
from cxr.sources.header_scan import HEADERS
from cxr.sources.options import ReadOptions
from cxr.sources.pseudonyms import Pseudonyms
from cxr.storage import FileEntry

_WORDS = ("No Finding", "Effusion", "Effusion|Mass", "Cardiomegaly|Effusion|Emphysema", "Pneumothorax")


def _write(path: Path, header: str, lines: Iterator[str]) -> None:
    with path.open("w") as file:
        file.write(header + "\n")
        file.writelines(line + "\n" for line in lines)


def _chestxray14(root: Path, rows: int) -> str:
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )
    lines = (
        f"{row // 4:08d}_{row % 4:03d}.png,{_WORDS[row % 5]},{row % 4},{row // 4},{20 + row % 70},{'MF'[row % 2]},"
        f"{('PA', 'AP')[row % 3 == 0]},2682,{2500 + row % 500},0.143,0.143,"
        for row in range(rows)
    )
    _write(root / "Data_Entry_2017_v2020.csv", header, lines)
    return "images/{0:08d}_{1:03d}.png"


def _siim(root: Path, rows: int) -> str:
    lines = (f"1.2.276.{row // 4}.{row % 4},{'-1' if row % 5 else '407576 2 1021 7 1015 10'}" for row in range(rows))
    _write(root / "train-rle.csv", "ImageId,EncodedPixels", lines)
    return "dicom/1.2.276.{0}.{1}.dcm"


def _vinbigdata(root: Path, rows: int) -> str:
    """Three readers of each image; one in three images has a box of each of them."""

    def lines() -> Iterator[str]:
        for row in range(rows):
            for reader in range(3):
                box = f"3,{1000 + reader}.0,{900 + row % 50}.0,{1800 + reader}.0,1500.0"
                name, rest = ("Cardiomegaly", box) if row % 3 == 0 else ("No finding", "14,,,,")
                yield f"{row // 4:032x}{row % 4},{name},{rest.partition(',')[0]},R{reader},{rest.partition(',')[2]}"

    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
    _write(root / "train.csv", header, lines())
    return "train/{0:032x}{1}.dicom"


def _csv_list(root: Path, rows: int) -> str:
    lines = (f"s3://hospital/{row // 4:08d}/{row % 4}.dcm,{row // 4:08d},PA" for row in range(rows))
    _write(root / "images.csv", "uri,patient_id,view", lines)
    return ""


def _parquet_list(root: Path, rows: int) -> str:
    patients = [f"{row // 4:08d}" for row in range(rows)]
    uris = [f"s3://hospital/{patient}/{row % 4}.dcm" for row, patient in enumerate(patients)]
    pq.write_table(pa.table({"uri": uris, "patient_id": patients}), root / "images.parquet")
    return ""


def _plain(root: Path, rows: int) -> str:
    return "{0:08d}/exam/{1}.png"


MAKERS: dict[str, Callable[[Path, int], str]] = {
    "folder": _plain,
    "chestxray14": _chestxray14,
    "siim": _siim,
    "vinbigdata": _vinbigdata,
    "csv_list": _csv_list,
    "parquet_list": _parquet_list,
    "dicom": _plain,
}
"""Write the lists of a source for so many images; they return the form of the images' paths, given row // 4, row % 4.
Names are those of sources, or say which kind of list."""

_LISTS = {"csv_list": "images.csv", "parquet_list": "images.parquet"}


def _headers(files: pa.Table, pseudonyms: Pseudonyms) -> pa.Table:
    """Headers as `header_scan.read_headers` returns them, without reading files."""
    paths = files[header_scan.PATH].to_pylist()
    patients = [path.partition("/")[0] for path in paths]
    columns: dict[str, Any] = {
        header_scan.KIND: [header_scan.DICOM] * len(paths),
        header_scan.SOP_CLASS: ["1.2.840.10008.5.1.4.1.1.1.1"] * len(paths),
        header_scan.SOP_INSTANCE: [f"1.2.3.{path}" for path in paths],
        "study_id": [f"1.2.4.{patient}" for patient in patients],
        "patient_id": patients,
        header_scan.PATIENT_BYTE: [sum(map(ord, patient)) % 256 for patient in patients],
        "modality": ["DX"] * len(paths),
        header_scan.MANUFACTURER: ["A maker"] * len(paths),
        header_scan.STUDY_DATE: ["20200101"] * len(paths),
    }
    columns |= {name: files[name].combine_chunks() for name in files.column_names if name in HEADERS.names}
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(paths), field.type)
        for field in HEADERS
    ]
    return pa.table(arrays, schema=HEADERS)


def _write_headers(scan: header_scan.Scan) -> None:
    for part in scan.parts:
        scan.write(part)


def measure(source: str, rows: int, plan_folder: str = "") -> dict[str, float]:
    """CPU seconds that `open_manifest` takes for a synthetic list, and this process's peak memory."""
    planned: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        form = MAKERS[source](Path(folder), rows)

        def entries(uri: str, *_: Any) -> Iterator[FileEntry]:
            for row in range(rows):
                path = form.format(row // 4, row % 4)
                yield FileEntry(f"{folder}/{path}", path, 1000)

        reading = ReadOptions(source="list" if source in _LISTS else source, headers=f"{folder}/.headers")
        patches = [
            mock.patch("cxr.sources.image_files.list_files", entries),
            mock.patch.object(header_scan, "read_headers", _headers),
            mock.patch.object(header_scan.Scan, "run_here", _write_headers),
        ]
        for patch in patches:
            patch.start()
        start, began = time.process_time(), time.monotonic()
        manifest = open_manifest(f"{folder}/{_LISTS.get(source, '')}".rstrip("/"), reading)
        seconds, peak = time.process_time() - start, _gib("VmHWM")
        for patch in patches:
            patch.stop()
        assert manifest.table.num_rows == rows
        if plan_folder:
            from cxr.data import ledger
            from cxr.data.ingest import rows_per_part  # imports Ray, which takes memory
            from cxr.data.ingest_plan import write_plan
            from cxr.schema import PixelFormat

            parts = ledger.plan(manifest.table, rows_per_part(rows, PixelFormat()), by=schema.SPLIT)
            write_plan(plan_folder, {}, parts, manifest.findings, manifest.notes, ())
            stored = sum(entry.size for entry in storage.list_files(plan_folder)) / (1 << 30)
            planned = {"wall_s": round(time.monotonic() - began, 1), "plan_gib": round(stored, 2)}
            planned["peak_with_plan_gib"] = _gib("VmHWM")
            del manifest, parts
            pa.default_memory_pool().release_unused()
            planned["gib_once_planned"] = _gib("VmRSS")
    return {"rows": rows, "seconds": round(seconds, 1), "peak_gib": peak} | planned


def _gib(what: str) -> float:
    """Memory of this process: VmHWM, the peak, or VmRSS, at the moment."""
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent before this program began
    return round(int(status.partition(f"{what}:")[2].split()[0]) / (1 << 20), 2)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])))
