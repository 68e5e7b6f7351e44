"""Two processes reduce and measure exactly like a single one."""

from __future__ import annotations

import pytest
import torch

from cxr.families.align import AlignRecipe
from cxr.families.base import Communicator, SingleProcess, Task
from cxr.training.distributed import ProcessGroup
from tests.families.test_recipes import some_batches
from tests.two_workers import TwoWorkers

RECIPE = AlignRecipe(size=32, backbone="conv3", lungs=False)
EXACT = ("group_correlation", "group_correlation_before", "pixel_std", "mean_scale")


def task() -> Task:
    torch.manual_seed(0)
    network = RECIPE.network(())
    torch.nn.init.normal_([*network.parameters()][-1], std=0.2)
    return RECIPE.task(network)


def measured(made: Task, workers: Communicator) -> dict[str, float]:
    """Metrics of two batches of four: a single process has both, each of two processes has one."""
    shares = [*some_batches(2)][workers.rank :: workers.size]
    return {name: value for name, value in made.evaluate(lambda: iter(shares), workers).items() if name in EXACT}


def reduce_and_measure(rank: int) -> dict[str, float]:
    group = ProcessGroup()
    assert group.sum(torch.tensor([1.0 + rank])).tolist() == [3.0]
    rows = group.gather(torch.full((rank + 1, 2), float(rank)))
    assert rows.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert group.gather(torch.zeros(0, 3)).shape == (0, 3)
    for dtype in (torch.float32, torch.bfloat16):
        mine = torch.tensor([[2.0 * rank], [2.0 * rank + 1]], dtype=dtype, requires_grad=True)
        every = group.all_rows(mine)
        assert every.flatten().tolist() == [0, 1, 2, 3]
        (every * torch.tensor([[1.0], [2.0], [3.0], [4.0]]) * (1 + rank)).sum().backward()
        assert mine.grad is not None
        assert mine.grad.flatten().tolist() == [3 * (1 + 2 * rank), 3 * (2 + 2 * rank)], "of both workers' losses"
    assert group.all_rows(torch.tensor([rank], dtype=torch.uint8)).tolist() == [0, 1]
    return measured(task(), group)


@pytest.mark.slow
def test_two_workers_measure_the_same_as_one(two_workers: TwoWorkers) -> None:
    one, other = two_workers.run(reduce_and_measure)
    assert one == other == pytest.approx(measured(task(), SingleProcess()), abs=1e-5)
