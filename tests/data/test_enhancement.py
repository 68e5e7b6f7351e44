"""Enhancement is the same in ingest, training and scoring; mismatches are rejected."""

from __future__ import annotations

import importlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import ensure_shards
from cxr.data import ingest, shards
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.families import checkpoint, image_crop
from cxr.families.align import AlignRecipe
from cxr.families.base import Recipe
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_enhancement
from cxr.imaging.enhance import Enhancement
from cxr.imaging.geometry import fit
from cxr.imaging.lung_bbox import LungSquare
from cxr.inference.plan import plan_scoring
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.options import Labeling, ReadOptions
from tests.lung_rule import save_finder
from tests.made_shards import chest_like, write_shards

PIXELS = PixelFormat(32)
DONE = Enhancement("median", "percentile", "clahe")
PLAIN = AlignRecipe(size=32, backbone="conv3", lungs=False, epochs=1)
RECIPE = PLAIN.replace(**DONE.describe())


@pytest.fixture
def archive(tmp_path: Path) -> str:
    folder, rng = tmp_path / "archive", np.random.default_rng(0)
    folder.mkdir()
    for number in range(12):
        assert cv2.imwrite(str(folder / f"{number:02d}.png"), chest_like(rng, 64))
    return str(folder)


def saved(folder: Path, recipe: Recipe) -> Checkpoint:
    network = recipe.network(schema.FINDINGS)
    task = recipe.task(network)
    checkpoint.save(folder, recipe, task, network.state_dict(), findings=schema.FINDINGS, metrics={})
    return checkpoint.load(str(folder))


def stored(uri: str) -> dict[str, bytes]:
    tables = [storage.read_parquet(file.uri) for files in shards.read_info(uri).parts.values() for file in files]
    return dict(pa.concat_tables(tables).select([schema.IMAGE_ID, schema.PIXELS]).to_pandas().itertuples(index=False))


def test_enhancement_is_applied_after_the_crop_is_computed(archive: str) -> None:
    table = open_manifest(archive).table.slice(0, 1)
    original = cv2.imread(table[schema.SOURCE_URI][0].as_py(), cv2.IMREAD_UNCHANGED)
    seen: list[np.ndarray] = []

    def crop(pixels: np.ndarray) -> LungSquare:
        seen.append(pixels)
        return LungSquare(8, 8, 32)

    for given, wanted in ((None, fit(DONE(original), 32)[0]), (crop, DONE(original)[8:40, 8:40])):
        rows = make_rows(table, PIXELS, crop=given, enhance=DONE)
        np.testing.assert_array_equal(schema.pixels_array(rows[schema.PIXELS], PIXELS)[0], wanted)
    np.testing.assert_array_equal(seen[0], original)
    assert make_rows(table, PIXELS, enhance=Enhancement()).equals(make_rows(table, PIXELS))


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_training_shards_equal_the_pixels_of_scoring(archive: str, tmp_path: Path) -> None:
    options = ArchiveOptions(archive=(archive,), stored_size=32)
    made = ensure_shards(options, str(tmp_path / "out"), RECIPE)
    info = shards.read_info(made)
    assert info.enhancement == DONE
    plan = plan_scoring(archive, {"": saved(tmp_path / "kept", RECIPE)}, ReadOptions())
    rows = pa.concat_tables(plan.reader("off").rows(part.rows) for part in plan.parts)
    seen = dict(zip(rows[schema.IMAGE_ID].to_pylist(), rows[schema.PIXELS].to_pylist(), strict=True))
    assert stored(made) == seen
    assert stored(ensure_shards(options, str(tmp_path / "plain"), PLAIN)) != seen


@pytest.mark.usefixtures("without_ray")
def test_ingest_does_not_resume_with_another_enhancement(archive: str, tmp_path: Path) -> None:
    ingest.ingest(archive, str(tmp_path / "out"), pixels=PIXELS, enhance=DONE)
    with pytest.raises(UserError, match="enhancement was"):
        ingest.ingest(archive, str(tmp_path / "out"), pixels=PIXELS)
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image_id,class_id,rad_id,x_min,y_min,x_max,y_max\n00,5,R1,1,2,3,4\n")
    with pytest.raises(UserError, match="boxes was None"):
        ingest.ingest(
            archive, str(tmp_path / "out"), pixels=PIXELS, enhance=DONE, labeling=Labeling(boxes=str(boxes))
        )


