"""`cxr.load` gives the same scores as `score`, for every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.dataset
import pydicom
import pytest
import torch

import cxr
from cxr import schema
from cxr.families import RECIPES, checkpoint
from cxr.inference.options import ScoreOptions
from cxr.inference.score import score
from cxr.phantom.archive import make_exam
from cxr.sources.options import ReadOptions
from tests.families.test_recipes import SMALL
from tests.odd_files import dataset, dicom, radiograph

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

FOLDER = ReadOptions(source="folder")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes and formats, one of them broken, in the order of their ids."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(3):
        cv2.imwrite(str(folder / f"a{number}.png"), make_exam(number, size=64).phantom.pixels)
    (folder / "b.png").write_bytes((folder / "a0.png").read_bytes()[:200])
    (folder / "c.dcm").write_bytes(dicom(dataset(radiograph(12), BitsStored=12, HighBit=11, ViewPosition="PA")))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(RECIPES))
def test_scores_equal_those_of_an_archive(family: str, archive: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = SMALL[family]
    network = recipe.network(schema.FINDINGS)
    saved = tmp_path / "checkpoint"
    checkpoint.save(saved, recipe, recipe.task(network), network.state_dict(), findings=schema.FINDINGS, metrics={})
    score(str(archive), str(saved), str(tmp_path / "out"), ScoreOptions(reading=FOLDER))
    stored = pa.dataset.dataset(tmp_path / "out" / "scores").to_table().sort_by(schema.IMAGE_ID)
    expected = stored.drop_columns(["increment"])  # says when an image was scored
    model = cxr.load(saved)

    whole = model.predict(archive, reading=FOLDER)
    metadata = {key: value for key, value in expected.schema.metadata.items() if key != b"cxr.counts"}  # of its file
    assert whole.schema.metadata == metadata
    assert_close(whole, expected)
    assert whole[schema.ERROR].null_count == 4

    files = sorted(archive.iterdir())
    mixed = [files[0], files[1].read_bytes(), cv2.imread(str(files[2]), cv2.IMREAD_UNCHANGED), files[3]]
    one_by_one = model.predict([*mixed, pydicom.dcmread(files[4])])
    of_archive = [schema.IMAGE_ID, schema.PATIENT_ID, schema.SPLIT, schema.SOURCE_URI]
    assert_close(one_by_one.drop_columns(of_archive), expected.drop_columns(of_archive))


def assert_close(got: pa.Table, expected: pa.Table) -> None:
    """The same values; floats to 1e-5, because another number of threads adds them in another order."""
    assert got.column_names == expected.column_names
    for name in got.column_names:
        for a, b in zip(flat(got[name].to_pylist()), flat(expected[name].to_pylist()), strict=True):
            assert a == (pytest.approx(b, rel=1e-5, abs=1e-5, nan_ok=True) if isinstance(b, float) else b), name


def flat(value: Any) -> Iterator[Any]:
    """Every number and text in nested lists and dicts, with the keys."""
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    else:
        yield value
