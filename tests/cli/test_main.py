"""The program `cxr`: finding commands, help, mistakes, and what it says about itself and about checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cxr
from cxr.cli import completion, main
from cxr.cli.commands import COMMANDS, GROUPS, FamilyCommand
from cxr.cli.commands.info import SCORE_COLUMNS
from cxr.families import RECIPES, checkpoint, recipe_type
from cxr.families.align import AlignRecipe
from cxr.families.presets import PRESETS
from cxr.sources import SOURCES
from tests.conftest import REPOSITORY


def call(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `cxr` in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["cxr", *words])
    try:
        main.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_every_command_has_a_module_and_every_module_a_command() -> None:
    folder = REPOSITORY / "cxr/cli/commands"
    modules = {path.stem for path in folder.glob("[!_]*.py")}
    assert {command.module for command in COMMANDS.values()} == modules
    for command in COMMANDS.values():
        assert command.summary[0].isupper()
        assert command.summary[-1] == "."
        assert (" " in command.name) == (command.name.partition(" ")[0] in GROUPS)


def test_the_first_words_name_the_command() -> None:
    assert main.find(["score", "--archive", "x"]) == (COMMANDS["score"], ["--archive", "x"])
    assert main.find(["train", "align", "--epochs", "3"]) == (COMMANDS["train align"], ["--epochs", "3"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("scroe --archive x", "got `cxr scroe`. Did you mean `cxr score`?"),
        ("train algin", "got `cxr train algin`. Did you mean `cxr train align`?"),
        ("tran align", "got `cxr tran align`. Did you mean `cxr train align`?"),
        ("train_align", "got `cxr train_align`. Did you mean `cxr train align`?"),
        ("train", "expected `cxr train FAMILY` with FAMILY one of aecnn, align"),
        ("train --epochs 3", "got `cxr train`."),
        ("benchmark fussion", "Did you mean `cxr benchmark fusion`?"),
        ("benchmark detection", "expected `cxr benchmark NAME` with NAME one of align, compression"),
        ("study detect", "got `cxr study detect`. Did you mean `cxr study detection`?"),
        ("--nope", "expected a command: phantom, inspect"),
        ("help", "got `cxr help`. Did you mean `cxr --help`?"),
        ("version", "got `cxr version`. Did you mean `cxr --version`?"),
        ("--verison", "got `cxr --verison`. Did you mean `cxr --version`?"),
    ],
)
def test_a_mistyped_command_exits_with_2_and_names_the_nearest(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split(), monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: expected ")
    assert said in errors


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help", monkeypatch=monkeypatch) == 0
    overview = capsys.readouterr().out
    for first in GROUPS:
        assert call(first, "--help", monkeypatch=monkeypatch) == 0
        listed = capsys.readouterr().out
        for name in (name for name in COMMANDS if name.startswith(f"{first} ")):
            assert f"  {name.partition(' ')[2]} " in listed
            assert name.partition(" ")[2] in overview
    for name in (name for name in COMMANDS if " " not in name):
        assert f"  {name} " in overview
    assert call("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"{cxr.__version__}\n"


def test_help_shows_defaults_that_are_values_and_no_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("score", "evaluate", "export dicom"):
        assert call(*command.split(), "--help", monkeypatch=monkeypatch) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "(default: False)" in text
        assert not re.findall(r"\(default: (?:None|'')?\)", text)
        assert "{None}" not in text  # tyro's metavar of an option that may be unset
    assert "Default: one per CPU. --" in text  # not followed by (default: 0)


def test_options_are_those_of_the_family(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS.values():
        if isinstance(command, FamilyCommand):
            loaded = command.load()
            parsed = loaded.parse(["--epochs", "3", "--out", "elsewhere"]).job
            assert parsed.recipe == loaded.options.recipe.replace(epochs=3)
            assert (parsed.out, parsed.data) == ("elsewhere", loaded.options.data)
    assert call("train", "align", "--epohcs", "3", monkeypatch=monkeypatch) == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train classify --members 0", "members: expected 1 or more, got 0"),
        ("train classify --keep-checkpoints 0", "keep-checkpoints: expected 1 or more, got 0"),
        ("train classify --max-failures -1", "max-failures: expected 0 or more, got -1"),
        ("train classify --phantoms -3", "phantoms: expected 1 or more, got -3"),
        ("train classify --stored-size 0", "stored-size: expected 1 or more, got 0"),
        ("train classify --max-rejects 2", "max-rejects: expected a fraction from 0 to 1, got 2"),
        ("tune classify --trials -1", "trials: expected 1 or more, got -1"),
        ("tune classify --grace-period -1", "grace-period: expected 0 or more, got -1"),
        ("tune classify --max-concurrent-trials 0", "max-concurrent-trials: expected 1 or more, got 0"),
        ("score --workers 0", "workers: expected 1 or more, got 0"),
        ("score --batch-size -1", "batch-size: expected 1 or more, got -1"),
        ("score --max-rejects -0.1", "max-rejects: expected a fraction from 0 to 1, got -0.1"),
        ("score --plan --plan-images 0", "plan-images: expected 1 or more, got 0"),
        ("score --plan --plan-gpus -1", "plan-gpus: expected 0 or more, got -1"),
        ("score --plan --images-per-second nan", "images-per-second: expected a positive number, got nan"),
        ("ingest --limit 0", "limit: expected 1 or more, got 0"),
        ("ingest --stored-size -256", "stored-size: expected 1 or more, got -256"),
        ("ingest --max-rejects 5", "max-rejects: expected a fraction from 0 to 1, got 5"),
    ],
)
def test_a_wrong_value_exits_with_2_and_one_line(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split(), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == f"error: --{said}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train detect --architectures yolov5s", "expected --members of 2 or more with --architectures, got 1"),
        ("train detect --sizes 64 96", "expected --members of 2 or more with --sizes, got 1"),
        ("train phantom-lungs --steps 0 --half test", "expected --archive with --half, got none: add it"),
        ("ingest --labels a.csv --select sex==F", "expected --archive with --select, --labels, got none: add it"),
        ("inspect --boxes a.json", "expected --archive with --boxes, got none: add it"),
        ("phantom --out a --preview a/b.jpg", "--preview: expected a file outside --out a, where"),
        ("score --source nih", "expected --archive with --source, got none: add it"),
        ("train align --plan --labels a.csv", "expected --archive with --labels, got none: add it"),
    ],
)
def test_options_that_do_not_go_together_are_mistakes(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split(), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    "words",
    [
        "train align --preset",
        "train align --recipe --epochs 3",
        "train classify --embeddings",
        "study localization --seeds 1 --preset",
    ],
)
def test_a_missing_value_is_a_mistake_on_the_commands_own_line(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option = next(word for word in reversed(words.split()) if word.startswith("--") and word != "--epochs")
    assert call(*words.split(), monkeypatch=monkeypatch) == 2
    assert f"Missing value for argument '{option}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("info --checkpoint none --json", "contains no checkpoint.json"),
        ("score --plan --archive none --json", "none does not exist"),
        ("score --until then --json", "error: --until: expected a time"),
        ("score --nope 3 --json", "error: Unrecognized options: --nope, 3 For full"),
        ("score --out a --out b --json", "expected one --out, got 2"),
        ("submit --json -- scroe", "Did you mean `cxr score`?"),
        ("scroe --json", "Did you mean `cxr score`?"),
    ],
)
def test_with_json_every_mistake_is_an_event(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split(), monkeypatch=monkeypatch) == 2
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["exit_code"]) == ("error", 2)
    assert said in event["text"]


def test_help_fills_the_lines_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    call("train", "classify", "--help", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert (
        "become an ensemble in a single checkpoint. Each has its own seed" in shown
    )  # an option of the job, with a line break there
    assert "them; attention: a linear layer" in shown  # and one of the recipe


@pytest.mark.parametrize("words", ["--help", "score --help", "info"])
def test_a_reader_that_stops_early_causes_no_traceback(words: str) -> None:
    command = [sys.executable, "-m", "cxr.cli.main", *words.split()]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(100) == 1


def test_a_script_runs_its_command(tmp_path: Path) -> None:
    out = tmp_path / "phantom"
    for program in (["jobs/make_phantom.py"], ["-m", "cxr.cli.main", "phantom"]):
        command = [sys.executable, *program, "--count", "1", "--size", "64", "--out", str(out)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(out / "result.json")), done.stderr
        assert json.loads((out / "result.json").read_text())["job"] == "phantom"


def test_info_lists_families_sources_and_presets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("info", "--json", monkeypatch=monkeypatch) == 0
    info = json.loads(capsys.readouterr().out)
    assert {family: set(about["presets"]) for family, about in info["families"].items()} == {
        family: set(PRESETS[family]) for family in RECIPES
    }
    assert info["sources"] == [source.name for source in SOURCES]
    assert call("info", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*RECIPES, *info["sources"], "--preset demo"))


def test_info_knows_the_scores_of_every_family() -> None:
    assert {name: tuple(columns) for name, columns in SCORE_COLUMNS.items()} == {
        family: tuple(recipe_type(family).score_columns.names) for family in RECIPES
    }


def test_info_says_what_a_checkpoint_needs_and_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
    task = recipe.task(recipe.network(()))
    checkpoint.save(tmp_path, recipe, task, task.network.state_dict(), findings=(), metrics={"loss": 0.25})
    assert call("info", "--checkpoint", str(tmp_path), "--json", monkeypatch=monkeypatch) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["family"], info["metrics"]) == ("align", {"loss": 0.25})
    assert info["needs"] == {**recipe.input_contract.to_dict(), "lung_crop": False, "aligned": False}
    assert info["gives"]["columns"] == ["theta"]
    assert call("info", "--checkpoint", str(tmp_path), monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert "family align" in text
    assert "loss: 0.25" in text
    assert call("info", "--checkpoint", str(tmp_path / "none"), monkeypatch=monkeypatch) == 2
    assert "contains no checkpoint.json" in capsys.readouterr().err


def test_a_command_to_submit_without_its_separator_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("submit", "train", "align", "--workers", "2", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.endswith(
        "The command to run follows after --, as in `cxr submit -- score --help`.\n"
    )


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        ("--tyro-print-completion foo", "--tyro-print-completion SHELL"),
        ("--tyro-print-completion", "--tyro-print-completion SHELL"),
        ("--tyro_print_completion bash x", "--tyro-print-completion SHELL"),
        ("--tyro-write-completion bash", "--tyro-write-completion SHELL FILE"),
    ],
)
def test_mistakes_in_options_of_completion_show_their_usage(
    words: str, usage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split(), monkeypatch=monkeypatch) == 2
    said = f"error: expected `cxr {usage}` with SHELL one of bash, zsh, tcsh, fish, got `cxr "
    assert capsys.readouterr().err.startswith(said)


def test_completion_knows_commands_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = {name: COMMANDS[name] for name in ("score", "report", "export kaggle-siim", "export kaggle-vinbigdata")}
    monkeypatch.setattr(completion, "COMMANDS", few)  # those that import no torch
    monkeypatch.setattr(completion, "GROUPS", {"export": GROUPS["export"]})
    script = tmp_path / "completions" / "cxr.bash"
    assert call("--tyro-write-completion", "bash", str(script), monkeypatch=monkeypatch) == 0
    ask = 'source "$1"; COMP_WORDS=("${@:2}"); COMP_CWORD=$(($# - 2)); _tyro_cxr; echo "${COMPREPLY[@]}"'

    def completed(*words: str) -> list[str]:
        command = ["bash", "-c", ask, "bash", str(script), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()

    assert completed("cxr", "sc") == ["score"]
    assert completed("cxr", "export", "kaggle-s") == ["kaggle-siim"]
    assert "--checkpoint" in completed("cxr", "score", "--ch")
