"""What a study compares: one set of settings, and an archive for all recipes or one for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.training.sweep import _check_same

BASE = AlignRecipe()


def test_each_recipe_may_have_an_archive_of_its_own(tmp_path: Path) -> None:
    out = str(tmp_path)
    _check_same({"a": BASE, "b": BASE}, {"a": "/data", "b": "/cropped"}, out)
    _check_same({"a": BASE}, "/data", out)
    with pytest.raises(UserError, match="b: archive was /cropped, is /data"):
        _check_same({"a": BASE, "b": BASE}, "/data", out)
    _check_same({"c": BASE}, "/other", out)
