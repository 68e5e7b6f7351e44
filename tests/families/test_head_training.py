"""Heads on stored embeddings: they learn, fit the network that made the embeddings, and a search finds good ones."""

from __future__ import annotations

import pytest
import torch
from optuna.distributions import FloatDistribution

from cxr import schema
from cxr.errors import UserError
from cxr.families.classify import ClassifyRecipe
from cxr.families.head_training import (
    LabeledEmbeddings,
    attach,
    check_settings,
    search_heads,
    search_space,
    starting_recipe,
    train_head,
)

BASE = ClassifyRecipe(size=32)
RECIPE = starting_recipe(BASE).replace(batch_size=64, epochs=20, lr=1e-2)


def separable(images: int = 600, width: int = 16) -> LabeledEmbeddings:
    """Embeddings whose features have very different scales and whose labels are linear in them."""
    random = torch.Generator().manual_seed(0)
    z_ND = torch.randn(images, width, generator=random)
    labels = (z_ND @ torch.randn(width, 3, generator=random) > 0).to(torch.int8)
    labels[::7, 1] = schema.UNKNOWN
    vectors = (z_ND * torch.logspace(-2, 2, width) + 3).half()
    order = torch.randperm(images, generator=random)
    return LabeledEmbeddings(vectors, labels, order[: images * 3 // 4], order[images * 3 // 4 :])


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_head_learns_from_features_of_any_scale(head: str) -> None:
    data = separable()
    trained = train_head(RECIPE.replace(head=head), data)
    with torch.inference_mode():
        right = (trained(data.vectors[data.val].float()) > 0) == (data.labels[data.val] == schema.POSITIVE)
    known = data.labels[data.val] != schema.UNKNOWN
    assert right[known].float().mean() > 0.9


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_features_that_are_constant_in_training_are_ignored(head: str) -> None:
    data = separable()
    data.vectors[:, 3] = 0  # such as a dead ReLU
    trained = train_head(RECIPE.replace(head=head, epochs=2), data)
    x = data.vectors[data.val].float()
    with torch.inference_mode():
        expected = trained(x)
        assert expected.std() > 0.1
        x[:, 3] = 0.5
        torch.testing.assert_close(trained(x), expected)


def test_the_same_seed_gives_the_same_head_and_another_gives_another() -> None:
    data, recipe = separable(), RECIPE.replace(head="mlp", epochs=2)
    first, again, other = (train_head(recipe.replace(seed=seed), data).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_attached_head_gives_the_network_its_logits() -> None:
    torch.manual_seed(0)
    base = BASE.network(("Edema",)).eval()
    images = torch.rand(4, 1, 32, 32)
    with torch.inference_mode():
        vectors = base.embed(images)
    data = separable(width=vectors.shape[1])
    head = train_head(RECIPE.replace(head="mlp", epochs=1), data)
    network = attach(base, RECIPE.replace(head="mlp"), ("a", "b", "c"), head)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), head(vectors))
    assert network.findings == ("a", "b", "c")
    assert network.thresholds.tolist() == [0.5] * 3


def test_a_search_prefers_the_learning_rates_that_learn() -> None:
    data = separable()
    space = {"lr": FloatDistribution(1e-7, 1e-1, log=True)}
    ended = search_heads(RECIPE.replace(epochs=8), data, space, trials=20, threads=2)
    assert sorted(trial.number for trial in ended) == list(range(20))
    assert ended[0].sampled["lr"] > 1e-3
    assert not ended[0].stopped_early
    assert any(trial.stopped_early for trial in ended)
    complete = [trial.value for trial in ended if not trial.stopped_early]
    assert complete == sorted(complete, reverse=True)
    assert max(trial.steps for trial in ended if trial.stopped_early) < ended[0].steps


def test_a_search_with_one_thread_can_be_repeated() -> None:
    data, space = separable(200), search_space(RECIPE)
    first, again = (search_heads(RECIPE.replace(epochs=4), data, space, trials=6, threads=1) for _ in range(2))
    assert first == again


def test_settings_of_the_network_cannot_be_changed() -> None:
    check_settings(RECIPE.replace(loss="focal", head="mlp"), BASE)
    with pytest.raises(UserError, match="size was 32, is 64"):
        check_settings(RECIPE.replace(size=64), BASE)
    with pytest.raises(UserError, match="head=attention: expected linear or mlp"):
        check_settings(RECIPE.replace(head="attention"), BASE)
    attention = BASE.replace(head="attention")
    check_settings(starting_recipe(attention), attention)
    with pytest.raises(UserError, match="got head=mil"):
        starting_recipe(BASE.replace(head="mil"))


def test_embeddings_are_those_with_which_the_network_predicts() -> None:
    torch.manual_seed(0)
    batch = {schema.PIXELS: torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)}
    for recipe in (BASE, BASE.replace(head="mlp", tta_flip=True), BASE.replace(head="attention")):
        network = recipe.network(("a", "b")).eval()
        with torch.inference_mode():
            predicted, vectors = recipe.predict_and_embed(network, batch)
            expected = recipe.predict(network, batch)
            torch.testing.assert_close(vectors, recipe.embed(network, batch))
            if not recipe.tta_flip:
                torch.testing.assert_close(network.head(vectors).sigmoid(), predicted[schema.PROBABILITIES])
        for name, values in expected.items():
            torch.testing.assert_close(predicted[name], values)
