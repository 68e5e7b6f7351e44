"""The common part of classifiers: loss, class weights, thresholds, and a complete family on top of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import RECIPES, checkpoint
from cxr.families.base import ScoringContext, SingleProcess
from cxr.families.classifier_base import balanced_class_weights, count_labels, positive_class_weights
from cxr.training.engine import Engine
from tests.families import plain_classifier
from tests.families.plain_classifier import PlainNetwork, PlainRecipe

FINDINGS = ("Mass", "Nodule")
RECIPE = PlainRecipe(size=32, epochs=4, batch_size=8, lr=2e-3)
COUNTS_2F = torch.tensor([[8.0, 9.0], [2.0, 1.0]])


def batch(seed: int) -> Batch:
    """Eight noisy images. The first four show a Mass and are brighter; whether they show a Nodule is unknown in
    one."""
    pixels = torch.randint(0, 60, (8, 40, 40), generator=torch.Generator().manual_seed(seed))
    pixels[:4] += 160
    labels = torch.zeros(8, 2, dtype=torch.int8)
    labels[:4, 0], labels[1::2, 1], labels[7, 1] = 1, 1, schema.UNKNOWN
    return {schema.PIXELS: pixels.to(torch.uint8), schema.LABELS: labels}


def some_batches() -> Iterator[Batch]:
    return iter([batch(100), batch(101)])


def test_class_weights_have_the_documented_formulas() -> None:
    assert positive_class_weights(COUNTS_2F, 0.5).tolist() == [[1, 1], [2, 3]]
    assert balanced_class_weights(COUNTS_2F, 1).tolist() == [pytest.approx([10 / 8, 10 / 9]), [5, 10]]
    assert balanced_class_weights(COUNTS_2F, 0).tolist() == [[1, 1], [1, 1]]


def test_unknown_labels_are_counted_as_neither_class() -> None:
    counts_2F = count_labels(some_batches, SingleProcess(), 2, torch.device("cpu"))
    assert counts_2F.tolist() == [[8, 8], [8, 6]]


def test_a_network_whose_probabilities_are_not_finite_is_not_ranked() -> None:
    task = RECIPE.task(RECIPE.network(FINDINGS))
    rows = torch.tensor([[0.2, math.nan, 1.0, 0.0], [0.4, 0.3, 0.0, 1.0]])
    ((name, value),) = task.evaluate_labels(rows).items()
    assert name == RECIPE.monitor
    assert math.isnan(value)


def test_a_plain_classifier_is_a_family_in_sixty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, validates with thresholds, is saved and loaded, and scores."""
    assert len(Path(plain_classifier.__file__).read_text().splitlines()) <= 65
    monkeypatch.setitem(RECIPES, "plain", f"{plain_classifier.__name__}.PlainRecipe")
    torch.manual_seed(0)
    task = RECIPE.task(RECIPE.network(FINDINGS))
    task.begin(some_batches, SingleProcess())
    engine = Engine(task, RECIPE, SingleProcess(), steps_per_epoch=4, device=torch.device("cpu"))
    for epoch in range(RECIPE.epochs):
        losses = engine.epoch(iter([batch(4 * epoch + step) for step in range(4)]))
        metrics = engine.finish_epoch(some_batches)
    assert metrics["auroc/Mass"] == 1
    assert metrics["findings_measured"] == 2
    assert set(losses) == {"bce", "loss", "grad_norm", "images"}
    checkpoint.save(tmp_path, RECIPE, task, engine.shipped().state_dict(), findings=FINDINGS, metrics=metrics)
    loaded = checkpoint.load(str(tmp_path))
    assert loaded.recipe == RECIPE
    assert loaded.network.get_buffer("thresholds").tolist() == pytest.approx(task.describe()["thresholds"]["values"])
    with torch.inference_mode():
        predicted = loaded.recipe.predict(loaded.network, batch(100))
    scores = loaded.recipe.scored(
        predicted, pa.table({schema.IMAGE_ID: list("abcdefgh")}), ScoringContext(FINDINGS, 40)
    )
    assert scores.schema.equals(RECIPE.score_columns)
    assert [decisions[0] for decisions in scores[schema.DECISIONS].to_pylist()] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_plain_classifier_starts_from_a_checkpoint_of_other_findings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = PlainNetwork("resnet18", ("Edema",))
    torch.save(source.state_dict(), tmp_path / "edema.pt")
    recipe, _ = RECIPE.replace(backbone_pretrained=str(tmp_path / "edema.pt")).resolve_weights(str(tmp_path / "out"))
    network = recipe.network(FINDINGS)
    recipe.task(network).begin(some_batches, SingleProcess())
    assert torch.equal(network.body.conv1.weight, source.body.conv1.weight)
    with pytest.raises(UserError, match=r"backbone_pretrained=.* does not fit"):
        recipe.replace(backbone="resnet50", backbone_pretrained=str(tmp_path / "edema.pt")).resolve_weights(
            str(tmp_path / "other")
        )
