"""`--preset published` of the studies: the paper's settings, not those of the small study on phantoms."""

from __future__ import annotations

import pytest

from cxr.cli.main import COMMANDS

STUDIES = ("aecnn", "alignment", "detection", "localization", "pneumothorax")


@pytest.mark.parametrize("study", STUDIES)
def test_a_preset_starts_from_the_familys_defaults(study: str) -> None:
    job = COMMANDS[f"study {study}"].load()
    small, published = job.parse([]).job, job.parse(["--preset", "published"]).job
    preset = published.PRESETS["published"]
    assert published.recipe == type(small.recipe)(**preset.settings)
    assert published.recipe.size > small.recipe.size
    assert published.data.stored_size == preset.archive["stored_size"]
    assert all(getattr(published, name) == value for name, value in preset.study.items())


@pytest.mark.parametrize("study", STUDIES)
def test_help_says_what_a_preset_takes_and_in_what_it_differs(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS[f"study {study}"].load().parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    preset = COMMANDS[f"study {study}"].load().parse([]).job.PRESETS["published"]
    assert "Not run in full: about" in shown
    assert "GPU hours" in shown
    assert all(difference in shown for difference in preset.differences)
