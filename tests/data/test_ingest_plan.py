"""An interrupted ingest continues with its stored plan, unless options or the archive's lists have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.data import ingest as ingest_module
from cxr.data.ingest import ingest
from cxr.data.ingest_plan import read_plan
from cxr.errors import UserError
from cxr.schema import PixelFormat
from tests.ray.archives import write_archive

PIXELS = PixelFormat(32)
LIST = "images.csv"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Images in a list that says their splits."""
    folder = Path(write_archive(tmp_path / "archive", good=6))
    names = sorted(path.name for path in folder.glob("image-*"))
    lines = [f"{name},{schema.SPLITS[number % 3]}\n" for number, name in enumerate(names)]
    (folder / LIST).write_text("uri,split\n" + "".join(lines))
    return folder


@pytest.fixture
def begun(archive: Path, tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """An ingest that was interrupted once its plan was stored."""
    out = str(tmp_path / "shards")
    with monkeypatch.context() as patched:
        patched.setattr(ingest_module, "map_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(str(archive / LIST), out, pixels=PIXELS)
    return out


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def stored(out: str) -> list[dict]:
    files = sorted(Path(out, "plan").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_an_interrupted_ingest_does_not_list_the_archive_again(
    archive: Path, begun: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ingest_module, "open_manifest", None)
    result = ingest(str(archive / LIST), begun, pixels=PIXELS)
    assert result.counts == {"test": 2, "train": 2, "val": 2}
    assert "continuing with the 6 images that were listed when this ingest started" in capfd.readouterr().out
    assert [row[schema.SPLIT] for row in stored(begun)] == ["test"] * 2 + ["train"] * 2 + ["val"] * 2


def test_a_list_that_was_saved_again_unchanged_is_read_again(
    archive: Path, begun: str, capfd: pytest.CaptureFixture[str]
) -> None:
    os.utime(archive / LIST, (1, 1))
    assert ingest(str(archive / LIST), begun, pixels=PIXELS).counts["train"] == 2
    assert "listing the images again, because these files have changed: images.csv" in capfd.readouterr().out


def test_a_changed_list_is_rejected(archive: Path, begun: str) -> None:
    text = (archive / LIST).read_text()
    (archive / LIST).write_text(text.replace(",train", ",test"))
    for _ in range(2):  # also once the plan of the changed list is stored
        with pytest.raises(UserError, match=r"images, labels or splits have changed.*use another --out"):
            ingest(str(archive / LIST), begun, pixels=PIXELS)
    (archive / LIST).write_text(text)
    assert ingest(str(archive / LIST), begun, pixels=PIXELS).counts["train"] == 2


def test_a_list_that_did_not_exist_is_noticed(
    archive: Path, tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources look for lists that an archive may have."""
    (archive / LIST).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(ingest_module, "map_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest(str(archive), str(tmp_path / "shards"), pixels=PIXELS)
    planned = read_plan(str(tmp_path / "shards"))
    assert planned is not None
    assert planned.changed_files() == []
    pq.write_table(pa.table({schema.IMAGE_ID: ["image-000.png"]}), archive / "truth.parquet")
    assert planned.changed_files() == ["truth.parquet"]


def test_other_options_are_rejected_before_anything_is_listed(
    archive: Path, begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_module, "open_manifest", None)
    with pytest.raises(UserError, match="limit was None, is now 3"):
        ingest(str(archive / LIST), begun, pixels=PIXELS, limit=3)


def test_a_finished_ingest_is_compared_with_the_archive(archive: Path, begun: str) -> None:
    ingest(str(archive / LIST), begun, pixels=PIXELS)
    with (archive / LIST).open("a") as lines:
        lines.write("torn-0.png,train\n")
    with pytest.raises(UserError, match="images, labels or splits have changed"):
        ingest(str(archive / LIST), begun, pixels=PIXELS)
