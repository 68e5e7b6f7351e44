"""score(): every image in exactly one row, also for odd files and repeated runs."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cxr import schema, storage
from cxr.data import ingest, shards
from cxr.errors import UserError
from cxr.evaluation.run import read_run
from cxr.families import checkpoint
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.classify import ClassifyRecipe
from cxr.families.thresholds_file import ThresholdsFile
from cxr.inference import score_increment
from cxr.inference.options import ScoreOptions
from cxr.inference.part_scorer import picture_name
from cxr.inference.score import score
from cxr.phantom.archive import make_exam, write_phantom
from cxr.runtime import audit
from cxr.schema import PixelFormat
from cxr.sources.options import ReadOptions
from tests.odd_files import dataset, dicom, odd_files, radiograph
from tests.ray.archives import BAD, write_archive
from tests.saved_checkpoint import save_untrained
from tests.sources.test_dicom import PLANTED, write, xray

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
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


def killed(*arguments: object) -> None:
    raise KeyboardInterrupt


def rows(out: str, folder: str = "scores") -> dict[str, dict]:
    """Scores by image; fails if an image occurs twice."""
    found = [row for file in sorted(Path(out, folder).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    by_id = {row[schema.IMAGE_ID]: row for row in found}
    assert len(by_id) == len(found)
    return by_id


def test_odd_files_are_rows_with_reasons_and_the_rest_is_scored(kept: str, tmp_path: Path) -> None:
    odd = odd_files()
    for file in odd:
        (tmp_path / "archive" / file.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "archive" / file.name).write_bytes(file.data)
    out = str(tmp_path / "out")
    scored = score(
        str(tmp_path / "archive"), kept, out, ScoreOptions(reading=ReadOptions(source="folder"), max_rejects=1)
    )
    found = rows(out)
    assert set(found) == {file.name for file in odd}
    assert scored.images == len(odd) >= 50
    for file in odd:
        row = found[file.name]
        if file.reason is None:
            assert row[schema.ERROR] is None, f"{file.name}: {row[schema.ERROR]}"
            assert len(row[schema.THETA]) == 6
        else:
            assert file.reason in row[schema.ERROR], file.name
            assert row[schema.THETA] is None
    assert scored.rejects == sum(file.reason is not None for file in odd)


@pytest.mark.slow
def test_scores_identify_the_exams_of_selected_dicom_files(kept: str, tmp_path: Path) -> None:
    for number, view in enumerate(("PA", "LATERAL", "AP")):
        write(tmp_path / "archive", f"{number}.dcm", xray(number, ViewPosition=view))
    out = tmp_path / "out"
    options = ScoreOptions(reading=ReadOptions(select="view in PA,AP", gate="off"))
    score(str(tmp_path / "archive"), kept, str(out), options)
    found = rows(str(out))
    assert set(found) == {"1.2.3.0", "1.2.3.2"}
    assert found["1.2.3.2"][schema.VIEW] == "AP"
    assert found["1.2.3.2"][schema.STUDY_ID] == "1.2.9.2"
    assert found["1.2.3.2"][schema.SERIES_ID] == "1.2.8.2"
    assert found["1.2.3.0"][schema.PATIENT_ID] == found["1.2.3.2"][schema.PATIENT_ID]
    assert read_run(str(out)).select == "view in PA,AP"
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in written for planted in PLANTED if planted.encode() in path.read_bytes()]
    with pytest.raises(UserError, match="select was 'view in PA,AP', is now None"):
        score(str(tmp_path / "archive"), kept, str(out), ScoreOptions(reading=ReadOptions(gate="off")))


@pytest.mark.slow
def test_images_other_than_frontal_views_are_counted_also_in_parts_scored_earlier(kept: str, tmp_path: Path) -> None:
    tags = {
        "pa.dcm": {"ViewPosition": "PA", "BodyPartExamined": "CHEST", "Modality": "DX"},
        "lateral.dcm": {"ViewPosition": "LATERAL", "BodyPartExamined": "CHEST", "Modality": "DX"},
        "hand.dcm": {"ViewPosition": "PA", "BodyPartExamined": "HAND", "Modality": "DX"},
        "unknown.dcm": {},
    }
    (tmp_path / "archive").mkdir()
    for name, given in tags.items():
        (tmp_path / "archive" / name).write_bytes(dicom(dataset(radiograph(), **given)))
    headers_only = ScoreOptions(reading=ReadOptions(source="folder", gate="off"))
    for _ in range(2):
        scored = score(str(tmp_path / "archive"), kept, str(tmp_path / "out"), headers_only)
        assert scored.not_frontal_chest == {"view LATERAL": 1, "body part HAND": 1}
    found = rows(str(tmp_path / "out"))
    columns = (schema.VIEW, schema.BODY_PART, schema.MODALITY)
    for name, given in tags.items():
        assert [found[name][column] for column in columns] == (list(given.values()) or [None] * 3)
        assert found[name][schema.GATE] is None


@pytest.mark.slow
def test_excluded_images_are_rows_with_reasons_and_do_not_count_as_unusable(kept: str, tmp_path: Path) -> None:
    upright = make_exam(0, size=96).phantom.pixels
    (tmp_path / "archive").mkdir()
    for name, pixels in {"upright": upright, "turned": np.rot90(upright, -1), "inverted": 255 - upright}.items():
        cv2.imwrite(str(tmp_path / "archive" / f"{name}.png"), pixels)
    (tmp_path / "archive" / "hand.dcm").write_bytes(dicom(dataset(radiograph(), BodyPartExamined="HAND")))
    options = ScoreOptions(reading=ReadOptions(source="folder", gate="exclude"), max_rejects=0)
    scored = score(str(tmp_path / "archive"), kept, str(tmp_path / "out"), options)
    verdicts = {name: row[schema.GATE] for name, row in rows(str(tmp_path / "out")).items()}
    assert verdicts == {
        "upright.png": "frontal",
        "turned.png": "rotated 90",
        "inverted.png": "inverted",
        "hand.dcm": "body part HAND",
    }
    assert (scored.images, scored.rejects) == (4, 3)
    assert scored.not_frontal_chest == {"rotated 90": 1, "inverted": 1, "body part HAND": 1}


@pytest.mark.slow
def test_shards_and_their_archive_get_the_same_scores(kept: str, archive: str, tmp_path: Path) -> None:
    ingest.ingest(archive, str(tmp_path / "shards"), pixels=PixelFormat(32))
    score(str(tmp_path / "shards"), kept, str(tmp_path / "from_shards"))
    score(archive, kept, str(tmp_path / "from_archive"), ScoreOptions(save_images=True))
    with pytest.raises(UserError, match=r"save_images was True.*another --out"):
        score(archive, kept, str(tmp_path / "from_archive"))
    one, other = rows(str(tmp_path / "from_shards")), rows(str(tmp_path / "from_archive"))
    assert set(one) == set(other)
    for image_id in one:
        assert one[image_id][schema.THETA] == pytest.approx(other[image_id][schema.THETA], abs=1e-5)
    assert {p.name for p in (tmp_path / "from_archive" / "aligned").iterdir()} == {
        picture_name(image_id) for image_id in other
    }


@pytest.fixture(scope="module")
def compressors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints with different encoders."""
    recipe = AecnnRecipe(size=64, patch=16, width=8, backbone="resnet18", stem_stride=1)
    folders = [tmp_path_factory.mktemp("compressor") for _ in range(2)]
    for folder in folders:
        network = recipe.network(schema.FINDINGS)
        for values in network.codec.parameters():
            torch.nn.init.normal_(values, std=0.05)
        task = recipe.task(network)
        checkpoint.save(folder, recipe, task, network.state_dict(), findings=schema.FINDINGS, metrics={})
    return [str(folder) for folder in folders]


