"""CheXpert as Stanford publishes it (Irvin et al., AAAI 2019), in full size or as CheXpert-v1.0-small.

    train.csv, valid.csv    Path, Sex, Age, Frontal/Lateral, AP/PA, and 14 observations (see `sources.labeler`)
    test.csv                the same or, as test_labels.csv of CheXlocalize (Saporta et al. 2022), without the columns
                            between Path and the observations
    train/patient00001/study1/view1_frontal.jpg, valid/…, test/…

The archive's root is the folder that contains the lists. Images are joined to their rows by the last three parts of
their paths, because names such as view1_frontal.jpg repeat; these parts without suffix are their ids. Observations
are those of the exam, so that a frontal and a lateral image of an exam have the same labels.

Splits: train is for training, and valid (200 patients, read by three radiologists) for validation if the test images
(500 patients, read by five) are there. Without them, as in most copies, valid is the test split, as in most papers,
and a hash of the patients of train decides which are for validation; a note says so.

Quirks: labels of train come from reports by a program, those of valid and test from radiologists, who left nothing
blank or uncertain. A frontal image whose AP/PA is LL, RL or blank has the view FRONTAL. Ages are 90 at most, and an
age of 0 is unknown. Sex is "Unknown" in one row.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import labeler
from cxr.sources.arrow_csv import has_columns, invalid_value, read_columns
from cxr.sources.image_files import PATH, image_ids, list_images
from cxr.sources.image_table import (
    SEXES,
    ages,
    blank_as_null,
    json_objects,
    listing_notes,
    match,
    merged_rows,
    numbers,
    taken,
    translated,
)
from cxr.sources.label_rows import contradictions_note
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import official_splits

name = "chexpert"

LISTS = {"train": ("train.csv",), "valid": ("valid.csv", "val_labels.csv"), "test": ("test.csv", "test_labels.csv")}
PATH_COLUMN, SEX, AGE, FRONTAL, VIEW = "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"
NEEDED = (PATH_COLUMN, labeler.NO_FINDING, "Enlarged Cardiomediastinum")  # to recognize the lists

_KEY, _PART = "key", "part"
_PARTS = r"(?:^|/)(?:(?P<part>[^/]+)/)?(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<image>[^/.]+)(?:\.[^/]*)?$"
_SPLIT_OF_FOLDER = {"train": "train", "valid": "val", "val": "val", "test": "test"}


def detect(uri: str) -> bool:
    return any(has_columns(location, NEEDED) for location in _locations(uri))


def manifest(uri: str) -> Manifest:
    """List every image file once, joined to the lists by its path.

    Listed images without a file are skipped; images that are not listed have unknown labels; notes count both.

    Raises:
        UserError: there is no list, a list is damaged, or there are no images.
    """
    locations = _locations(uri)
    if not locations:
        expected = " or ".join(file for files in LISTS.values() for file in files)
        raise UserError(f"expected {expected} in {uri}, got none of them: add one, or use --source folder")
    rows, contradictory = merged_rows(pa.concat_tables(_read(location) for location in locations), _KEY)
    lists = " and ".join(map(storage.name, locations))
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    parts = pc.extract_regex(paths, _PARTS)
    keys = pc.coalesce(_key(parts), paths)
    row = match(keys, rows, _KEY)
    columns = taken(rows, row)
    labels = labeler.labels(columns)
    ids, id_notes = image_ids(paths, keys)
    patients = pc.coalesce(pc.struct_field(parts, "patient"), keys)
    official = translated(
        pc.coalesce(blank_as_null(columns[_PART]), pc.struct_field(parts, "part")), _SPLIT_OF_FOLDER
    )
    if not pc.any(pc.equal(official, "test")).as_py() and pc.any(pc.equal(official, "val")).as_py():
        official = pc.if_else(pc.equal(official, "val"), "test", official)
        notes.append("no test images, so the images in valid are the test split; validation is a part of train")
    studies = pc.binary_join_element_wise(patients, pc.struct_field(parts, "study"), "/")
    table = manifest_table(
        {
            schema.IMAGE_ID: ids,
            schema.PATIENT_ID: patients,
            schema.STUDY_ID: studies,
            schema.SPLIT: official_splits(patients, official),
            schema.SOURCE_URI: files[schema.SOURCE_URI],
            schema.SEX: translated(columns[SEX], SEXES),
            schema.AGE_YEARS: ages(numbers(pc.if_else(pc.equal(columns[AGE], "0"), "", columns[AGE]))),
            schema.VIEW: _views(columns[FRONTAL], columns[VIEW], pc.struct_field(parts, "image")),
            schema.LABELS: labels_column(labels.values),
            schema.EXTRA: json_objects({labeler.UNCERTAIN: labels.uncertain}),
        }
    )
    notes += [*listing_notes(lists, rows.num_rows, row), *id_notes, *contradictions_note(contradictory, lists)]
    return Manifest(table, labeler.FINDINGS, [*notes, *labels.notes(lists)])


def _locations(uri: str) -> list[str]:
    """The lists that exist: the first of each part of `LISTS`."""
    candidates = ([storage.join(uri, file) for file in files] for files in LISTS.values())
    return [location for of_part in candidates for location in list(filter(storage.exists, of_part))[:1]]


def _read(location: str) -> pa.Table:
    """A list with its images' keys; observations as in `labeler.checked`."""
    optional = (SEX, AGE, FRONTAL, VIEW, *(each for each in labeler.COLUMNS if each not in NEEDED))
    table = labeler.checked(read_columns(location, NEEDED, optional), location)
    parts = pc.extract_regex(pc.replace_substring(table[PATH_COLUMN].combine_chunks(), "\\", "/"), _PARTS)
    keys = _key(parts)
    if keys.null_count:
        row = keys.is_null().index(True).as_py()
        expected = f"a {PATH_COLUMN} such as train/patient00001/study1/view1_frontal.jpg"
        raise invalid_value(location, row, expected, table[PATH_COLUMN][row].as_py())
    table = table.drop_columns(PATH_COLUMN)
    return table.append_column(_KEY, keys).append_column(_PART, pc.struct_field(parts, "part"))


def _key(parts: pa.StructArray) -> pa.Array:
    return pc.binary_join_element_wise(*(pc.struct_field(parts, each) for each in ("patient", "study", "image")), "/")


def _views(frontal: pa.Array, view: pa.Array, image: pa.Array) -> pa.Array:
    """The view from the columns or, where these are missing, the name of the image, such as view1_frontal."""
    in_name = pc.struct_field(pc.extract_regex(image, r"_(?P<kind>frontal|lateral)$"), "kind")
    kind = pc.coalesce(translated(frontal, {"frontal": "frontal", "lateral": "lateral"}), in_name)
    of_frontal = pc.fill_null(translated(view, {"ap": "AP", "pa": "PA"}), "FRONTAL")
    return pc.if_else(pc.equal(kind, "frontal"), of_frontal, pc.if_else(pc.equal(kind, "lateral"), "LATERAL", None))
