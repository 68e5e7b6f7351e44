"""MIMIC-CXR-JPG 2.0.0 and 2.1.0 as published on PhysioNet (Johnson et al. 2019): 377,110 JPEG files.

    files/p10/p10000032/s50414267/02aa804e-….jpg    subject, study and DICOM id
    mimic-cxr-2.0.0-split.csv.gz                    dicom_id, study_id, subject_id, split (train, validate, test)
    mimic-cxr-2.0.0-metadata.csv.gz                 dicom_id, subject_id, study_id, ViewPosition, …
    mimic-cxr-2.0.0-chexpert.csv.gz                 subject_id, study_id, and 14 observations (see `sources.labeler`)
    mimic-cxr-2.0.0-negbio.csv.gz                   the same from another program; used if the former is missing

The archive's root is the folder that contains the lists, with or without .gz. Each but the list of observations may
be missing: subject and study then come from the path, and the split from a hash of the subject. Images are joined to
the lists by their names, the DICOM ids; observations are those of the study, so that all its images have the same.

Quirks: eight studies have no observations. The view is ViewPosition or, where this is blank, the meaning of
ViewCodeSequence; decubitus images ("AP LLD") have the view LLD or RLD. The archive contains neither sex nor age,
which MIMIC-IV has. Version 2.1.0 adds mimic-cxr-2.1.0-test-set-labeled.csv, radiologists' labels for a part of the
test set, which are not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import labeler
from cxr.sources.arrow_csv import has_columns, locate, read_columns
from cxr.sources.image_files import PATH, image_ids, image_keys, list_images
from cxr.sources.image_table import (
    blank_as_null,
    json_objects,
    listing_notes,
    match,
    merged_rows,
    taken,
    translated,
)
from cxr.sources.label_rows import contradictions_note
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import official_splits
from cxr.wording import counted

name = "mimic-cxr-jpg"

SPLIT_FILE, METADATA_FILE = "mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv"
LABELS_FILES = ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-negbio.csv")  # the first that exists is used
IMAGE, STUDY, SUBJECT, SPLIT = "dicom_id", "study_id", "subject_id", "split"
VIEW, VIEW_MEANING = "ViewPosition", "ViewCodeSequence_CodeMeaning"
PROCEDURE = "PerformedProcedureStepDescription"  # also the key in `extra`

_SPLITS = {"train": "train", "validate": "val", "test": "test"}
_VIEWS = {  # of ViewPosition and of ViewCodeSequence
    **dict.fromkeys(("pa", "postero-anterior"), "PA"),
    **dict.fromkeys(("ap", "ap axial", "antero-posterior"), "AP"),
    **dict.fromkeys(("lateral", "xtable lateral", "swimmers"), "LATERAL"),
    **dict.fromkeys(("ll", "left lateral"), "LL"),
    **dict.fromkeys(("rl", "right lateral"), "RL"),
    **dict.fromkeys(("lld", "ap lld", "pa lld"), "LLD"),
    **dict.fromkeys(("rld", "ap rld", "pa rld"), "RLD"),
    **dict.fromkeys(("lao", "left anterior oblique"), "LAO"),
    **dict.fromkeys(("rao", "right anterior oblique"), "RAO"),
    **dict.fromkeys(("lpo", "left posterior oblique"), "LPO"),
    **dict.fromkeys(("rpo", "right posterior oblique"), "RPO"),
}


def detect(uri: str) -> bool:
    location = _labels_location(uri)
    return location is not None and has_columns(location, (SUBJECT, STUDY, labeler.NO_FINDING))


def manifest(uri: str) -> Manifest:
    """List every image file once, joined to the lists; notes count missing and unlisted images.

    Raises:
        UserError: there is no list of observations, a list is damaged, or there are no images.
    """
    location = _labels_location(uri)
    if location is None:
        expected = " or ".join(f"{file}.gz" for file in LABELS_FILES)
        raise UserError(f"expected {expected} in {uri}, got neither: add one, or use --source folder")
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    keys = image_keys(paths)
    split, split_notes = _of_images(uri, SPLIT_FILE, keys, (STUDY, SUBJECT, SPLIT), (), "official splits are unknown")
    about = (VIEW, VIEW_MEANING, PROCEDURE)
    metadata, metadata_notes = _of_images(uri, METADATA_FILE, keys, (STUDY, SUBJECT), about, "views are unknown")
    in_path = pc.extract_regex(paths, r"(?:^|/)p(?P<subject>\d+)/s(?P<study>\d+)/[^/]+$")
    lists = (metadata, split)
    studies = pc.coalesce(*(blank_as_null(each[STUDY]) for each in lists), pc.struct_field(in_path, "study"))
    subjects = pc.coalesce(
        *(blank_as_null(each[SUBJECT]) for each in lists), pc.struct_field(in_path, "subject"), keys
    )

    observations = labeler.checked(read_columns(location, (STUDY, labeler.NO_FINDING), labeler.FINDINGS), location)
    observations, contradictory = merged_rows(observations, STUDY)
    study_row = match(studies, observations, STUDY)
    labels = labeler.labels(taken(observations, study_row))
    ids, id_notes = image_ids(paths, keys)
    views = [translated(metadata[column], _VIEWS) for column in (VIEW, VIEW_MEANING)]
    table = manifest_table(
        {
            schema.IMAGE_ID: ids,
            schema.PATIENT_ID: subjects,
            schema.STUDY_ID: studies,
            schema.SPLIT: official_splits(subjects, translated(split[SPLIT], _SPLITS)),
            schema.SOURCE_URI: files[schema.SOURCE_URI],
            schema.VIEW: pc.coalesce(*views),
            schema.LABELS: labels_column(labels.values),
            schema.EXTRA: json_objects({PROCEDURE: metadata[PROCEDURE], labeler.UNCERTAIN: labels.uncertain}),
        }
    )
    file = storage.name(location)
    notes += [*split_notes, *metadata_notes, *id_notes]
    if study_row.null_count:
        notes.append(
            f"without observations in {file}, so labels are unknown: {counted(study_row.null_count, 'image')}"
        )
    notes += [*contradictions_note(contradictory, file), *labels.notes(file)]
    return Manifest(table, labeler.FINDINGS, notes)


def _labels_location(uri: str) -> str | None:
    return next(filter(None, (locate(uri, file) for file in LABELS_FILES)), None)


def _of_images(
    uri: str, file: str, keys: pa.Array, columns: Sequence[str], optional: Sequence[str], consequence: str
) -> tuple[dict[str, pa.Array], list[str]]:
    """Columns of a list of images at `keys`, blank where the image or the whole list is missing; and notes."""
    location = locate(uri, file)
    if location is None:
        blank = pa.repeat(pa.scalar("", pa.string()), len(keys))
        return dict.fromkeys((*columns, *optional), blank), [f"missing from the archive: {file}"]
    rows, contradictory = merged_rows(read_columns(location, (IMAGE, *columns), optional), IMAGE)
    row = match(keys, rows, IMAGE)
    return taken(rows, row), [
        *listing_notes(storage.name(location), rows.num_rows, row, consequence),
        *contradictions_note(contradictory, storage.name(location)),
    ]
