"""Predicted boxes and masks as COCO JSON (https://cocodataset.org/#format-data), which labeling tools read.

    {"info": …, "images": [{"id": 1, "file_name": "a.png", "width": 2048, "height": 2500}, …],
     "categories": [{"id": 1, "name": "Fracture"}, …],
     "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9, …}, …]}

Each annotation also has the fields of COCO's result format, so that the list `annotations` can be evaluated as
results: `image_id`, `category_id`, `bbox` in pixels of the original image, `score`, and for masks `segmentation` with
compressed run lengths.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc

import cxr
from cxr import schema
from cxr.errors import UserError
from cxr.sources import rle
from cxr.storage.files import atomic_writer

FILE = "coco.json"
_COLUMNS = (schema.IMAGE_ID, schema.SOURCE_URI, schema.ERROR, schema.HEIGHT_PX, schema.WIDTH_PX)
_MASK_COLUMNS = (schema.PRED_MASK_RLE, schema.PRED_MASK_PROBABILITY)
_MASK_LABELS = {"lungs": schema.LUNGS, "pneumothorax": schema.PNEUMOTHORAX}  # by family


def columns_to_read(family: str, score_columns: Sequence[str]) -> list[str]:
    """The columns of scores that `write_coco` needs.

    Raises:
        UserError: the family predicts neither boxes nor masks.
    """
    located = [name for name in (schema.PRED_BOXES, *_MASK_COLUMNS) if name in score_columns]
    if not located:
        raise UserError(
            f"expected a run that predicts boxes or masks, got one of family {family}: COCO JSON cannot contain its "
            f"scores; export them as CSV"
        )
    return [*_COLUMNS, *located]


def write_coco(
    parts: Iterable[pa.Table], uri: str, family: str, archives: Sequence[str], min_score: float = 0.0
) -> dict[str, int]:
    """Write boxes and masks of the images that were scored without an error; returns counts.

    An image's `file_name` is its path below the archive that was scored or, for an image outside of it and in runs
    with pseudonyms, its id.

    Args:
        parts: tables with the columns of `columns_to_read` and the findings in their metadata.
        archives: URIs of the scored archives.
        min_score: boxes and masks with a lower score are left out.
    """
    counts = {"images": 0, "annotations": 0, "errors": 0}
    roots = [f"{archive.rstrip('/')}/" for archive in archives]
    categories: list[str] = []
    with atomic_writer(uri) as stream, tempfile.TemporaryFile() as annotations:
        info = {"description": f"predictions of a model of family {family}", "version": f"cxr {cxr.__version__}"}
        stream.write(b'{"info": ' + json.dumps(info).encode() + b',\n"images": [')
        for part in parts:
            categories = categories or _categories(part, family)
            good = part.filter(pc.is_null(part[schema.ERROR]))
            counts["errors"] += part.num_rows - good.num_rows
            for row in good.to_pylist():
                counts["images"] += 1
                image = {
                    "id": counts["images"],
                    "file_name": _file_name(row, roots),
                    "width": row[schema.WIDTH_PX],
                    "height": row[schema.HEIGHT_PX],
                }
                _append(stream, image, counts["images"])
                for found in _annotations(row, categories):
                    if found["score"] >= min_score:
                        counts["annotations"] += 1
                        numbered = {"id": counts["annotations"], "image_id": counts["images"], **found, "iscrowd": 0}
                        _append(cast(BinaryIO, annotations), numbered, counts["annotations"])
        listed = [{"id": number, "name": name} for number, name in enumerate(categories, 1)]
        stream.write(b'],\n"categories": ' + json.dumps(listed).encode() + b',\n"annotations": [')
        annotations.seek(0)
        shutil.copyfileobj(cast(io.BufferedIOBase, annotations), stream, 1 << 20)
        stream.write(b"]}\n")
    return counts


def _append(stream: BinaryIO, entry: dict[str, Any], number: int) -> None:
    stream.write((",\n" if number > 1 else "\n").encode() + json.dumps(entry, allow_nan=False).encode())


def _categories(part: pa.Table, family: str) -> list[str]:
    if schema.PRED_MASK_RLE in part.column_names:
        return [_MASK_LABELS[family]]
    return json.loads((part.schema.metadata or {}).get(schema.FINDINGS_KEY, b"[]"))


def _file_name(row: dict[str, Any], roots: Sequence[str]) -> str:
    uri = row[schema.SOURCE_URI] or ""
    paths = [uri.removeprefix(root) for root in roots if uri.startswith(root)]
    return paths[0] if paths else row[schema.IMAGE_ID]


def _annotations(row: dict[str, Any], categories: Sequence[str]) -> Iterator[dict[str, Any]]:
    for box in row.get(schema.PRED_BOXES) or ():
        x, y, x_max, y_max = (box[name] for name in (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX))
        width, height = x_max - x, y_max - y
        yield {
            "category_id": categories.index(box[schema.LABEL]) + 1,
            "bbox": [round(value, 2) for value in (x, y, width, height)],
            "area": round(width * height, 2),
            "score": round(box[schema.SCORE], 6),
        }
    code = row.get(schema.PRED_MASK_RLE)
    if code is None or code == rle.EMPTY:
        return
    height, width, probability = row[schema.HEIGHT_PX], row[schema.WIDTH_PX], row[schema.PRED_MASK_PROBABILITY]
    counts = rle.to_counts(code, height * width)
    yield {
        "category_id": 1,
        "segmentation": {"size": [height, width], "counts": rle.compressed(counts)},
        "bbox": _bounds(counts, height),
        "area": sum(counts[1::2]),
        # A family without a probability is certain of its masks; COCO has no field for an unknown score.
        "score": 1.0 if probability is None or math.isnan(probability) else round(probability, 6),
    }


def _bounds(counts: Sequence[int], height: int) -> list[int]:
    """[x, y, width, height] of a mask from its uncompressed counts along columns."""
    position, first_x, last_x, first_y, last_y = 0, None, 0, height, 0
    for zeros, ones in zip(counts[::2], counts[1::2], strict=False):
        start, end = position + zeros, position + zeros + ones - 1
        position = end + 1
        if not ones:
            continue
        first_x = start // height if first_x is None else first_x
        last_x = end // height
        whole = start // height != last_x  # the run goes on in the next column, so it touches both edges
        first_y, last_y = (
            min(first_y, 0 if whole else start % height),
            max(last_y, height - 1 if whole else end % height),
        )
    assert first_x is not None
    return [first_x, first_y, last_x - first_x + 1, last_y - first_y + 1]
