"""An archive of 1,000 files, of which 200 are broken in 20 ways: 1,000 rows, each with scores or with the reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxr import schema
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.inference.options import ScoreOptions
from cxr.inference.score import score
from cxr.sources.options import ReadOptions
from tests.odd_files import dataset, dicom, encoded, odd_files, radiograph

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

GOOD, EACH = 800, 10
BROKEN = (  # files of tests/odd_files.py
    "empty.png",
    "cut_in_magic.png",
    "cut_in_header.png",
    "cut_in_half.png",
    "bad_checksum.png",
    "headless.png",
    "bomb.png",
    "blank.png",
    "photograph.png",
    "cut_in_half.jpg",
    "zeroed_tail.jpg",
    "denied.xml.png",
    "error_page.dcm",
    "zeros.dcm",
    "cut_in_header.dcm",
    "cut_in_pixels.dcm",
    "torn_jpeg.dcm",
    "rows_missing.dcm",
    "no_pixels.dcm",
    "video.dcm",
)


@pytest.mark.slow
def test_a_thousand_files_of_which_200_are_broken_are_a_thousand_rows(tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for number in range(GOOD):
        pixels = radiograph(seed=number)
        name, data = (
            (f"{number}.dcm", dicom(dataset(pixels))) if number % 4 == 0 else (f"{number}.png", encoded(pixels))
        )
        (archive / name).write_bytes(data)
    odd = {file.name: file for file in odd_files() if file.reason is not None}
    assert len(set(BROKEN)) == 20
    for name in BROKEN:
        for copy in range(EACH):
            (archive / f"broken {copy} {name}").write_bytes(odd[name].data)
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
    network = recipe.network(schema.FINDINGS)
    torch.nn.init.normal_([*network.parameters()][-1], std=0.1)
    task = recipe.task(network)
    checkpoint.save(tmp_path / "model", recipe, task, network.state_dict(), findings=schema.FINDINGS, metrics={})

    scored = score(
        str(archive),
        str(tmp_path / "model"),
        str(out),
        ScoreOptions(reading=ReadOptions(source="folder", gate="off")),
    )

    table = pa.concat_tables(pq.read_table(path) for path in sorted((out / "scores").glob("*.parquet")))
    rows = {row[schema.IMAGE_ID]: row for row in table.to_pylist()}
    assert (scored.images, scored.rejects, table.num_rows, len(rows)) == (1000, 200, 1000, 1000)
    assert set(rows) == {path.name for path in archive.iterdir()}
    good = [row for row in rows.values() if row[schema.ERROR] is None]
    assert len(good) == GOOD
    assert all(len(row[schema.THETA]) == 6 for row in good)
    ways = Counter()
    for name, row in rows.items():
        if row[schema.ERROR] is not None:
            kind = name.split(" ", 2)[2]
            assert str(odd[kind].reason) in row[schema.ERROR], name
            assert row[schema.THETA] is None
            ways[kind] += 1
    assert ways == dict.fromkeys(BROKEN, EACH)
