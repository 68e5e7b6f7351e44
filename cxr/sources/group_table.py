"""Read a table that divides images into groups, such as by device or site: a row for each image or patient.

image,device,site          patient,site
a/1.png,DR 600,north       7,north
a/2.png,CR 85,south        8,south
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.csv_table import folded
from cxr.sources.image_match import match_images, normalized
from cxr.sources.label_rows import word_key
from cxr.sources.label_table import DETAIL_COLUMNS, IMAGE_COLUMNS
from cxr.sources.text_table import read_table


def group_columns(location: str) -> list[str]:
    """The names of a table's columns.

    Raises:
        UserError: it is not a table.
    """
    return read_table(storage.normalize(location)).column_names


def read_groups(location: str, columns: Sequence[str], images: pa.Table) -> dict[str, list[str | None]]:
    """The values of these columns of a table for each image; None where it is blank, missing, or contradictory.

    The table names images as tables of labels do (see `image_match`), or patients by their ids.

    Args:
        images: with the columns `image_id`, `source_uri` and `patient_id`.

    Raises:
        UserError: the table names neither images nor patients, or none of these images.
    """
    location = storage.normalize(location)
    table = read_table(location)
    by_key = {word_key(name): name for name in reversed(table.column_names)}
    image = next((by_key[key] for key in IMAGE_COLUMNS if key in by_key), None)
    patient = next((by_key[key] for key in DETAIL_COLUMNS[schema.PATIENT_ID] if key in by_key), None)
    if image is None and patient is None:
        raise UserError(
            f"{location}: expected a column that names images or patients, such as image or patient_id, got "
            f"{', '.join(table.column_names)}: rename it"
        )
    if image is not None:
        keys = normalized(table[image]).to_pylist()
        names = pa.chunked_array([pa.array(list(dict.fromkeys(keys)), pa.large_string())])
        rows = match_images(images, names).rows.tolist()
        key_of_image = [names[row].as_py() if row >= 0 else None for row in rows]
    else:
        keys = table[patient].to_pylist()
        key_of_image = images[schema.PATIENT_ID].to_pylist()
    if not set(keys) & set(key_of_image):
        raise UserError(
            f"{location}: expected rows about the images of the run, got none: use a table with their "
            f"{'names' if image is not None else 'patient ids'}"
        )
    by_name = {folded(name): name for name in table.column_names}
    return {
        column: list(map(_values(keys, table[by_name[folded(column)]].to_pylist()).get, key_of_image))
        for column in columns
    }


def _values(keys: Sequence[str], values: Sequence[str]) -> Mapping[str | None, str | None]:
    """The value of each key; None if its rows differ."""
    by_key: dict[str | None, str | None] = {}
    for key, value in zip(keys, values, strict=True):
        by_key[key] = (value or None) if by_key.get(key, value) == value else None
    return by_key
