"""What a study compares: one set of settings, and an archive for all recipes or one for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.training.options import RunOptions
from cxr.training.sweep import RUN_CPU, _check_same, _resources

BASE = AlignRecipe()


def test_each_recipe_may_have_an_archive_of_its_own(tmp_path: Path) -> None:
    out = str(tmp_path)
    _check_same({"a": BASE, "b": BASE}, {"a": "/data", "b": "/cropped"}, out)
    _check_same({"a": BASE}, "/data", out)
    with pytest.raises(UserError, match="b: archive was /cropped, is /data"):
        _check_same({"a": BASE, "b": BASE}, "/data", out)
    _check_same({"c": BASE}, "/other", out)


def test_one_worker_trains_in_the_process_of_its_run() -> None:
    one, two = (_resources(RunOptions(device="cpu", workers=workers)) for workers in ("1", "2"))
    assert one == {"num_cpus": RunOptions().resources_per_worker["CPU"], "num_gpus": 0}
    assert two == {"num_cpus": RUN_CPU}
