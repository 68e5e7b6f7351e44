"""The training step: falling losses, weights of terms, errors for losses that are not finite, exact resuming."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.families.base import Batches, Communicator, SingleProcess, Stage, Task
from cxr.training.engine import Engine, MovingAverage, NonFiniteLossError, UnrecoverableTrainingError


class Line(Task):
    """Fits y = 2x + 1 with two terms, one of which can be made NaN."""

    def __init__(self, weight: float = 1.0, spoilt: float = 0.0) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.weight, self.spoilt = weight, spoilt

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        error = self.network(batch["x"]) - (2 * batch["x"] + 1)
        spoil = torch.tensor(self.spoilt)
        return {"square": self.weight * error.square().mean(), "absolute": error.abs().mean() + spoil * 0}

    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        return {"correlation": -sum(self({"x": b["x"]})["square"].item() for b in batches())}


def data(steps: int = 30) -> Iterator[Batch]:
    x = torch.linspace(-1, 1, 16).reshape(-1, 1)
    return iter([{"x": x}] * steps)


def engine(task: Task, steps: int = 30, **settings) -> Engine:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.fill_(0.1)
    recipe = AlignRecipe(epochs=8, lr=0.1, weight_decay=0.0, **settings)
    return Engine(task, recipe, SingleProcess(), steps_per_epoch=steps, device=torch.device("cpu"), check_every=10)


def test_loss_falls_and_terms_add_up() -> None:
    trained = engine(Line())
    means = [trained.epoch(data()) for _ in range(8)]
    assert means[-1]["loss"] < 0.05 < means[0]["loss"]
    assert means[0]["loss"] == pytest.approx(means[0]["square"] + means[0]["absolute"])
    assert means[0]["images"] == 30 * 16


def test_the_weight_of_a_term_changes_the_loss() -> None:
    light, heavy = (engine(Line(weight)).epoch(data())["loss"] for weight in (1.0, 3.0))
    assert heavy > light


def test_a_spoilt_term_is_named() -> None:
    with pytest.raises(NonFiniteLossError, match=r"absolute.*lower lr"):
        engine(Line(spoilt=float("inf"))).epoch(data())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_restored_state_continues_exactly(ema: float) -> None:
    straight = engine(Line(), ema=ema)
    first, second = straight.epoch(data()), straight.epoch(data())
    interrupted = engine(Line(), ema=ema)
    assert interrupted.epoch(data()) == first
    resumed = engine(Line(), ema=ema)
    resumed.restore(interrupted.state())
    assert resumed.epoch(data()) == second
    shipped = [dict(e.shipped().state_dict()) for e in (straight, resumed)]
    assert all(torch.equal(shipped[0][name], shipped[1][name]) for name in shipped[0])


def test_accumulated_steps_equal_one_large_batch() -> None:
    whole = engine(Line(), clip=0.0)
    whole.epoch(data(4))
    halves = engine(Line(), steps=60, clip=0.0, accumulate=2)
    halves.epoch(data(8))
    assert torch.allclose(whole.task.network.weight, halves.task.network.weight, atol=1e-5)


def test_an_accumulation_longer_than_the_epoch_is_rejected() -> None:
    with pytest.raises(UserError, match="accumulate=8 with 5 steps"):
        engine(Line(), steps=5, accumulate=8)
    with pytest.raises(UnrecoverableTrainingError, match="an epoch produced no batches"):
        engine(Line()).epoch(iter([]))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    trained = engine(Line(), warmup=0.25)
    rates = []
    for _ in range(8):
        trained.epoch(data())
        rates.append(trained.schedule.get_last_lr()[0])
    assert rates[1] == pytest.approx(0.1, rel=0.02)
    assert rates[-1] == pytest.approx(0.0, abs=1e-4)
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)


def test_the_learning_rate_is_scaled_with_the_batch_size() -> None:
    plain = engine(Line(), batch_size=32, warmup=0.0)
    scaled = engine(Line(), batch_size=32, warmup=0.0, lr_batch_size=8)
    assert scaled.schedule.get_last_lr()[0] == pytest.approx(4 * plain.schedule.get_last_lr()[0])
    assert scaled.recipe.lr_factor == 4
    with pytest.raises(UserError, match="lr_batch_size: expected a batch size"):
        AlignRecipe(lr_batch_size=-1)


def test_echoed_batches_are_as_many_steps() -> None:
    plain, echoed = engine(Line()), engine(Line(), steps=10)
    echoed.enter(Stage("", 8, 0.1, data_echo_factor=3))
    means = [trained.epoch(data(steps)) for trained, steps in ((plain, 30), (echoed, 10)) for _ in range(8)]
    assert means[-1] == means[7]
    assert echoed.schedule.get_last_lr()[0] == pytest.approx(0)


def test_validation_uses_the_moving_average_and_gives_the_network_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = engine(Line(), ema=0.99)
    trained.epoch(data())
    own, validated = trained.task.network, list[nn.Module]()
    monkeypatch.setattr(trained.task, "evaluate", lambda *_: validated.append(trained.task.network) or {})
    trained.finish_epoch(lambda: data(1))
    assert trained.task.network is own
    assert trained.average is not None
    assert validated == [trained.average.module]
    weights, averages = (torch.cat([value.flatten() for value in of.parameters()]) for of in (own, *validated))
    assert not torch.equal(weights, averages)


@pytest.mark.parametrize("ramp", [0.0, 5.0])
def test_the_moving_average_is_that_of_all_weights_so_far(ramp: float) -> None:
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    average = MovingAverage(network, 0.9, ramp)
    wanted = 0.0
    for move in range(6):
        for values in (*network.parameters(), network[1].running_mean):
            values.data.fill_(float(move))
        network[1].num_batches_tracked.fill_(move)
        average.update_parameters(network)
        rising = 0.9 * (1 - math.exp(-(move + 1) / ramp)) if ramp else min(0.9, (1 + move) / (10 + move))
        kept = rising if move else 0.0
        wanted = kept * wanted + (1 - kept) * move
    assert average.module[0].weight.item() == pytest.approx(wanted)
    assert average.module[1].running_mean.item() == pytest.approx(wanted)
    assert average.module[1].num_batches_tracked.item() == 5


def test_batches_keep_their_columns_on_the_device() -> None:
    moved = next(engine(Line()).moved(iter([{schema.PIXELS: torch.zeros(2, 4, 4, dtype=torch.uint8)}])))
    assert moved[schema.PIXELS].dtype == torch.uint8
