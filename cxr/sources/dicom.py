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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.imaging.dicom_signature import begins_like_data_set, has_preamble
from cxr.sources import header_scan
from cxr.sources.header_scan import Scan, plan_scan
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION, PATH, list_images, sample_images
from cxr.sources.image_table import json_objects
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.options import ALL_IMAGES, ReadOptions
from cxr.sources.pseudonyms import open_pseudonyms, patient_byte
from cxr.sources.splits import hash_values, split_by_patient
from cxr.wording import counted

name = "dicom"

_EXAMINED, _EXAMINED_BYTES = 8, 4096  # files whose first bytes decide whether an archive is one of DICOM files
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
    """Whether most of a few files that may be images are DICOM files, by their content."""
    files = sample_images(uri, _EXAMINED)
    return sum(_is_dicom(file.uri) for file in files) > len(files) / 2


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
            raise UserError(f"expected X-rays in {uri}, got none ({'; '.join(notes)}): use the folder of the X-rays")
        headers, image_ids, unique_notes = _unique(headers, scan.folder)
    patients, hashes, patient_notes = _patients(headers)
    columns = {field.name: headers[field.name] for field in schema.MANIFEST if field.name in headers.column_names}
    columns |= {
        schema.IMAGE_ID: image_ids,
        schema.PATIENT_ID: patients,
        schema.SPLIT: split_by_patient(patients, hashes=hashes),
        schema.LABELS: labels_column(np.empty((headers.num_rows, 0), np.int8)),
        schema.EXTRA: json_objects({name: headers[name] for name in _EXTRA}),
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
    classes, modalities = (
        headers[each].combine_chunks().dictionary_encode() for each in (header_scan.SOP_CLASS, schema.MODALITY)
    )
    names = ["" if name in _XRAYS else _standard_name(name) for name in classes.dictionary.to_pylist()]
    others = [f"modality {name}" if name in _OTHER_MODALITIES else "" for name in modalities.dictionary.to_pylist()]
    by_class = pc.fill_null(pa.array(names, pa.string()).take(classes.indices), "")
    by_modality = pc.fill_null(pa.array(others, pa.string()).take(modalities.indices), "")
    reasons = pc.if_else(pc.equal(by_class, ""), by_modality, by_class)
    counts = _counted(reasons)
    kept = counts.pop("", 0)
    if not counts:
        return headers, []
    listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    note = f"left out {counted(len(reasons) - kept, 'DICOM file')} that are not X-ray images: {listed}"
    return headers.filter(pc.equal(reasons, "")), [note]


def _counted(values: pa.Array | pa.ChunkedArray) -> Counter[str]:
    """How often each value occurs."""
    return Counter({each["values"]: each["counts"] for each in values.value_counts().to_pylist()})


def _standard_name(sop_class: str) -> str:
    """The name of a SOP class of the standard (PS3.6); "" for a private one, which may be an X-ray."""
    from pydicom.uid import UID  # pydicom takes half a second to import

    text = UID(sop_class).name
    return "" if text == sop_class else text


def _kind_notes(headers: pa.Table) -> list[str]:
    counts = _counted(headers[header_scan.KIND])
    notes = []
    if not_dicom := counts[header_scan.OTHER]:
        notes.append(f"files that are not DICOM: {not_dicom:,}; each counts as the only image of a patient")
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
    instances, paths = (headers[name].combine_chunks() for name in (header_scan.SOP_INSTANCE, PATH))
    counts = instances.value_counts()
    shared = counts.field("values").filter(pc.greater(counts.field("counts"), 1)).drop_null()
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row in np.flatnonzero(pc.is_in(instances, value_set=shared).to_numpy(zero_copy_only=False)).tolist():
        rows_of[instances[row].as_py()].append(row)
    digests = dict(_digests(headers, [row for rows in rows_of.values() for row in rows], folder))
    is_copy, by_path = np.zeros((2, len(paths)), bool)
    for rows in rows_of.values():
        first = {digests[row]: row for row in reversed(rows)}  # content -> the first row with it
        is_copy[rows], is_copy[[*first.values()]] = True, False
        by_path[[*first.values()]] = len(first) > 1
    ids = pc.if_else(pc.or_(pa.array(by_path), instances.is_null()), paths, instances)
    notes = []
    if copies := int(is_copy.sum()):
        notes.append(f"copies of the same DICOM file: {copies:,}; one of each is used")
    if differing := int(by_path.sum()):
        notes.append(
            f"files that share a SOPInstanceUID but differ: {differing:,}; each is used, with its path as its id"
        )
    is_dicom = pc.equal(headers[header_scan.KIND], header_scan.DICOM)
    if without := pc.sum(pc.and_(is_dicom, instances.is_null())).as_py():
        notes.append(f"DICOM files without SOPInstanceUID: {without:,}; their paths are their ids")
    if not copies:
        return headers, ids, notes
    used = pa.array(~is_copy)
    return headers.filter(used), ids.filter(used), notes


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
    columns = (schema.PATIENT_ID, schema.STUDY_ID, PATH, header_scan.PATIENT_BYTE)
    ids, studies, paths, stored = (headers[name].combine_chunks() for name in columns)
    placeholder = _placeholder(headers)
    known = ids.is_valid() if placeholder is None else pc.fill_null(pc.not_equal(ids, placeholder), False)
    stand_ins = pc.if_else(pc.fill_null(pc.equal(studies, ""), True), paths, studies)
    patients = pc.if_else(known, ids, stand_ins)
    known_N = known.to_numpy(zero_copy_only=False)
    bytes_N = pc.fill_null(stored, 0).to_numpy().astype(np.int64)
    own = stand_ins.filter(pc.invert(known))
    bytes_N[~known_N] = [patient_byte(text.encode()) for text in own.to_pylist()]
    tie_breaks = hash_values(patients) / 2**20  # so that few patients do not all have the same hash
    identified = counted(pc.count_distinct(patients).as_py(), "patient")
    in_dicom = pc.equal(headers[header_scan.KIND], header_scan.DICOM).to_numpy()
    notes = [f"patients by PatientID: {identified}"]
    if alone := int((in_dicom & ~known_N).sum()):
        reason = "PatientID is missing or the same in most studies" if placeholder else "PatientID is missing"
        notes = [
            f"{reason}: {counted(alone, 'image')}, whose studies count as one patient each ({identified} in all)"
        ]
    return patients, bytes_N / 256 + tie_breaks, notes


def _placeholder(headers: pa.Table) -> str | None:
    """The PatientID that too many studies share for it to be a person's."""
    named = headers.select([schema.PATIENT_ID, schema.STUDY_ID])
    for name in named.column_names:
        named = named.filter(pc.fill_null(pc.not_equal(named[name], ""), False))
    pairs = named.group_by(named.column_names, use_threads=False).aggregate([])
    if pairs.num_rows < _PLACEHOLDER_STUDIES:
        return None
    ((patient, count),) = _counted(pairs[schema.PATIENT_ID]).most_common(1)
    return patient if count > _PLACEHOLDER_SHARE * pairs.num_rows else None