@pytest.mark.usefixtures("without_ray")
def test_boxes_become_labels_of_shards(archive: str, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.csv"
    rows = "".join(f"{number:02d},{'5,R1,1,2,3,4' if number % 2 else '14,R1,,,,'}\n" for number in range(10))
    boxes.write_text(f"image_id,class_id,rad_id,x_min,y_min,x_max,y_max\n{rows}")
    options = ArchiveOptions(archive=(archive,), stored_size=32, labeling=Labeling(boxes=str(boxes)))
    info = shards.read_info(ensure_shards(options, str(tmp_path / "out")))
    assert info.findings == schema.VINBIGDATA_FINDINGS
    read = [storage.read_parquet(file.uri) for files in info.parts.values() for file in files]
    known = {row[schema.IMAGE_ID]: row for row in pa.concat_tables(read).to_pylist()}
    assert sorted(known) == [f"{number:02d}.png" for number in range(10)]
    assert [sum(known[f"{number:02d}.png"][schema.LABELS]) for number in range(4)] == [0, 1, 0, 1]
    assert [len(known[f"{number:02d}.png"][schema.BOXES]) for number in range(4)] == [0, 1, 0, 1]


def test_shards_with_another_enhancement_are_rejected(tmp_path: Path) -> None:
    plain = write_shards(tmp_path / "plain", {"train": 4, "val": 2})
    done = write_shards(tmp_path / "done", {"train": 4, "val": 2})
    about = storage.read_json(f"{done}/{shards.ARCHIVE_FILE}")
    storage.write_json(f"{done}/{shards.ARCHIVE_FILE}", about | {"enhancement": DONE.describe()})
    check_enhancement(shards.read_info(plain), Enhancement())
    check_enhancement(shards.read_info(done), DONE)
    wanted = "with no enhancement, but this run needs --denoise median --normalize percentile --equalize clahe"
    for refused in (
        lambda: check_inputs(RECIPE, ArchiveOptions(archive=(plain,)), str(tmp_path / "out")),
        lambda: plan_scoring(plain, {"": saved(tmp_path / "kept", RECIPE)}, ReadOptions()),
    ):
        with pytest.raises(UserError, match=f"{wanted}: run cxr ingest --denoise median"):
            refused()
    with pytest.raises(UserError, match=r"with --denoise .*, but this run needs no enhancement: .* without these"):
        check_enhancement(shards.read_info(done), Enhancement())
    with pytest.raises(UserError, match="expected the same enhancement in combined archives"):
        shards.join_shards(str(tmp_path / "joined"), [plain, done], ["/a", "/b"])
    assert shards.join_shards(str(tmp_path / "joined"), [done, done], ["/a", "/b"]).enhancement == DONE


def test_labels_of_shards_cannot_be_changed(tmp_path: Path) -> None:
    plain = write_shards(tmp_path / "plain", {"train": 4, "val": 2})
    given = ArchiveOptions(archive=(plain,), labeling=Labeling(min_readers=2))
    with pytest.raises(UserError, match="omit --min-readers"):
        check_inputs(PLAIN, given, str(tmp_path / "out"))


def test_recipe_records_the_enhancement(tmp_path: Path) -> None:
    assert (RECIPE.enhancement, PLAIN.enhancement) == (DONE, Enhancement())
    with pytest.raises(UserError, match="expected equalize to be one of none, clahe, got"):
        PLAIN.replace(equalize="more")
    assert saved(tmp_path / "kept", RECIPE).recipe.enhancement == DONE


def test_ingest_shows_each_step(archive: str, tmp_path: Path) -> None:
    job = importlib.import_module("cxr.cli.commands.ingest")
    (Path(archive) / "00.png").write_bytes(b"no picture")
    (uri,) = job._pictures(job.Options(archive=archive, out=str(tmp_path / "out"), enhancement=DONE), archive)
    height, width = cv2.imread(uri, cv2.IMREAD_GRAYSCALE).shape
    assert 1.1 < height / width < 1.8  # four rows of three images


def test_ingest_without_an_archive_generates_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, ingested = importlib.import_module("cxr.cli.commands.ingest"), list[str]()
    monkeypatch.setattr("cxr.runtime.cluster.connect", lambda: None)
    monkeypatch.setattr("cxr.data.ingest.ingest", lambda archive, *_, **options: ingested.append(archive) or DONE)
    monkeypatch.setattr(job, "_print_summary", lambda result: None)
    result = job.main(job.Options(out=str(tmp_path), enhancement=DONE))
    assert ingested == [str(tmp_path / "phantoms")]
    assert len([*(tmp_path / "phantoms" / "images").iterdir()]) == 60
    assert Path(*result["pictures"]).exists()


def test_lungs_are_segmented_in_images_preprocessed_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = image_crop.by_lungs(save_finder(tmp_path)).loaded()
    pixels = chest_like(np.random.default_rng(0), 64)
    asked: list[np.ndarray] = []
    monkeypatch.setattr(Enhancement, "__call__", lambda self, given: asked.append(given) or given)
    finder(pixels)
    np.testing.assert_array_equal(asked, [pixels])
