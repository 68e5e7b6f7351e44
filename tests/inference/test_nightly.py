"""`--new-only`: every night scores exactly what is new or has changed, and the run reads as one table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cxr import schema, storage
from cxr.data.run_ledger import read_ledger
from cxr.errors import UserError
from cxr.evaluation.run import read_run, read_scores
from cxr.families import checkpoint
from cxr.inference.options import ScoreOptions
from cxr.inference.score import Scored, score
from cxr.inference.score_job import Job
from cxr.phantom.archive import write_phantom
from cxr.runtime import cluster
from cxr.runtime.progress import Progress
from cxr.sources.options import ReadOptions
from tests.aligners import saved_aligner
from tests.documented_queries import state_by_pandas
from tests.inference.scored_here import score_parts, without_ray  # noqa: F401
from tests.made_shards import write_shards
from tests.sources.test_dicom import write, xray

pytestmark = pytest.mark.usefixtures("without_ray")
NIGHTLY = ScoreOptions(new_only=True, reading=ReadOptions(source="folder"))
WHOLE = replace(NIGHTLY, new_only=False)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_aligner(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """60 PNG files, all different."""
    folder = tmp_path_factory.mktemp("pictures")
    write_phantom(str(folder), 60, size=64)
    return sorted(folder.rglob("*.png"))


def fill(archive: Path, pictures: list[Path], names: list[str]) -> None:
    """Copy pictures into an archive under other names."""
    archive.mkdir(exist_ok=True)
    for picture, name in zip(pictures, names, strict=True):
        shutil.copyfile(picture, archive / name)


def table(out: Path) -> dict[str, dict[str, Any]]:
    """The current state of a run by image id; fails if an image occurs twice."""
    columns = [schema.IMAGE_ID, schema.SOURCE_URI, schema.INCREMENT, schema.ERROR, schema.THETA]
    rows = [row for part in read_scores(read_run(str(out)), columns) for row in part.to_pylist()]
    by_id = {row[schema.IMAGE_ID]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def increments_of(out: Path) -> dict[str, int]:
    return {image_id: row[schema.INCREMENT] for image_id, row in table(out).items()}


def counts(scored: Scored) -> list[tuple[int, ...]]:
    names = ("number", "new", "changed", "unchanged", "removed", "moved", "remaining")
    return [tuple(increment[name] for name in names) for increment in scored.increments]


def test_each_night_scores_what_is_new_or_has_changed(
    network: str, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:20], [f"{n:02d}.png" for n in range(20)])
    first = score(str(archive), network, str(out), NIGHTLY)
    assert counts(first) == [(0, 20, 0, 0, 0, 0, 0)]
    assert sorted(path.name for path in (out / "scores").iterdir()) == ["part-00000.parquet"]
    before = table(out)

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "connect", lambda: pytest.fail("Ray is not needed"))
        again = score(str(archive), network, str(out), NIGHTLY)
    assert (again.images, again.increments) == (0, [])

    fill(archive, pictures[20:23], ["00a.png", "20.png", "21.png"])
    fill(archive, pictures[23:25], ["03.png", "04.png"])
    (archive / "05.png").unlink()
    second = score(str(archive), network, str(out), NIGHTLY)
    assert (second.images, counts(second)) == (5, [(1, 3, 2, 17, 1, 0, 0)])
    expected = {f"{n:02d}.png": 0 for n in range(20) if n != 5}
    expected |= dict.fromkeys(("00a.png", "20.png", "21.png", "03.png", "04.png"), 1)
    assert increments_of(out) == expected
    after = table(out)
    assert all(after[name] == before[name] for name, number in expected.items() if number == 0)
    assert after["03.png"][schema.THETA] != before["03.png"][schema.THETA]
    assert state_by_pandas(out) == expected

    fill(archive, pictures[5:6], ["05.png"])
    assert counts(score(str(archive), network, str(out), NIGHTLY)) == [(2, 1, 0, 22, 0, 0, 0)]
    assert state_by_pandas(out) == increments_of(out) == expected | {"05.png": 2}
    whole = score(str(archive), network, str(out), WHOLE)
    assert (len(whole.increments), whole.images) == (3, 20 + 5 + 1)


@pytest.mark.parametrize("options", [NIGHTLY, WHOLE], ids=["new only", "whole"])
def test_a_run_keeps_its_precision_on_other_machines(
    network: str, pictures: list[Path], tmp_path: Path, options: ScoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:2], ["a.png", "b.png"])
    score(str(archive), network, str(out), options)
    monkeypatch.setattr(cluster, "total", lambda resource: 1.0)  # now there is a GPU
    score(str(archive), network, str(out), options)
    (generation,) = read_ledger(str(out)).generations
    assert generation.settings["precision"] == "float32"


@pytest.mark.parametrize(
    "options", [pytest.param([], id="whole"), pytest.param(["--new-only"], id="new only", marks=pytest.mark.slow)]
)
def test_a_run_that_is_finished_says_so_without_importing_ray(
    network: str, pictures: list[Path], tmp_path: Path, options: list[str]
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:2], ["a.png", "b.png"])
    score(str(archive), network, str(out), ScoreOptions())
    arguments = ["--archive", str(archive), "--checkpoint", network, "--out", str(out), "--export", "csv", *options]
    script = f"""
