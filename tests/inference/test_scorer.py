"""The scorer itself: batches that do not fit into memory, precision, compiled networks."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.families.classify import ClassifyRecipe
from cxr.families.ensemble import EnsembleRecipe
from cxr.inference.options import resolved
from cxr.inference.plan import plan_scoring
from cxr.inference.scorer import Scorer, with_tta_flip
from cxr.schema import PixelFormat
from cxr.sources.options import ALL_IMAGES
from tests.made_shards import write_shards
from tests.saved_checkpoint import save_untrained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pa.Table, PixelFormat]:
    """A checkpoint of family classify, and rows that it can score."""
    folder = tmp_path_factory.mktemp("scorer")
    base = save_untrained(folder / "checkpoint", ClassifyRecipe(size=32))
    plan = plan_scoring(write_shards(folder / "shards", {"train": 11}), {"": checkpoint.load(base)}, ALL_IMAGES)
    return base, plan.reader("off").rows(plan.parts[0].rows), plan.formats[0].pixels


def scored(scorer: Scorer, rows: pa.Table, pixels: PixelFormat) -> tuple[list[int], list[list[float]]]:
    """Sizes of the batches, and all probabilities."""
    batches = list(scorer.batches(rows, pixels))
    sizes = [batch.rows.num_rows for batch in batches]
    return sizes, [row for batch in batches for row in batch.scores[schema.PROBABILITIES].to_pylist()]


def limit_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Predictions for more than `images` images run out of memory."""
    predict = ClassifyRecipe.predict

    def limited(self: ClassifyRecipe, network: Any, batch: Batch) -> dict[str, torch.Tensor]:
        if len(batch[schema.PIXELS]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, network, batch)

    monkeypatch.setattr(ClassifyRecipe, "predict", limited)


def test_batches_are_halved_when_memory_is_short_and_stay_so(
    made: tuple[str, pa.Table, PixelFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows, pixels = made
    _, expected = scored(Scorer(checkpoint.load(base), CPU, 8), rows, pixels)
    limit_memory(monkeypatch, 3)
    notes: list[str] = []
    scorer = Scorer(checkpoint.load(base), CPU, 8, note=notes.append)
    sizes, probabilities = scored(scorer, rows, pixels)
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert [value for row in probabilities for value in row] == pytest.approx(
        [value for row in expected for value in row], abs=1e-5
    )
    assert scored(scorer, rows, pixels)[0] == sizes
    assert [note.split(": ")[1] for note in notes] == ["scoring 4 at a time", "scoring 2 at a time"]


def test_a_device_too_small_for_one_image_is_reported(
    made: tuple[str, pa.Table, PixelFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows, pixels = made
    limit_memory(monkeypatch, 0)
    with pytest.raises(UserError, match="too little memory for one image of 32 px"):
        scored(Scorer(checkpoint.load(base), CPU, 8), rows, pixels)


def test_precision_depends_on_the_device_unless_it_is_given() -> None:
    assert (resolved("auto", "cuda"), resolved("auto", "cpu")) == ("bfloat16", "float32")
    assert (resolved("float32", "cuda"), resolved("bfloat16", "cpu")) == ("float32", "bfloat16")


def test_a_compiled_network_gives_the_same_scores(
    made: tuple[str, pa.Table, PixelFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows, pixels = made
    calls: list[int] = []

    def eager(graph: torch.fx.GraphModule, _: object) -> Any:
        calls.append(len(graph.graph.nodes))
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend=eager))
    expected = scored(Scorer(checkpoint.load(base), CPU, 11), rows, pixels)
    assert scored(Scorer(checkpoint.load(base), CPU, 11, compiled=True), rows, pixels) == expected
    assert max(calls) > 20  # the whole network, not only its last layers


def test_predictions_are_averaged_over_mirror_images_on_request(made: tuple[str, pa.Table, PixelFormat]) -> None:
    base, rows, pixels = made
    both = with_tta_flip(checkpoint.load(base), "on")
    images = schema.pixels_array(rows[schema.PIXELS], pixels)
    single = Scorer(checkpoint.load(base), CPU, 11)
    views = [{schema.PIXELS: torch.tensor(view)} for view in (images, images[:, :, ::-1].copy())]
    expected = sum(single.predict(view)[schema.PROBABILITIES] for view in views) / 2
    torch.testing.assert_close(
        torch.tensor(scored(Scorer(both, CPU, 11), rows, pixels)[1]), expected, atol=1e-4, rtol=0
    )
    ensemble = EnsembleRecipe.of([model.recipe for model in (both, checkpoint.load(base))])
    made_equal = ensemble.with_tta_flip(False)
    assert made_equal is not None
    assert [recipe.tta_flip for recipe in made_equal.recipes if isinstance(recipe, ClassifyRecipe)] == [False, False]
    assert AlignRecipe().with_tta_flip(True) is None
