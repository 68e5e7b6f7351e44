"""score(): every image in exactly one row, whatever it is, however often the job is run."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cxr import checkpoint, ingest, schema
from cxr.errors import UserError
from cxr.phantom.archive import write_phantom
from cxr.recipes.align import AlignRecipe
from cxr.schema import PixelFormat
from cxr.score import ScoreOptions, picture_name, score
from tests.odd_files import odd_files

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    recipe = AlignRecipe(size=32, trunk="conv3", lungs=False)
    torch.manual_seed(1)
    network = recipe.network(schema.FINDINGS)
    torch.nn.init.normal_([*network.parameters()][-1], std=0.1)
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=schema.FINDINGS, metrics={})
    return str(folder)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("archive")
    write_phantom(str(folder), 30, size=64)
    return str(folder)


def rows(out: str) -> dict[str, dict]:
    """Scores by image; fails where an image stands twice."""
    found = [row for file in sorted(Path(out, "scores").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    by_id = {row[schema.IMAGE_ID]: row for row in found}
    assert len(by_id) == len(found)
    return by_id


def test_odd_files_are_rows_with_reasons_and_the_rest_is_scored(kept: str, tmp_path: Path) -> None:
    odd = odd_files()
    for file in odd:
        (tmp_path / "archive" / file.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "archive" / file.name).write_bytes(file.data)
    out = str(tmp_path / "out")
    scored = score(str(tmp_path / "archive"), kept, out, ScoreOptions(source="folder", max_rejects=1))
    found = rows(out)
    assert set(found) == {file.name for file in odd}
    assert scored.images == len(odd) >= 50
    for file in odd:
        row = found[file.name]
        if file.reason is None:
            assert row[schema.ERROR] is None, f"{file.name}: {row[schema.ERROR]}"
            assert len(row[schema.THETA_UNIT]) == 6
        else:
            assert file.reason in row[schema.ERROR], file.name
            assert row[schema.THETA_UNIT] is None
    assert scored.rejects == sum(file.reason is not None for file in odd)


def test_a_killed_run_goes_on_and_gives_the_same_rows(kept: str, archive: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    score(archive, kept, out)
    before = rows(out)
    assert len(before) == 30
    files = sorted(Path(out, "scores").glob("*.parquet"))
    assert len(files) > 1
    kept_file = files[0].stat().st_mtime_ns
    files[1].unlink()
    again = score(archive, kept, out)
    assert rows(out) == before
    assert files[0].stat().st_mtime_ns == kept_file
    assert (again.images, again.rejects) == (30, 0)


def test_shards_and_their_archive_get_the_same_scores(kept: str, archive: str, tmp_path: Path) -> None:
    ingest.ingest(archive, str(tmp_path / "shards"), pixels=PixelFormat(32))
    score(str(tmp_path / "shards"), kept, str(tmp_path / "from_shards"))
    score(archive, kept, str(tmp_path / "from_archive"), ScoreOptions(save_images=True))
    one, other = rows(str(tmp_path / "from_shards")), rows(str(tmp_path / "from_archive"))
    assert set(one) == set(other)
    for image_id in one:
        assert one[image_id][schema.THETA_UNIT] == pytest.approx(other[image_id][schema.THETA_UNIT], abs=1e-5)
    assert {p.name for p in (tmp_path / "from_archive" / "aligned").iterdir()} == {
        picture_name(image_id) for image_id in other
    }


def test_another_checkpoint_is_refused_in_the_same_place(kept: str, archive: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    score(archive, kept, out)
    with pytest.raises(UserError, match="another --out"):
        score(archive, kept, out, ScoreOptions(save_images=True))


def test_too_many_rejects_fail_after_all_else_is_scored(kept: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    write_phantom(str(archive), 4, size=64)
    for name in ("a.png", "b.png", "c.png"):
        (archive / "images" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"3 of 7 images .43%. could not be read"):
        score(str(archive), kept, str(tmp_path / "out"), ScoreOptions(max_rejects=0.2))
    assert sum(row[schema.ERROR] is None for row in rows(str(tmp_path / "out")).values()) == 4


@pytest.mark.parametrize(
    ("image_id", "name"),
    [("a.png", "a.png"), ("x/b.dcm", "x/b.dcm.png"), ("../../etc/c", "etc/c.png"), ("/d.PNG", "d.PNG")],
)
def test_pictures_stay_in_their_folder(image_id: str, name: str) -> None:
    assert picture_name(image_id) == name
