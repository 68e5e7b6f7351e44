"""The tutorials run from the first cell to the last."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.py"))


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run(
    tutorial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tutorial))
    said = capsys.readouterr().out
    assert float(re.findall(r"Dice (\S+)", said)[-1]) > 0.85
    assert re.search(r"image 0: the lungs cover \d+% of the image", said)
