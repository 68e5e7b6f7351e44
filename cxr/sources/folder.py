"""Any tree of DICOM, PNG or JPEG files, without further information.

A file's path is its image's id. If it is at least two folders deep, as in `patient/exam/image`, the first folder is
the patient; otherwise each image counts as a patient of its own, because a single level of folders is often a label.
The split is a hash of the patient.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.sources.image_files import PATH, list_images
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient
from cxr.wording import counted

name = "folder"


def detect(uri: str) -> bool:
    """Accepts any archive, so it is tried last."""
    return True


def manifest(uri: str) -> Manifest:
    """List every file that may be an image; without labels.

    Raises:
        UserError: there are no images.
    """
    files, notes = list_images(uri)
    patients = pc.struct_field(pc.extract_regex(files[PATH], r"^(?P<first>[^/]+)/[^/]+/"), "first")
    notes.append(_patient_note(files.num_rows, patients))
    patient_ids = pc.coalesce(patients, files[PATH])
    columns = {
        schema.IMAGE_ID: files[PATH],
        schema.PATIENT_ID: patient_ids,
        schema.SPLIT: split_by_patient(patient_ids),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.empty((files.num_rows, 0), np.int8)),
    }
    return Manifest(manifest_table(columns), (), notes)


def _patient_note(images: int, patients: pa.ChunkedArray) -> str:
    """What counts as a patient: splits are only as disjoint as this is correct."""
    deep = len(patients) - patients.null_count
    alone = images - deep
    single = f"images that count as one patient each: {alone:,}; images of a person may be in several splits"
    if not deep:
        return f"the folders do not identify patients; {single}"
    count = pc.count_distinct(patients, mode="only_valid").as_py()
    by_folder = f"the first folder counts as the patient: {counted(deep, 'image')}, {counted(count, 'patient')}"
    return by_folder if deep == images else f"{by_folder}; {single}"
