"""Output of a job as text, as JSON and with --quiet, and the lines that go to its log instead."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cxr.runtime import console
from cxr.runtime.console import MARK, Console
from tests.conftest import REPOSITORY


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A job's console that shows text; its log is in memory."""
    shown = Console("text")
    shown._log = io.BytesIO()
    monkeypatch.setattr(console, "_console", shown)
    return shown


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_text_is_shown_and_machine_readable_events_are_not(job: Console, capsys: pytest.CaptureFixture[str]) -> None:
    console.say("two images")
    console.note("one is damaged")
    console.event("epoch", "train 1/2", shown=False, epoch=1)
    job.show_result("/out/result.json", {"metrics": {}})
    console.say("a line that comes late")
    assert capsys.readouterr().out.splitlines() == ["two images", "note: one is damaged", "/out/result.json"]


def test_json_is_one_object_per_line_and_has_no_nan(job: Console, capsys: pytest.CaptureFixture[str]) -> None:
    job.form = "json"
    console.event("epoch", "train 1/2", shown=False, epoch=1, auroc=float("nan"))
    job.show_result("/out/result.json", {"metrics": {"auroc": 0.5}})
    epoch, result = events(capsys.readouterr().out)
    assert epoch == {"event": "epoch", "text": "train 1/2", "epoch": 1, "auroc": None}
    assert result == {"event": "result", "path": "/out/result.json", "metrics": {"auroc": 0.5}}


def test_a_failed_job_ends_with_an_error_event(job: Console, capsys: pytest.CaptureFixture[str]) -> None:
    job.form = "json"
    job.show_error("error: there is no bucket 'x'", 2)
    captured = capsys.readouterr()
    assert events(captured.out) == [{"event": "error", "text": "error: there is no bucket 'x'", "exit_code": 2}]
    assert captured.err == "error: there is no bucket 'x'\n"


def test_quiet_shows_the_result_or_the_error_alone(job: Console, capsys: pytest.CaptureFixture[str]) -> None:
    job.form = "quiet"
    console.note("one is damaged")
    job.show_result("/out/result.json", {})
    assert capsys.readouterr().out == "/out/result.json\n"
    job.show_error("error: no", 2)
    assert capsys.readouterr().err == "error: no\n"


def test_lines_that_are_printed_become_events_of_a_job_that_speaks_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_console", Console())
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    console.start("json", "")
    print("a table\n\nof", "two lines")
    assert [record["text"] for record in events(capsys.readouterr().out)] == ["a table", "of two lines"]


def test_our_lines_of_a_worker_are_shown_and_the_others_logged(
    job: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"event": "note", "text": "note: 3 images are damaged", "shown": True}
    hidden = {"event": "epoch", "text": "train 1/2", "shown": False}
    lines = [
        f"\x1b[36m{MARK}{json.dumps(record)}\x1b[0m",
        "core_worker.cc: Actor a5ac098e",
        MARK + json.dumps(hidden),
    ]
    console.show_worker_lines({"lines": lines, "pid": 7, "ip": "127.0.0.1", "actor_name": "Scorer"})
    console.show_worker_lines({"lines": ["WARNING: 8 PYTHON worker processes"], "pid": "raylet"})
    assert capsys.readouterr().out == "note: 3 images are damaged\n"
    assert isinstance(job._log, io.BytesIO)
    assert job._log.getvalue().decode().splitlines() == [
        "(Scorer 7 on 127.0.0.1) core_worker.cc: Actor a5ac098e",
        "(process raylet on this cluster) WARNING: 8 PYTHON worker processes",
    ]


def test_output_of_libraries_can_be_hidden(job: Console, capsys: pytest.CaptureFixture[str]) -> None:
    with job.hidden_stdout():
        print("a box")
        console.say("a trial is done")
    print("a table")
    assert capsys.readouterr().out == "a trial is done\na table\n"
    assert isinstance(job._log, io.BytesIO)
    assert job._log.getvalue() == b"a box\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_live_line_that_text_replaces(job: Console, capsys: pytest.CaptureFixture[str]) -> None:
    assert not job.show_live_line("ingest", 1, 10, "images"), "there is no terminal"
    job._errors = terminal = Terminal()
    assert job.show_live_line("ingest", 1, 10, "images")
    assert job.show_live_line("ingest", 5, 10, "images", rejects=2)
    console.say("half of it")
    assert "ingest" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    assert capsys.readouterr().out == "half of it\n"
    job.form = "json"
    assert not job.show_live_line("ingest", 6, 10, "images")


DIVERTED = """
import os, sys, warnings
from cxr.runtime import console
shown = console.start("text", sys.argv[1])
shown.divert_ray()
os.write(2, b"[E core_worker.cc:2465] Actor a5ac098e\\n")
warnings.warn("a warning that nobody can act on")
os.system("echo of a child process >&2")
shown.write_error_now("interrupted\\n")
console.say("ours")
raise RuntimeError("a bug")
"""


def test_ray_writes_to_a_log_that_is_named_and_errors_reach_the_terminal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", DIVERTED, str(out)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"Ray's own messages are in {out / console.LOG}", "ours"]
    interrupted, *traceback = done.stderr.splitlines()
    assert interrupted == "interrupted"
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "RuntimeError: a bug"
    log = (out / console.LOG).read_text()
    for text in ("core_worker.cc", "a warning that nobody can act on", "of a child process"):
        assert text in log
        assert text not in done.stderr


def test_results_in_a_bucket_have_their_log_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Console("text", "s3://xrays/out")._log_path().parent == tmp_path
    assert Console("text", str(tmp_path / "out"))._log_path() == tmp_path / "out" / console.LOG


JOB = """
from dataclasses import dataclass
from cxr.errors import UserError
from cxr.runtime.job import run_job

@dataclass(frozen=True)
class Options:
    out: str
    fail: bool = False

def main(options):
    print("note: one image is damaged")
    if options.fail:
        raise UserError("expected an archive: use one")
    return {"metrics": {"auroc": 0.5}}

run_job(main, Options)
"""


@pytest.mark.parametrize("fail", [False, True])
def test_a_jobs_command_line_chooses_what_it_prints(fail: bool, tmp_path: Path) -> None:
    def run(*options: str) -> tuple[int, str, str]:
        command = [sys.executable, "-c", JOB, "--out", str(tmp_path), *options, *["--fail"] * fail]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("--json")
    noted, ended = events(out)
    assert noted == {"event": "note", "text": "note: one image is damaged"}
    if fail:
        assert (code, err) == (2, "error: expected an archive: use one\n")
        assert ended == {"event": "error", "text": err.strip(), "exit_code": 2}
        assert run("--quiet") == (2, "", err)
    else:
        path = str(tmp_path / "result.json")
        assert (code, err) == (0, "")
        assert (ended["event"], ended["path"], ended["metrics"]) == ("result", path, {"auroc": 0.5})
        assert run("--quiet") == (0, f"{path}\n", "")
        code, out, err = run("--quiet", "--json")
        assert (code, err) == (2, "error: expected --quiet or --json, got both: use one of them\n")
        assert events(out) == [{"event": "error", "text": err.strip(), "exit_code": 2}]
