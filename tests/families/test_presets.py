"""Presets, and recipes read from files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cxr.cli.commands import COMMANDS
from cxr.cli.options import ArchiveOptions
from cxr.errors import UserError
from cxr.families import RECIPES, checkpoint, recipe_type
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.presets import PRESETS, find_preset, preset, read_recipe
from cxr.training.options import RunOptions

NAMED = [(family, name) for family, presets in PRESETS.items() for name in presets]


@pytest.mark.parametrize(("family", "name"), NAMED)
def test_every_preset_makes_a_valid_recipe(family: str, name: str) -> None:
    chosen = find_preset(family, name)
    recipe = preset(recipe_type(family), name)
    assert {setting: getattr(recipe, setting) for setting in chosen.settings} == chosen.settings
    assert ArchiveOptions(**chosen.archive).stored_size >= recipe.size
    RunOptions(**chosen.run)
    assert chosen.description[0].isupper()
    assert chosen.description[-1] == "."


def test_every_family_has_presets_a_job_that_trains_and_one_that_searches() -> None:
    assert set(PRESETS) == set(RECIPES)
    for family in RECIPES:
        for kind in ("train", "tune"):
            options = COMMANDS[f"{kind} {family}"].load().options
            assert options.recipe.family == family
            assert options.recipe.search_space()
            assert options.out == f"runs/{kind}_{family}"


def test_explicit_options_override_a_preset() -> None:
    train_aecnn = COMMANDS["train aecnn"].load()
    options = train_aecnn.parse(["--preset", "published", "--epochs", "3"]).job
    assert options.recipe == preset(AecnnRecipe, "published").replace(epochs=3)
    assert (options.preset, options.data.stored_size, options.data.phantoms) == ("published", 1024, 1200)
    assert train_aecnn.parse(["--preset=published", "--stored-size", "2048"]).job.data.stored_size == 2048
    assert COMMANDS["train pneumothorax"].load().parse(["--preset", "siim"]).job.recipe.architecture == "unet"
    assert train_aecnn.parse([]).job.recipe == AecnnRecipe()


def test_help_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMANDS["tune align"].load().parse(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name, described in PRESETS["align"].items():
        assert re.search(rf"^ +{name} +{re.escape(described.description)}$", said, re.MULTILINE)


def test_help_says_in_what_a_preset_differs_from_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS["train aecnn"].load().parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    published = find_preset("aecnn", "published")
    assert published.protocol in said
    assert all(f"- {difference}" in said for difference in published.differences)


def test_a_recipe_is_read_from_yaml_json_a_result_and_a_checkpoint(tmp_path: Path) -> None:
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False, lr=1e-5)
    (tmp_path / "recipe.yaml").write_text("family: align\nsize: 32\nbackbone: conv3\nlungs: false\nlr: 1e-5\n")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    (tmp_path / "result.json").write_text(json.dumps({"recipe": recipe.to_dict(), "metrics": {}}))
    task = recipe.task(recipe.network(()))
    checkpoint.save(tmp_path / "checkpoint", recipe, task, task.network.state_dict(), findings=(), metrics={})
    for name in ("recipe.yaml", "recipe.json", "result.json", "checkpoint"):
        assert read_recipe(AlignRecipe, str(tmp_path / name)) == recipe
        options = COMMANDS["train align"].load().parse(["--recipe", str(tmp_path / name), "--size", "64"]).job
        assert options.recipe == recipe.replace(size=64)
        assert options.recipe_file == str(tmp_path / name)


def test_errors_of_recipe_files_name_the_mistake(tmp_path: Path) -> None:
    wrong = {
        "[1, 2]": "expected settings by name, a result.json or a checkpoint",
        "{a: [": "expected JSON or YAML",
        "sizes: 3": "family align has no setting sizes",
        "family: aecnn": "got one of 'aecnn'",
        "lr: fast": "a setting has a value of the wrong type",
        "size: 0": "size",
    }
    for number, (text, said) in enumerate(wrong.items()):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            read_recipe(AlignRecipe, str(file))
    with pytest.raises(UserError, match="gone"):
        read_recipe(AlignRecipe, str(tmp_path / "gone.yaml"))
    with pytest.raises(UserError, match=r"contains no checkpoint\.json: use the folder of a checkpoint"):
        read_recipe(AlignRecipe, str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "best"], "--preset: expected one of demo, fast, published for family align, got best"),
        (["--preset", "demo", "--recipe", "x"], "use one of them"),
        (["--recipe", "/gone.yaml"], "/gone.yaml"),
    ],
)
def test_a_wrong_starting_point_ends_a_job_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMANDS["train align"].run(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