def contents(folder: str) -> dict[Path, bytes]:
    """The files of a result, except for the audit log, to which every run adds entries."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != audit.FILE)
    return {path: path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_killed_run_resumes_and_its_latents_have_the_same_scores(
    compressors: list[str], archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, out, again = compressors[0], str(tmp_path / "out"), str(tmp_path / "again")
    latents = f"{out}/latents"
    monkeypatch.setattr(score_increment, "join_parts", killed)
    with pytest.raises(KeyboardInterrupt):
        score(archive, kept, out, ScoreOptions(save_latents=True))
    monkeypatch.undo()
    parts = contents(latents)
    first, second = sorted(Path(out, "unfinished").glob("*.parquet"))
    before = rows(out, "unfinished")
    for path in (second, *Path(latents).glob(f"*/{second.name}")):
        path.unlink()
    written = first.stat().st_ino
    monkeypatch.setattr(storage, "delete", lambda uri: None)  # keep the parts
    finished = score(archive, kept, out, ScoreOptions(save_latents=True))
    assert (finished.images, finished.rejects) == (30, 0)
    assert rows(out) == before
    assert parts.items() <= contents(latents).items()
    assert first.stat().st_ino == written
    monkeypatch.undo()
    info = shards.read_info(latents, latents=True)
    assert sum(info.rows(split) for split in info.parts) == len(before) == 30
    assert len(info.parts) > 1
    assert info.pixels == PixelFormat(16)

    score(latents, kept, again, ScoreOptions(save_images=True))
    found = rows(again)
    assert set(found) == set(before)
    for image_id, row in found.items():
        assert row[schema.PROBABILITIES] == pytest.approx(before[image_id][schema.PROBABILITIES], abs=1e-6)
        assert row[schema.RESIZE_TRANSFORM]["x_scale"] == 4 * before[image_id][schema.RESIZE_TRANSFORM]["x_scale"]
    assert {p.name for p in Path(again, "decoded").iterdir()} == {picture_name(image_id) for image_id in found}
    metadata = pq.read_schema(Path(again, "scores", "part-00000.parquet")).metadata
    assert json.loads(metadata[schema.FINDINGS_KEY]) == list(schema.FINDINGS)
    with pytest.raises(UserError, match="has another encoder"):
        score(latents, compressors[1], str(tmp_path / "other"))


@pytest.mark.slow
def test_several_archives_are_scored_together_and_evaluated_separately(kept: str, tmp_path: Path) -> None:
    raw, stored, more = (write_archive(tmp_path / name, good=3, first=name) for name in ("raw", "stored", "more"))
    ingest.ingest(stored, str(tmp_path / "shards"), pixels=PixelFormat(32), max_rejects=0.9)
    archives, out = [raw, str(tmp_path / "shards"), more], str(tmp_path / "out")
    too_many = f"{3 * BAD} of {3 * (3 + BAD)} images .{BAD / (3 + BAD):.0%}. could not be read"
    with pytest.raises(UserError, match=too_many):
        score(archives, kept, out, ScoreOptions(max_rejects=0.2))
    assert sum(row[schema.ERROR] is None for row in rows(out).values()) == 9
    parts = contents(out)
    scored = score(archives, kept, out, ScoreOptions(max_rejects=0.9))
    assert contents(out) == parts
    assert set(rows(out)) == {path.name for name in ("raw", "stored", "more") for path in (tmp_path / name).iterdir()}
    assert (scored.images, scored.rejects) == (3 * (3 + BAD), 3 * BAD)
    with pytest.raises(UserError, match=r"archive was .*, is .*another --out"):
        score(archives[:2], kept, out)
    with pytest.raises(UserError, match=r"contains scores of .*raw and .*shards and .*more: name the archive"):
        _ = read_run(out).archive


def test_archives_that_share_an_image_id_are_not_scored_together(kept: str, tmp_path: Path) -> None:
    one, other = write_archive(tmp_path / "one", good=2), write_archive(tmp_path / "other", good=1)
    with pytest.raises(UserError, match=r"one and .*other, got 4 ids in common, for example 'image-000.png'"):
        score([one, other], kept, str(tmp_path / "out"))
    with pytest.raises(UserError, match="expected a different archive for each --archive"):
        score([one, f"{one}/"], kept, str(tmp_path / "out"))
    with pytest.raises(UserError, match="expected one --archive with --save-latents, got 2"):
        score([one, other], kept, str(tmp_path / "out"), ScoreOptions(save_latents=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_missing_shard_file_is_named_in_one_line(kept: str, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", good=3)
    made = ingest.ingest(archive, str(tmp_path / "shards"), pixels=PixelFormat(32), max_rejects=0.9).shards
    gone = next(Path(made).glob("*/part-*.parquet"))
    gone.unlink()
    with pytest.raises(UserError) as mistake:
        score(made, kept, str(tmp_path / "out"), ScoreOptions(max_rejects=0.9))
    assert str(gone) in str(mistake.value)
    assert str(mistake.value).endswith("Scored parts are saved: run the same command again to continue")
    assert len(str(mistake.value).splitlines()) == 1


@pytest.mark.slow
def test_thresholds_are_recorded_and_change_decisions(archive: str, tmp_path: Path) -> None:
    findings = ("Edema", "Mass")
    model = save_untrained(tmp_path / "model", ClassifyRecipe(size=32), findings)
    sha256 = storage.read_json(f"{model}/checkpoint.json")["sha256"]
    file = str(tmp_path / "thresholds.json")
    ThresholdsFile("classify", sha256, "youden", {"Mass": 0.0}).write(file)
    options = ScoreOptions(thresholds=(file,))
    scored = score(archive, model, str(tmp_path / "out"), options)
    assert scored.members[0].thresholds == {"Mass": 0.0}
    assert read_run(str(tmp_path / "out")).thresholds == {"Mass": 0.0}
    assert {row[schema.DECISIONS][1] for row in rows(str(tmp_path / "out")).values()} == {1}
    with pytest.raises(UserError, match="thresholds"):  # decisions of two kinds would mix
        score(archive, model, str(tmp_path / "out"))
    ThresholdsFile("classify", "another", "youden", {"Mass": 0.0}).write(file)
    with pytest.raises(UserError, match="got those of another checkpoint"):
        score(archive, model, str(tmp_path / "other"), options)
