"""Stored embeddings: what is written is read, in the order of the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema
from cxr.data import embeddings
from cxr.errors import UserError

ABOUT = {"checkpoint": "/c", "sha256": "0", "archives": ["/a"]}


def rows(*ids: str) -> pa.Table:
    return pa.table({schema.IMAGE_ID: ids, schema.PATIENT_ID: ids, schema.SPLIT: ["train"] * len(ids)})


def test_vectors_are_read_in_the_order_of_the_images(tmp_path: Path) -> None:
    folder, parts = str(tmp_path / embeddings.FOLDER), ["scores/part-00000", "scores/part-00001", "s/p2"]
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    vectors[0, 0] = 1e9
    embeddings.write_part(folder, "scores/part-00000", rows("a", "b", "c"), vectors[:3])
    embeddings.write_part(folder, "scores/part-00001", rows("d", "e"), vectors[3:])
    embeddings.write_part(folder, "s/p2", rows().cast(rows("a").schema), np.zeros((0, 1), np.float32))
    with pytest.raises(UserError, match=r"got no embeddings/embeddings\.json"):
        embeddings.load(str(tmp_path))
    embeddings.finish(folder, parts, ABOUT)
    loaded = embeddings.load(str(tmp_path))
    assert loaded.image_ids.to_pylist() == ["a", "b", "c", "d", "e"]
    assert loaded.vectors.dtype == np.float16
    np.testing.assert_array_equal(loaded.vectors, vectors.clip(-65504, 65504).astype(np.float16))
    assert embeddings.read_about(str(tmp_path))["checkpoint"] == "/c"


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    embeddings.write_part(str(tmp_path), "scores/part-00000", rows("a"), np.zeros((1, 2), np.float32))
    with pytest.raises(UserError, match=r"part-00001\.parquet is missing: restore it, or score the archive again"):
        embeddings.finish(str(tmp_path), ["scores/part-00000", "scores/part-00001"], ABOUT)
