"""The tutorials run from the first cell to the last, and so do the examples on the page about Python."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from cxr import schema
from cxr.families import checkpoint
from cxr.families.classify import ClassifyRecipe
from tests.odd_files import dataset, dicom, encoded, radiograph

REPOSITORY = Path(__file__).parents[1]
TUTORIALS = sorted((REPOSITORY / "docs" / "tutorials").glob("*.py"))


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run(
    tutorial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tutorial))
    said = capsys.readouterr().out
    assert float(re.findall(r"Dice (\S+)", said)[-1]) > 0.85
    assert re.search(r"image 0: the lungs cover \d+% of the image", said)


def test_the_examples_in_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ClassifyRecipe(size=32, epochs=1)
    network = recipe.network(schema.FINDINGS)
    folder = tmp_path / "runs" / "classify" / "checkpoint"
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=schema.FINDINGS, metrics={})
    (tmp_path / "xray.dcm").write_bytes(dicom(dataset(radiograph(12), BitsStored=12, HighBit=11)))
    (tmp_path / "archive").mkdir()
    for name in "abc":
        (tmp_path / "archive" / f"{name}.png").write_bytes(encoded(radiograph()))
    page = REPOSITORY / "docs" / "how-to" / "python.md"
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)
    assert names["findings"].shape == (1, len(schema.FINDINGS))
    assert names["scores"].num_rows == 3
    assert names["cardiomegaly"].shape == radiograph().shape
    assert names["vectors"].shape[0] == 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000
