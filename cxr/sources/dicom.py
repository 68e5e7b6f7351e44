"""DICOM files in any folders, as a hospital's archive exports them, identified by their headers.

An image's id is its SOPInstanceUID, by which the hospital's archive knows it; patients are pseudonyms of PatientID,
and all images of a patient are in the same split. Where PatientID is missing, or where more than half of the studies
share a placeholder such as "ANON", each study counts as a patient.

Objects that are not X-ray images (reports, presentation states, segmentations, CT …) are left out by their SOP class
and counted. Files that are not DICOM, and DICOM files whose header cannot be read, count as images of their own, with
their path as the id: decoding reports what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.imaging.dicom_signature import begins_like_data_set, has_preamble
from cxr.sources import header_scan
from cxr.sources.header_scan import Scan, plan_scan
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION, PATH, first_images, list_images
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.options import ALL_IMAGES, ReadOptions
from cxr.sources.pseudonyms import open_pseudonyms, patient_byte
from cxr.sources.splits import hash_values, split_by_patient
from cxr.wording import counted

name = "dicom"

_EXAMINED, _EXAMINED_BYTES = 8, 4096  # files whose first bytes decide whether an archive consists of DICOM files
_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1."
_XRAYS = {
    _IMAGE_STORAGE + ending
    for ending in (
        *("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1"),  # computed and digital radiography, mammography, oral
        *("7", "7.1", "7.2", "7.3", "7.4"),  # secondary capture, such as digitized films
        *("12.1", "12.1.1", "12.2", "12.2.1"),  # angiography and fluoroscopy
    )
}
_OTHER_MODALITIES = {"BMD", "BI", "CT", "ES", "GM", "MR", "NM", "OCT", "OP", "PT", "SM", "TG", "US", "XC"}
_PLACEHOLDER_SHARE, _PLACEHOLDER_STUDIES = 0.5, 10  # a PatientID of more than this share of at least so many studies
_UNREADABLE = "unreadable"  # beginning of what stands for the digest of a file that storage did not give
_DIGEST_THREADS = 8
_EXTRA = (
    header_scan.SOP_CLASS,
    header_scan.LATERALITY,
    header_scan.MANUFACTURER,
    header_scan.MODEL,
    header_scan.PHOTOMETRIC,
    header_scan.TRANSFER_SYNTAX,
)


def detect(uri: str) -> bool:
    """Whether the first few files that may be images are all DICOM files, by their content."""
    files = first_images(uri, _EXAMINED)
    return bool(files) and all(_is_dicom(file.uri) for file in files)


def manifest(uri: str, reading: ReadOptions = ALL_IMAGES) -> Manifest:
    """List every X-ray image, without labels. Reads the headers that have not been read before.

    Raises:
        UserError: there are no images.
    """
    with planned(uri, reading) as (scan, notes):
        scan.run_here()
        headers = scan.table()
        headers = headers.append_column(schema.SOURCE_URI, scan.files[schema.SOURCE_URI])
        headers, left_out = _without_other_objects(headers)
        notes += left_out
        if not headers.num_rows:
            raise UserError(f"expected X-rays in {uri}, got none ({'; '.join(notes)}): give the folder of the X-rays")
        headers, image_ids, unique_notes = _unique(headers, scan.folder)
    patients, hashes, patient_notes = _patients(headers)
    columns = {field.name: headers[field.name] for field in schema.MANIFEST if field.name in headers.column_names}
    columns |= {
        schema.IMAGE_ID: image_ids,
        schema.PATIENT_ID: patients,
        schema.SPLIT: split_by_patient(patients, hashes=hashes),
        schema.LABELS: labels_column(np.empty((headers.num_rows, 0), np.int8)),
        schema.EXTRA: _extra(headers),
    }
    notes += [*_kind_notes(headers), *unique_notes, *patient_notes]
    return Manifest(manifest_table(columns), (), notes)


@contextmanager
def planned(uri: str, reading: ReadOptions) -> Iterator[tuple[Scan, list[str]]]:
    """The scan of an archive's headers, in `reading.headers` or in a temporary folder, and notes on the files."""
    files, notes = list_images(uri)
    with tempfile.TemporaryDirectory(prefix="cxr-headers-") as temporary:
        stored = storage.normalize(reading.headers) if reading.headers else ""
        pseudonyms = open_pseudonyms(reading.id_key, reading.keep_ids, stored)
        yield plan_scan(storage.normalize(uri), files, stored or temporary, pseudonyms), notes


