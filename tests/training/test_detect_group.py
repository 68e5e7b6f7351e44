"""Two processes train one detector: the weights and losses equal those of a single process after every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.data.batch import HAS_BOXES, Batch
from cxr.families.base import Communicator, SingleProcess
from cxr.families.detect import DetectRecipe
from cxr.schema import MOST_BOXES
from cxr.training.distributed import ProcessGroup
from cxr.training.engine import Engine
from tests.two_workers import TwoWorkers

pytestmark = pytest.mark.slow

STEPS, EPOCHS, IMAGES, SIZE = 3, 3, 8, 64
RECIPE = DetectRecipe(
    size=SIZE, batch_size=IMAGES, epochs=EPOCHS, warmup=0.2, mosaic=0, translate=0, scale_jitter=0, flip=0, hsv_v=0
)


def some_batches(workers: Communicator) -> Iterator[Batch]:
    """Eight noisy images a step, dealt to the workers: the last worker's have most of the boxes."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        pixels = torch.randint(100, (IMAGES, SIZE, SIZE), generator=rng)
        boxes = torch.full((IMAGES, MOST_BOXES, 5), math.nan)
        for i in range(IMAGES):
            for number in range(3 if i % 2 else i // 4):
                left, top = torch.randint(0, 32, (2,), generator=rng).tolist()
                pixels[i, top : top + 24, left : left + 24] += 50
                boxes[i, number] = torch.tensor([i % 2, *(v / SIZE for v in (left, top, left + 24, top + 24))])
        given = {
            schema.PIXELS: pixels.to(torch.uint8),
            schema.BOXES: boxes,
            HAS_BOXES: torch.ones(IMAGES, dtype=torch.bool),
            schema.LABELS: (boxes[..., :1] == torch.arange(2)).any(1).to(torch.int8),
        }
        yield {name: values[workers.rank :: workers.size] for name, values in given.items()}


class FixedNorm(nn.BatchNorm2d):
    """A batch norm with fixed statistics, so that an image does not depend on the others of its share."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def fix_norms(module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm2d):
        module.__class__ = FixedNorm


def trained(
    workers: Communicator, *, fixed: bool
) -> tuple[list[float], list[dict[str, Tensor]], list[dict[str, float]]]:
    """Losses, the network after each epoch, validation metrics."""
    torch.manual_seed(0)
    network = RECIPE.network(("Mass", "Nodule"))
    if fixed:
        network.apply(fix_norms)
    engine = Engine(RECIPE.task(network), RECIPE, workers, steps_per_epoch=STEPS, device=torch.device("cpu"))
    losses, kept, metrics = [], [], []
    for _ in range(EPOCHS):
        losses.append(engine.epoch(some_batches(workers))["loss"])
        metrics.append(engine.finish_epoch(lambda: some_batches(workers)))
        both = {"own": engine.task.network, "average": engine.shipped()}
        kept.append({f"{k}.{n}": v.clone() for k, net in both.items() for n, v in net.state_dict().items()})
    return losses, kept, metrics


def train(_: int) -> list[tuple]:
    return [trained(ProcessGroup(), fixed=fixed) for fixed in (True, False)]


@pytest.fixture(scope="module")
def both(two_workers: TwoWorkers) -> list[list[tuple]]:
    """The results of both processes, with fixed batch norms and with each worker's own."""
    return two_workers.run(train)


def test_two_workers_have_the_same_network_after_every_epoch(both: list[list[tuple]]) -> None:
    for (losses, kept, metrics), (others, kept_other, metrics_other) in zip(*both, strict=True):
        assert losses == others
        assert metrics == metrics_other
        for one, other in zip(kept, kept_other, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert not torch.equal(
            kept[0]["own.detector.model.0.conv.weight"], kept[1]["own.detector.model.0.conv.weight"]
        )


def test_two_workers_have_the_loss_curve_of_one(both: list[list[tuple]]) -> None:
    """Exactly, although one worker has most of the boxes; with batch norms of each worker's own images, nearly."""
    for fixed, (losses, *_), tolerance in zip((True, False), both[0], (1e-3, 0.1), strict=True):
        alone, *_ = trained(SingleProcess(), fixed=fixed)
        assert losses == pytest.approx(alone, rel=tolerance)
        assert alone[-1] != pytest.approx(alone[0], rel=0.02), "something was learnt"
