"""No file that is given to cxr makes it run code: pickles are refused wherever tensors are read."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import cxr
from cxr.errors import UserError
from cxr.families import checkpoint_files, recipe_from_dict
from cxr.families.align import read_target
from cxr.families.classify import ClassifyRecipe
from cxr.inference import panel
from cxr.models import pretrained, weight_files
from cxr.training.worker import Worker
from tests.conftest import REPOSITORY
from tests.saved_checkpoint import save_untrained


class Attack:
    """Writes a file when it is unpickled as usual."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def resume(uri: str) -> None:
    """Read resume.pt of the checkpoint at `uri` as a worker does that continues a training."""
    folder = Path(uri).parent
    previous: Any = SimpleNamespace(as_directory=lambda: _Folder(folder))
    about = checkpoint_files.read_about(str(folder))
    worker: Any = SimpleNamespace(recipe=recipe_from_dict(about["recipe"]), config={"findings": about["findings"]})
    Worker._resume_state(worker, previous)


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        return str(self.path)

    def __exit__(self, *_: object) -> None:
        pass


READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "weights of any network": ("weights.pt", weight_files.read),
    "weights of a model hub": ("pytorch_model.bin", lambda uri: weight_files.read(str(Path(uri).parent))),
    "weights with current names": ("weights.pth", pretrained.from_uri),
    "a target": ("target.pt", read_target),
    "a state to resume from": ("resume.pt", resume),
    "the weights of a checkpoint": ("weights.safetensors", lambda uri: cxr.load(str(Path(uri).parent))),
}


@pytest.mark.parametrize("what", READERS)
def test_pickles_are_refused_and_not_run(what: str, tmp_path: Path) -> None:
    name, read = READERS[what]
    if name in ("resume.pt", "weights.safetensors"):
        save_untrained(tmp_path, ClassifyRecipe(size=32))
    attack = Attack(tmp_path / "executed")
    torch.save({"layer.weight": torch.zeros(2), "more": attack}, tmp_path / name)
    with pytest.raises(UserError, match=r"Python objects|cannot be read|SHA-256"):
        read(str(tmp_path / name))
    assert not attack.mark.exists()
    shutil.copy(tmp_path / name, tmp_path / "trusted.pt")
    torch.load(tmp_path / "trusted.pt", weights_only=False)
    assert attack.mark.exists(), "the attack works where it is let in"


def test_no_code_reads_pickles_in_another_way() -> None:
    """`torch.load` without weights_only, `pickle.load`, `numpy.load` with pickles, and YAML with Python objects."""
    found = []
    for path in sorted((REPOSITORY / "cxr").rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if re.search(r"\bload|pickle", text) else ():
            if isinstance(node, ast.Call) and _opens_pickles(node):
                found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    (trusted,) = found  # in a process of its own, with an unpickler that knows a few harmless names: note 0007
    assert trusted.startswith("cxr/models/pickled_modules.py:")
    assert issubclass(panel._UniqueKeyLoader, yaml.SafeLoader)


def _opens_pickles(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    return (
        (name == "torch.load" and options.get("weights_only") != "True")
        or name in ("pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle", "yaml.unsafe_load")
        or (name == "yaml.load" and ast.unparse(call.args[1]) != panel._UniqueKeyLoader.__name__)
        or (name in ("np.load", "numpy.load") and options.get("allow_pickle") not in (None, "False"))
    )
