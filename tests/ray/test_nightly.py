"""`--new-only` on a cluster, with pseudonyms."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cxr import schema
from cxr.data.identity import read_crosswalk
from cxr.evaluation.run import read_run, read_scores
from cxr.inference.options import ScoreOptions
from cxr.inference.score import score
from cxr.phantom.archive import write_phantom
from cxr.sources.options import ReadOptions
from tests.aligners import saved_aligner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_nights_with_pseudonyms_score_what_is_new_and_name_nobody(tmp_path: Path) -> None:
    write_phantom(str(tmp_path / "phantoms"), 21, size=64)
    pictures = sorted((tmp_path / "phantoms").rglob("*.png"))
    archive, out, key = tmp_path / "archive", str(tmp_path / "out"), tmp_path / "private" / "key"
    (archive / "incoming").mkdir(parents=True)
    key.parent.mkdir()
    key.write_text("a secret of at least sixteen bytes")
    network = saved_aligner(tmp_path / "network")
    options = ScoreOptions(new_only=True, reading=ReadOptions(source="folder"), pseudonymize=str(key))

    def night(first: int, last: int) -> tuple[int, ...]:
        for number in range(first, last):
            shutil.copyfile(pictures[number], archive / "incoming" / f"Zebrafish{number:02d}.png")
        (increment,) = score(str(archive), network, out, options).increments
        return tuple(increment[name] for name in ("new", "changed", "unchanged", "moved"))

    assert night(0, 20) == (20, 0, 0, 0)
    assert night(20, 21) == (1, 0, 20, 0)
    rows = [row for part in read_scores(read_run(out), [schema.IMAGE_ID, schema.ERROR]) for row in part.to_pylist()]
    assert len({row[schema.IMAGE_ID] for row in rows}) == 21
    assert not any(row[schema.ERROR] for row in rows)
    assert len(read_crosswalk(str(tmp_path / "private" / "crosswalk")).table) == 21
    written = [path for path in Path(out).rglob("*") if path.is_file()]
    assert not [path for path in written if b"Zebrafish" in path.read_bytes()]
