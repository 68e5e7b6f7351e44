"""Phantoms for jobs without an archive: generated once, and with the settings of the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import phantom_archive, phantoms_with_boxes, siim_phantoms
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


def test_a_given_archive_is_kept(tmp_path: Path) -> None:
    given = ArchiveOptions(archive=("/data",))
    assert phantoms_with_boxes(given, str(tmp_path)) is siim_phantoms(given, str(tmp_path)) is given
    assert not [*tmp_path.iterdir()]
