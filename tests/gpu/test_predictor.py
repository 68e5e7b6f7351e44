"""`cxr.load` on a GPU gives the predictions of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cxr
from cxr import schema
from cxr.families import RECIPES, checkpoint
from cxr.families.capabilities import HeatMaps
from cxr.inference.options import Precision
from tests.families.test_recipes import SMALL
from tests.odd_files import radiograph

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", sorted(RECIPES))
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.005), ("bfloat16", 0.05)])
def test_predictions_on_the_gpu_are_close_to_those_on_the_cpu(
    family: str, precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = SMALL[family]
    torch.manual_seed(0)
    network = recipe.network(schema.FINDINGS)
    checkpoint.save(
        tmp_path, recipe, recipe.task(network), network.state_dict(), findings=schema.FINDINGS, metrics={}
    )
    images = [radiograph(), b"not an image", radiograph(seed=1)]
    expected, model = cxr.load(tmp_path, device="cpu").predict(images), cxr.load(tmp_path, precision=precision)
    assert "cuda" in repr(model)
    scores = model.predict(images)
    assert scores.schema.equals(expected.schema)
    assert scores[schema.ERROR].to_pylist() == expected[schema.ERROR].to_pylist()
    for name in {schema.PROBABILITIES, schema.THETA} & {*scores.column_names}:
        for row in (0, 2):
            np.testing.assert_allclose(scores[name][row].as_py(), expected[name][row].as_py(), atol=tolerance)
    if isinstance(recipe, HeatMaps):
        assert next(model.explain(images)).maps.max() > 0
    model.show(images)