import sys
from cxr.cli.commands import COMMANDS

job = COMMANDS["score"].load()
print(job.main(job.parse({arguments}).job)["images"], [name for name in sys.modules if name == "ray"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{0 if options else 2} []"


def test_a_run_without_new_only_is_continued_with_it(network: str, pictures: list[Path], tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:3], ["a.png", "b.png", "c.png"])
    score(str(archive), network, str(out), WHOLE)
    fill(archive, pictures[3:4], ["d.png"])
    with pytest.raises(UserError, match=r"earlier state .*1 images are new.*another --out, or use --new-only"):
        score(str(archive), network, str(out), WHOLE)
    assert counts(score(str(archive), network, str(out), NIGHTLY)) == [(1, 1, 0, 3, 0, 0, 0)]
    assert increments_of(out) == {"a.png": 0, "b.png": 0, "c.png": 0, "d.png": 1}


def test_an_interrupted_increment_is_finished_as_planned_and_is_invisible_until_then(
    network: str, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:1], ["first.png"])
    score(str(archive), network, str(out), NIGHTLY)
    fill(archive, pictures[1:41], [f"{n:02d}.png" for n in range(40)])

    stop_after(1, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        score(str(archive), network, str(out), NIGHTLY)
    assert [path.name for path in (out / "unfinished").iterdir()] == ["part-0001-00000.parquet"]
    assert increments_of(out) == {"first.png": 0}

    (archive / "39.png").unlink()  # planned, but not scored
    fill(archive, pictures[41:43], ["00.png", "new.png"])
    todo: list[int] = []

    def noted(parts: list[Any], *rest: Any) -> None:
        todo.extend(part.number for part in parts)
        score_parts(parts, *rest)

    monkeypatch.setattr("cxr.inference.score_parts.score_parts", noted)
    resumed = score(str(archive), network, str(out), NIGHTLY)
    assert todo == [1, 2, 0]
    assert counts(resumed) == [(1, 40, 0, 1, 0, 0, 0), (2, 1, 1, 39, 1, 0, 0)]
    assert not (out / "unfinished").exists()
    expected = {"first.png": 0, "00.png": 2, "new.png": 2} | {f"{n:02d}.png": 1 for n in range(1, 39)}
    assert increments_of(out) == expected
    assert not any(row[schema.ERROR] for row in table(out).values())


def test_the_cluster_is_joined_once_for_each_increment(
    network: str, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    joined: list[str] = []
    monkeypatch.setattr(Job, "connect", lambda job: joined.append(job.out))
    fill(archive, pictures[:1], ["first.png"])
    score(str(archive), network, str(out), NIGHTLY)
    assert len(joined) == 1

    fill(archive, pictures[1:41], [f"{n:02d}.png" for n in range(40)])
    with monkeypatch.context() as patched:
        stop_after(1, patched, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            score(str(archive), network, str(out), NIGHTLY)
    assert len(joined) == 2
    score(str(archive), network, str(out), NIGHTLY)  # continues, and finds nothing new
    assert len(joined) == 3


def test_other_checkpoints_and_options_begin_a_generation(
    network: str, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:4], ["a.png", "b.png", "c.png", "d.png"])
    score(str(archive), network, str(out), NIGHTLY)
    other = saved_aligner(tmp_path / "other", seed=2)
    fill(archive, pictures[4:5], ["e.png"])
    capsys.readouterr()
    assert counts(score(str(archive), other, str(out), NIGHTLY)) == [(1, 5, 0, 0, 0, 0, 0)]
    assert "as a new generation, because settings have changed: checkpoint changed" in capsys.readouterr().out
    assert set(increments_of(out).values()) == {1}
    assert read_run(str(out)).checkpoint_sha256 == checkpoint.load(other).about["sha256"]
    assert state_by_pandas(out) == increments_of(out)
    reasons = [generation.reason for generation in read_ledger(str(out)).generations]
    assert reasons[0] == "first run"
    assert reasons[1].startswith("checkpoint changed: SHA-256 was ")
    assert score(str(archive), other, str(out), NIGHTLY).increments == []
    gated = ScoreOptions(new_only=True, reading=ReadOptions(source="folder", gate="exclude"))
    assert counts(score(str(archive), other, str(out), gated)) == [(2, 5, 0, 0, 0, 0, 0)]
    assert read_ledger(str(out)).generations[2].reason == "gate was None, is now 'exclude'"


def test_dicom_files_are_recognized_wherever_they_are(network: str, tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    for number in range(3):
        write(archive, f"inbox/{number}.dcm", xray(number))
    nightly = ScoreOptions(new_only=True)
    score(str(archive), network, str(out), nightly)
    (archive / "sorted").mkdir()
    shutil.copyfile(archive / "inbox" / "0.dcm", archive / "sorted" / "x.dcm")
    (archive / "inbox" / "0.dcm").unlink()
    write(archive, "inbox/3.dcm", xray(3))
    assert counts(score(str(archive), network, str(out), nightly)) == [(1, 1, 0, 3, 0, 1, 0)]
    rows = table(out)
    assert {image_id: row[schema.INCREMENT] for image_id, row in rows.items()} == {
        "1.2.3.0": 0,
        "1.2.3.1": 0,
        "1.2.3.2": 0,
        "1.2.3.3": 1,
    }
    assert rows["1.2.3.0"][schema.SOURCE_URI] == str(archive / "sorted" / "x.dcm")
    assert score(str(archive), network, str(out), nightly).increments == []


def test_several_archives_are_compared_together(network: str, pictures: list[Path], tmp_path: Path) -> None:
    archives, out = [str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "out"
    fill(tmp_path / "one", pictures[:2], ["a.png", "b.png"])
    fill(tmp_path / "two", pictures[2:4], ["c.png", "d.png"])
    score(archives, network, str(out), NIGHTLY)
    fill(tmp_path / "two", pictures[4:5], ["e.png"])
    (tmp_path / "one" / "a.png").unlink()
    assert counts(score(archives, network, str(out), NIGHTLY)) == [(1, 1, 0, 3, 1, 0, 0)]
    assert increments_of(out) == {"b.png": 0, "c.png": 0, "d.png": 0, "e.png": 1}
    fill(tmp_path / "one", pictures[5:6], ["c.png"])
    with pytest.raises(UserError, match=r"one and .*two, got 1 id in common, for example 'c.png'"):
        score(archives, network, str(out), NIGHTLY)
    with pytest.raises(UserError, match=r"archive was .*use another --out"):
        score(archives[:1], network, str(out), NIGHTLY)


def stop_after(parts: int, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    """Let runs score only so many parts, as if there were no more time, and then raise the error."""

    def some(todo: list[Any], *rest: Any) -> None:
        score_parts(todo[:parts], *rest)
        if error:
            raise error

    monkeypatch.setattr("cxr.inference.score_parts.score_parts", some)


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize("options", [NIGHTLY, WHOLE], ids=["new only", "whole"])
def test_until_leaves_the_rest_for_the_next_run(
    network: str,
    pictures: list[Path],
    tmp_path: Path,
    options: ScoreOptions,
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures, [f"{n:02d}.png" for n in range(60)])
    stop_after(parts, monkeypatch)
    stopped = score(str(archive), network, str(out), replace(options, until="06:00"))
    assert (stopped.images, stopped.remaining) == (parts * 16, 60 - parts * 16)
    assert bool(read_ledger(str(out)).readable) == bool(parts)
    stop_after(1, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        score(str(archive), network, str(out), options)
    if parts:  # what has been committed stays visible
        assert len(table(out)) == stopped.images
        assert f"will score the remaining {stopped.remaining} images" in read_ledger(str(out)).note
    else:
        with pytest.raises(UserError, match="contains no scores: run cxr score"):
            table(out)
    stop_after(99, monkeypatch)
    rest = score(str(archive), network, str(out), options)
    assert rest.images == (stopped.remaining if options.new_only else 60)
    assert (len(table(out)), read_ledger(str(out)).note) == (60, "")


def test_a_part_that_was_written_counts_as_scored_whatever_its_process_said(
    network: str, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:20], [f"{n:02d}.png" for n in range(20)])

    def unheard(todo: list[Any], *rest: Any) -> None:
        score_parts(todo, *rest[:-1], Progress("", 0))  # retried after the deadline, when it was left

    monkeypatch.setattr("cxr.inference.score_parts.score_parts", unheard)
    scored = score(str(archive), network, str(out), replace(NIGHTLY, until="06:00"))
    assert (scored.images, scored.remaining, len(table(out))) == (20, 0, 20)


def test_a_new_generation_is_read_once_it_is_complete(
    network: str, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:40], [f"{n:02d}.png" for n in range(40)])
    score(str(archive), network, str(out), NIGHTLY)
    other = saved_aligner(tmp_path / "other", seed=2)
    stop_after(1, monkeypatch)
    assert score(str(archive), other, str(out), NIGHTLY).remaining == 24
    assert set(increments_of(out).values()) == {0}
    assert state_by_pandas(out) == increments_of(out)
    assert "newer scores with different settings" in read_ledger(str(out)).note
    stop_after(99, monkeypatch)
    score(str(archive), other, str(out), NIGHTLY)
    assert set(increments_of(out).values()) == {1, 2}
    assert state_by_pandas(out) == increments_of(out)
    assert read_ledger(str(out)).note == ""


def test_files_that_could_not_be_read_are_tried_again_and_broken_ones_are_not(
    network: str, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out, read = tmp_path / "archive", tmp_path / "out", storage.read_bytes
    fill(archive, pictures[:3], ["a.png", "b.png", "c.png"])
    (archive / "broken.png").write_bytes(b"?")

    def denied(uri: str, **options: Any) -> bytes:
        if uri.endswith("b.png"):
            raise storage.UnreadableError("no permission") from PermissionError(13, "Permission denied")
        return read(uri, **options)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", denied)
        first = score(str(archive), network, str(out), NIGHTLY)
    assert first.reasons["file not readable: Permission denied"] == 1
    assert (first.rejects, first.increments[0]["unread"]) == (2, 1)
    assert counts(score(str(archive), network, str(out), NIGHTLY)) == [(1, 0, 1, 3, 0, 0, 0)]
    assert {name for name, row in table(out).items() if row[schema.ERROR]} == {"broken.png"}
    assert score(str(archive), network, str(out), NIGHTLY).increments == []


def test_a_run_with_pseudonyms_can_be_moved(network: str, pictures: list[Path], tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("a secret of at least sixteen bytes")
    options = replace(NIGHTLY, pseudonymize=str(tmp_path / "private" / "key"))
    fill(archive, pictures[:3], ["a.png", "b.png", "c.png"])
    score(str(archive), network, str(out), options)
    before = table(out)
    assert not any(".png" in row[schema.SOURCE_URI] for row in before.values())
    shutil.move(out, tmp_path / "moved")
    assert score(str(archive), network, str(tmp_path / "moved"), options).increments == []
    fill(archive, pictures[3:4], ["d.png"])
    assert counts(score(str(archive), network, str(tmp_path / "moved"), options)) == [(1, 1, 0, 3, 0, 0, 0)]
    assert before.items() <= table(tmp_path / "moved").items()


def test_few_broken_images_do_not_fail_a_night_and_many_do(
    network: str, pictures: list[Path], tmp_path: Path
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:3], ["a.png", "b.png", "c.png"])
    score(str(archive), network, str(out), NIGHTLY)
    (archive / "broken.png").write_bytes(b"?")
    assert score(str(archive), network, str(out), NIGHTLY).rejects == 1
    assert table(out)["broken.png"][schema.ERROR]
    for number in range(10):
        (archive / f"{number}.png").write_bytes(b"?")
    with pytest.raises(UserError, match=r"10 of 10 images .100%. could not be read"):
        score(str(archive), network, str(out), NIGHTLY)
    assert score(str(archive), network, str(out), NIGHTLY).increments == []


def test_shards_are_rejected(network: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", {"train": 4, "val": 4})
    with pytest.raises(UserError, match="expected the original archive with --new-only, got the shards"):
        score(shards, network, str(tmp_path / "out"), NIGHTLY)
    with pytest.raises(UserError, match="expected --new-only or --save-embeddings, got both"):
        ScoreOptions(new_only=True, save_embeddings=True)


def test_committed_parts_are_listed_with_their_counts(network: str, pictures: list[Path], tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    fill(archive, pictures[:20], [f"{n:02d}.png" for n in range(20)])
    (archive / "broken.png").write_bytes(b"?")
    score(str(archive), network, str(out), NIGHTLY)
    (increment,) = storage.read_json(str(out / "ledger.json"))["generations"][0]["increments"]
    assert (increment["files"], increment["images"], increment["rejects"]) == (1, 21, 1)
    assert sum(json.loads(json.dumps(increment["reasons"])).values()) == 1


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_night_with_a_hundred_new_ten_changed_and_five_removed_images(
    network: str, pictures: list[Path], tmp_path: Path
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    names = [f"{n:04d}.png" for n in range(1000)]
    fill(archive, (pictures * 17)[:1000], names)
    assert counts(score(str(archive), network, str(out), NIGHTLY)) == [(0, 1000, 0, 0, 0, 0, 0)]
    before = table(out)
    changed, removed = names[100:200:10], names[700:705]
    fill(archive, (pictures * 2)[:100], [f"{n:04d}-new.png" for n in range(100)])
    fill(archive, pictures[-10:], changed)
    for name in removed:
        (archive / name).unlink()
    second = score(str(archive), network, str(out), NIGHTLY)
    assert (second.images, counts(second)) == (110, [(1, 100, 10, 985, 5, 0, 0)])
    after = table(out)
    scored = [f"{n:04d}-new.png" for n in range(100)] + changed
    assert sorted(name for name, row in after.items() if row[schema.INCREMENT] == 1) == sorted(scored)
    kept = set(names) - set(changed) - set(removed)
    assert set(after) == kept | set(scored)
    assert all(after[name] == before[name] for name in kept)
    assert state_by_pandas(out) == increments_of(out)
