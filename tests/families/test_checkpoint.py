"""A checkpoint folder: everything scoring needs, verified, without pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cxr import schema, storage
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files
from cxr.families.align import AlignRecipe
from cxr.models.input_contract import InputContract

RECIPE = AlignRecipe(size=32, backbone="conv3", lungs=False, parameterization="affine")


def save(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    network = RECIPE.network(schema.FINDINGS)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    task = RECIPE.task(network)
    task.target += 0.25
    checkpoint.save(
        folder, RECIPE, task, network.state_dict(), findings=schema.FINDINGS, metrics={"correlation": 0.5}
    )
    return network.eval()


def test_load_restores_network_recipe_and_target(tmp_path: Path) -> None:
    network = save(tmp_path)
    loaded = checkpoint.load(str(tmp_path))
    x = torch.rand(3, 1, 32, 32)
    assert torch.equal(loaded.network(x), network(x))
    assert loaded.recipe == RECIPE
    assert loaded.findings == schema.FINDINGS
    assert loaded.about["metrics"] == {"correlation": 0.5}
    assert torch.equal(loaded.task().target, RECIPE.task(network).target + 0.25)


def test_a_copy_for_scoring_loads(tmp_path: Path) -> None:
    save(tmp_path / "from")
    (tmp_path / "from" / checkpoint_files.RESUME).write_bytes(b"large")
    copy = checkpoint_files.copy_for_scoring(str(tmp_path / "from"), str(tmp_path / "to"))
    assert checkpoint.load(copy).recipe == RECIPE
    assert not (tmp_path / "to" / checkpoint_files.RESUME).exists()


def test_damaged_weights_are_detected(tmp_path: Path) -> None:
    save(tmp_path)
    with (tmp_path / checkpoint_files.WEIGHTS).open("r+b") as file:
        file.seek(2000)
        file.write(b"\0\1\2\3")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(str(tmp_path))


def test_other_folders_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no checkpoint\.json"):
        checkpoint.load(str(tmp_path))
    storage.write_json(str(tmp_path / checkpoint_files.ABOUT), {"kind": "other", "version": 7})
    with pytest.raises(UserError, match="'other' version 7"):
        checkpoint.load(str(tmp_path))
    storage.write_json(str(tmp_path / checkpoint_files.ABOUT), [])
    with pytest.raises(UserError, match="expected a JSON object, got a list"):
        checkpoint.load(str(tmp_path))


def test_a_checkpoint_records_its_input_and_is_not_loaded_with_another(tmp_path: Path) -> None:
    save(tmp_path)
    about = storage.read_json(str(tmp_path / checkpoint_files.ABOUT))
    assert InputContract.from_dict(about["input"]) == RECIPE.input_contract
    about["input"]["range"] = [-1024, 1024]
    storage.write_json(str(tmp_path / checkpoint_files.ABOUT), about)
    with pytest.raises(UserError, match=r"weights for other inputs .*range: \[0\.0, 1\.0\] and \[-1024, 1024\]"):
        checkpoint.load(str(tmp_path))