def _is_dicom(uri: str) -> bool:
    try:
        head, _ = storage.read_start(uri, _EXAMINED_BYTES)
    except (storage.NotFoundError, storage.UnreadableError):
        return False
    return has_preamble(head) or begins_like_data_set(head)


def _without_other_objects(headers: pa.Table) -> tuple[pa.Table, list[str]]:
    """Leave out files that are known not to be X-ray images, and count them."""
    classes, modalities = (headers[each].to_pylist() for each in (header_scan.SOP_CLASS, schema.MODALITY))
    names = {sop_class: _standard_name(sop_class) for sop_class in set(classes) - _XRAYS - {None}}
    reasons = [
        names.get(sop_class) or (f"modality {modality}" if modality in _OTHER_MODALITIES else "")
        for sop_class, modality in zip(classes, modalities, strict=True)
    ]
    counts = Counter(filter(None, reasons))
    if not counts:
        return headers, []
    listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    note = f"left out {counted(counts.total(), 'DICOM file')} that are not X-ray images: {listed}"
    return headers.filter(pa.array([not reason for reason in reasons])), [note]


def _standard_name(sop_class: str) -> str:
    """The name of a SOP class of the standard (PS3.6); "" for a private one, which may be an X-ray."""
    from pydicom.uid import UID  # pydicom takes half a second to import

    text = UID(sop_class).name
    return "" if text == sop_class else text


def _kind_notes(headers: pa.Table) -> list[str]:
    counts = Counter(headers[header_scan.KIND].to_pylist())
    notes = []
    if not_dicom := counts[header_scan.OTHER]:
        notes.append(f"files that are not DICOM: {not_dicom:,}; each counts as an image of a patient of its own")
    if unreadable := counts[header_scan.UNREADABLE]:
        reasons = Counter(pc.drop_null(headers[schema.ERROR]).to_pylist()).most_common(3)
        listed = ", ".join(f"{count:,} x {reason}" for reason, count in reasons)
        notes.append(f"DICOM files whose header cannot be read: {unreadable:,} ({listed})")
    return notes


# ---- Ids


def _unique(headers: pa.Table, folder: str) -> tuple[pa.Table, pa.Array, list[str]]:
    """Keep one of several copies of a file; returns the rows, their image ids, and notes.

    Files that share a SOPInstanceUID but differ in content are all kept, with their paths as ids.
    """
    instances, paths = headers[header_scan.SOP_INSTANCE].to_pylist(), headers[PATH].to_pylist()
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, instance in enumerate(instances):
        if instance is not None:
            rows_of[instance].append(row)
    groups = [rows for rows in rows_of.values() if len(rows) > 1]
    digests = dict(_digests(headers, [row for rows in groups for row in rows], folder))
    copies: set[int] = set()
    by_path: set[int] = set()
    for rows in groups:
        first = {digests[row]: row for row in reversed(rows)}  # content -> the first row with it
        copies |= set(rows) - set(first.values())
        by_path |= set(first.values()) if len(first) > 1 else set()
    without = [row for row, instance in enumerate(instances) if instance is None]
    ids = [paths[row] if row in by_path or instance is None else instance for row, instance in enumerate(instances)]
    notes = []
    if copies:
        notes.append(f"copies of the same DICOM file: {len(copies):,}; one of each is used")
    if by_path:
        notes.append(
            f"files that share a SOPInstanceUID but differ: {len(by_path):,}; each is used, with its path as its id"
        )
    dicom = sum(headers[header_scan.KIND][row].as_py() == header_scan.DICOM for row in without)
    if dicom:
        notes.append(f"DICOM files without SOPInstanceUID: {dicom:,}; their paths are their ids")
    if not copies:
        return headers, pa.array(ids, pa.string()), notes
    rows_used = np.array([row for row in range(len(ids)) if row not in copies])
    return headers.take(pa.array(rows_used)), pa.array([ids[row] for row in rows_used], pa.string()), notes


