"""Any tree of DICOM, PNG or JPEG files, about which nothing is known but where they lie.

A file's path is its image's id. Where it lies at least two folders deep, as in `patient/study/image`, the
first folder is its patient; else each image counts as a patient of its own, since a single level of folders
is as often a label. The split follows from the patient by a hash.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.sources.image_files import PATH, list_images
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient

name = "folder"


def detect(uri: str) -> bool:
    """Any archive will do: asked last."""
    return True


def manifest(uri: str) -> Manifest:
    """Every file that may be an image; no labels.

    Raises:
        UserError: there is none.
    """
    files, notes = list_images(uri)
    patients = pc.struct_field(pc.extract_regex(files[PATH], r"^(?P<first>[^/]+)/[^/]+/"), "first")
    notes.append(_said(files.num_rows, patients))
    patient_ids = pc.coalesce(patients, files[PATH])
    columns = {
        schema.IMAGE_ID: files[PATH],
        schema.PATIENT_ID: patient_ids,
        schema.SPLIT: split_by_patient(patient_ids),
        schema.SOURCE_URI: files[schema.SOURCE_URI],
        schema.LABELS: labels_column(np.empty((files.num_rows, 0), np.int8)),
    }
    return Manifest(manifest_table(columns), (), notes)


def _said(images: int, patients: pa.ChunkedArray) -> str:
    """What counts as a patient here, since splits are only as disjoint as that is true."""
    deep = len(patients) - patients.null_count
    alone = f"{images - deep:,} images count as a patient each: one person's may lie in several splits"
    if not deep:
        return f"the folders tell no patient; {alone}"
    count = pc.count_distinct(patients, mode="only_valid").as_py()
    found = f"the first of several folders counts as the patient: {deep:,} images, {count:,} patients"
    return found if deep == images else f"{found}; {alone}"
