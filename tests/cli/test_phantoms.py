"""Phantoms for jobs without an archive: generated once, and with the settings of the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr.cli import phantoms
from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import phantom_archive, phantoms_with_boxes, siim_phantoms, some_phantoms
from cxr.errors import UserError


def test_phantoms_are_generated_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path)
    uri = phantom_archive(out, 3, 64)
    assert phantom_archive(out, 3, 64) == uri
    assert capsys.readouterr().out.count("generating 3 phantom X-rays") == 1
    assert len([*(tmp_path / "phantoms" / "images").iterdir()]) == 3


def test_other_settings_are_refused(tmp_path: Path) -> None:
    out = str(tmp_path)
    phantoms_with_boxes(ArchiveOptions(phantoms=3), out)
    with pytest.raises(UserError, match=r"phantoms with other settings \(count was 3, is 4; pose was 1.0, is 2\)"):
        phantoms_with_boxes(ArchiveOptions(phantoms=4), out, pose=2)


def test_an_interrupted_generation_is_repeated_with_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path)

    def interrupted(*_: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="expected a count of 1 or more, got 0"):
        phantom_archive(out, 0, 64)
    with monkeypatch.context() as patch:
        patch.setattr(phantoms, "write_phantom", interrupted)
        with pytest.raises(KeyboardInterrupt):
            phantom_archive(out, 4, 64)
    with pytest.raises(UserError, match="count was 4, is 3"):
        phantom_archive(out, 3, 64)
    assert len([*(Path(phantom_archive(out, 4, 64)) / "images").iterdir()]) == 4


def test_commands_without_options_for_phantoms_take_what_there_is(tmp_path: Path) -> None:
    uri = phantom_archive(str(tmp_path), 3, 64)
    assert some_phantoms(str(tmp_path)) == some_phantoms(str(tmp_path), 60) == uri
    (tmp_path / "phantoms.json").unlink()
    assert phantom_archive(str(tmp_path), 5, 64) == uri, "made before settings were stored"


def test_phantoms_of_siim_are_generated_once(tmp_path: Path) -> None:
    first = siim_phantoms(ArchiveOptions(phantoms=3), str(tmp_path))
    assert siim_phantoms(ArchiveOptions(phantoms=3), str(tmp_path)) == first
    with pytest.raises(UserError, match="count was 3, is 4"):
        siim_phantoms(ArchiveOptions(phantoms=4), str(tmp_path))


def test_a_given_archive_is_kept(tmp_path: Path) -> None:
    given = ArchiveOptions(archive=("/data",))
    assert phantoms_with_boxes(given, str(tmp_path)) is siim_phantoms(given, str(tmp_path)) is given
    assert not [*tmp_path.iterdir()]