def _digests(headers: pa.Table, rows: Sequence[int], folder: str) -> Iterable[tuple[int, str]]:
    """(row, hash of the file's content) for these rows; hashes are stored in `folder` and used again."""
    if not rows:
        return []
    files = headers.select([PATH, FILE_BYTES, FILE_VERSION, schema.SOURCE_URI]).take(pa.array(rows)).to_pylist()
    listing = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:32]
    stored = storage.join(folder, f"contents-{listing}.json")
    if storage.exists(stored):
        return zip(rows, storage.read_json(stored), strict=True)
    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        digests = list(pool.map(_digest, (file[schema.SOURCE_URI] for file in files)))
    if not any(digest.startswith(_UNREADABLE) for digest in digests):  # else they are read again the next time
        storage.write_json(stored, digests)
    return zip(rows, digests, strict=True)


def _digest(uri: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    except (storage.NotFoundError, storage.UnreadableError):
        return f"{_UNREADABLE} {uri}"


# ---- Patients


def _patients(headers: pa.Table) -> tuple[pa.Array, np.ndarray, list[str]]:
    """(N,) patients; (N,) their hashes in [0, 1), which decide their splits; and notes."""
    ids, studies = headers[schema.PATIENT_ID].to_pylist(), headers[schema.STUDY_ID].to_pylist()
    placeholder = _placeholder(ids, studies)
    known = np.array([patient is not None and patient != placeholder for patient in ids], bool)
    stand_ins = [study or path for study, path in zip(studies, headers[PATH].to_pylist(), strict=True)]
    patients = [patient if there else own for patient, there, own in zip(ids, known, stand_ins, strict=True)]
    stored = headers[header_scan.PATIENT_BYTE].to_pylist()
    values = [
        byte if there else patient_byte(own.encode())
        for byte, there, own in zip(stored, known, stand_ins, strict=True)
    ]
    tie_breaks = hash_values(patients) / 2**20  # so that few patients do not all have the same hash
    identified = counted(len(set(patients)), "patient")
    in_dicom = np.array([kind == header_scan.DICOM for kind in headers[header_scan.KIND].to_pylist()])
    notes = [f"patients by PatientID: {identified}"]
    if alone := int((in_dicom & ~known).sum()):
        reason = "PatientID is missing or the same in most studies" if placeholder else "PatientID is missing"
        notes = [
            f"{reason}: {counted(alone, 'image')}, whose studies count as one patient each ({identified} in all)"
        ]
    return pa.array(patients, pa.string()), np.array(values) / 256 + tie_breaks, notes


def _placeholder(ids: Sequence[str | None], studies: Sequence[str | None]) -> str | None:
    """The PatientID that too many studies share for it to be a person's."""
    pairs = {(patient, study) for patient, study in zip(ids, studies, strict=True) if patient and study}
    if len(pairs) < _PLACEHOLDER_STUDIES:
        return None
    ((patient, count),) = Counter(patient for patient, _ in pairs).most_common(1)
    return patient if count > _PLACEHOLDER_SHARE * len(pairs) else None


def _extra(headers: pa.Table) -> pa.Array:
    rows: list[dict[str, Any]] = headers.select(list(_EXTRA)).to_pylist()
    texts = [json.dumps({key: value for key, value in row.items() if value is not None}) for row in rows]
    return pa.array([None if text == "{}" else text for text in texts], pa.string())
