"""Pictures of shards are read from where they are stored, without searching all files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxr import schema, storage
from cxr.data import shards
from cxr.evaluation import images
from cxr.evaluation.ground_truth import PLACES, read_truth
from cxr.imaging.geometry import ResizeTransform
from cxr.sources.options import ALL_IMAGES
from tests.made_shards import write_shards

TRANSFORM = {"x_scale": 2.0, "y_scale": 2.0, "x_offset": 0.0, "y_offset": 0.0}


def test_each_picture_takes_one_read_if_its_place_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(
        tmp_path, {"train": 30, "test": 50}, part_rows=10, known=lambda _, __: {schema.RESIZE_TRANSFORM: TRANSFORM}
    )
    info, rows = shards.read_info(folder), [3, 17, 18, 49]
    table = read_truth(folder, ALL_IMAGES, "test", [schema.SOURCE_URI]).table
    reads: list[tuple[str, list[int]]] = []
    read_parquet = storage.read_parquet

    def counted(uri: str, **options: object) -> object:
        reads.append((Path(uri).name, options.get("row_groups")))  # pyright: ignore[reportArgumentType]
        return read_parquet(uri, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(storage, "read_parquet", counted)
    shown = images.read_pictures(table, rows, [info])
    names = [f"part-{number:05d}.parquet" for number in (0, 1, 1, 4)]
    assert sorted(reads) == list(zip(names, [[0], [0], [1], [1]], strict=True))
    searched = images.read_pictures(table.drop_columns(PLACES.names), rows, [info])
    assert list(shown) == rows == sorted(searched)
    for row, (picture, transform) in shown.items():
        assert picture[0, 0] == np.float32(row) / 255
        assert transform == ResizeTransform.from_dict(TRANSFORM)
        np.testing.assert_array_equal(picture, searched[row][0])
