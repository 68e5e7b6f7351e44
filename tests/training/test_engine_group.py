"""Two processes train one network: with the steps, moving average and batch-norm statistics of a single process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.base import Batches, Communicator, SingleProcess, Task
from cxr.models.aecnn import AECNN, ResidualCodec
from cxr.training.distributed import ProcessGroup
from cxr.training.engine import Engine
from cxr.training.worker import stage_at
from tests.two_workers import TwoWorkers

STEPS = 5
NORM_EPOCHS = (0, None)  # batch norm fixed, batch norm of each worker's own images


class Norm(Task):
    """A network with a batch norm before a line that is fitted to y = 2x + 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"square": (self.network(batch["x"]) - 2 * batch["x"] - 1).square().mean()}

    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        errors = [self({"x": batch["x"]})["square"] for batch in batches()]
        return {"correlation": -(workers.sum(torch.stack(errors).sum()) / workers.size).item()}


def data(workers: Communicator) -> Iterator[Batch]:
    """Eight rows a step, dealt to the workers so that each share has the whole's mean and spread."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        half = torch.randn(4, 1, generator=rng)
        yield {"x": half if workers.size == 2 else torch.cat([half, half])}


def uneven(workers: Communicator) -> Iterator[Batch]:
    """Rank 0 sees images around 0, rank 1 around 4."""
    return iter([{"x": torch.linspace(-1, 1, 8).reshape(-1, 1) + 4.0 * workers.rank}] * STEPS)


def trained(workers: Communicator, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], dict[str, float]]:
    recipe = AlignRecipe(epochs=2, lr=0.1, ema=0.8)
    engine = Engine(Norm(), recipe, workers, steps_per_epoch=STEPS, device=torch.device("cpu"))
    engine.epoch(batches)
    metrics = engine.finish_epoch(lambda: data(workers))
    kept = {f"own.{name}": value.clone() for name, value in engine.task.network.state_dict().items()}
    return kept | {f"mean.{name}": value.clone() for name, value in engine.shipped().state_dict().items()}, metrics


def xrays(workers: Communicator) -> Iterator[Batch]:
    """16 noisy images a step with one bright half, dealt to the workers; some labels are known to one only."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        sides = torch.randint(2, (16, 2), generator=rng)
        pixels = torch.randint(100, (16, 32, 32), generator=rng) + 100 * sides[:, :1, None] * (torch.arange(32) < 16)
        labels = torch.where(torch.arange(16)[:, None] % 4 == 1, -1, sides)
        share = slice(workers.rank, None, workers.size)
        yield {schema.PIXELS: pixels[share].to(torch.uint8), schema.LABELS: labels[share].to(torch.int8)}


def curve(workers: Communicator, norm_epochs: int | None) -> list[float]:
    """Losses of an AE-CNN through its three stages, two epochs each, without anything random."""
    recipe = AecnnRecipe(
        size=32, patch=32, patches=1, rotation_deg=0, flip=0, lr=3e-3, classifier_lr=3e-3,
        batchnorm_calibration_epochs=norm_epochs, epochs=2, classifier_epochs=2, autoencoder_epochs=2, mse_weight=10,
    )  # fmt: skip
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    network = AECNN(ResidualCodec(4, 1, 8), nn.Sequential(norm, nn.Flatten(), nn.Linear(288, 2)), ("left", "noise"))
    task = recipe.task(network)
    engine = Engine(task, recipe, workers, steps_per_epoch=STEPS, device=torch.device("cpu"))
    losses = []
    for epoch in range(recipe.total_epochs):
        if engine.stage != stage_at(recipe, epoch):
            engine.enter(stage_at(recipe, epoch))
        losses.append(engine.epoch(xrays(workers))["loss"])
        engine.finish_epoch(lambda: xrays(workers))
    return losses


def train(_: int) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    return [trained(ProcessGroup(), make(ProcessGroup())) for make in (data, uneven)]


def train_curves(_: int) -> list[list[float]]:
    return [curve(ProcessGroup(), norm_epochs) for norm_epochs in NORM_EPOCHS]


@pytest.mark.slow
def test_two_workers_have_the_loss_curve_of_one(two_workers: TwoWorkers) -> None:
    one, other = two_workers.run(train_curves)
    assert one == other
    fixed, own = (curve(SingleProcess(), norm_epochs) for norm_epochs in NORM_EPOCHS)
    assert one[0] == pytest.approx(fixed, rel=1e-3)
    assert one[1] == pytest.approx(own, rel=0.1)
    assert all(first > second for first, second in (fixed[:2], fixed[2:4], fixed[4:]))


def test_two_workers_have_the_same_network_and_average(two_workers: TwoWorkers) -> None:
    (alike, uneven_one), (alike_other, uneven_other) = two_workers.run(train)
    for one, other in ((alike, alike_other), (uneven_one, uneven_other)):
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        assert one[1] == other[1]
    alone, _ = trained(SingleProcess(), data(SingleProcess()))
    statistics = {name for name in alone if "running_var" in name}  # unbiased: of 4 rows another factor than of 8
    for name in alone.keys() - statistics:
        assert torch.allclose(alike[0][name].float(), alone[name].float(), atol=1e-5), name
    seen = 1 - 0.9**STEPS  # of the true mean, in batch norm's running one
    own, slow = (uneven_one[0][f"{network}.0.running_mean"].item() for network in ("own", "mean"))
    assert own == pytest.approx(2 * seen, abs=1e-5)  # between 0 and 4
    assert 0.1 < slow < own
    assert not torch.equal(alike[0]["own.1.weight"], alike[0]["mean.1.weight"])


def exchanged(rank: int) -> list[float]:
    workers = ProcessGroup()
    engine = Engine(Norm(), AlignRecipe(epochs=2), workers, steps_per_epoch=STEPS, device=torch.device("cpu"))
    before = engine.exchange_seconds()
    engine.epoch(data(workers))
    return [before, engine.exchange_seconds()]


def test_the_time_of_exchanging_gradients_is_measured(two_workers: TwoWorkers) -> None:
    for before, after in two_workers.run(exchanged):
        assert before == 0
        assert 0 < after < 5
