"""The stand-in for a CUDA device computes what a CPU does, and catches each kind of mistake about devices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.fake_cuda import DEVICE, FakeCuda, FakeNccl


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as device:
        yield device


@pytest.fixture
def x(cuda: FakeCuda) -> Tensor:
    """0, 1, 2 on the device."""
    return torch.arange(3.0, device=DEVICE)


def test_a_training_step_is_that_of_the_cpu() -> None:
    with FakeCuda():
        on_device = weights_after_a_step("cuda")
    torch.testing.assert_close(on_device, weights_after_a_step("cpu"))


def weights_after_a_step(device: str) -> list[Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).to(
        device
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    images = torch.rand(5, 1, 8, 8).to(device)
    loss = nn.functional.cross_entropy(network(images), torch.zeros(5, dtype=torch.long, device=device))
    assert loss.device.type == device
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 0.1)
    optimizer.step()
    assert {weight.device.type for weight in network.state_dict().values()} == {device}
    return [weight.detach().cpu() for weight in network.parameters()]


def test_autocast_computes_layers_in_bfloat16(cuda: FakeCuda) -> None:
    layer = nn.Linear(3, 2).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(torch.rand(4, 3, device=DEVICE)).dtype == torch.bfloat16
    assert layer(torch.rand(4, 3, device=DEVICE)).dtype == torch.float32


def test_views_share_memory_and_inference_mode_keeps_the_device(x: Tensor) -> None:
    x[1:].zero_()
    assert x.tolist() == [0, 0, 0]
    with torch.inference_mode():
        x[:2] += 1
        shown = nn.functional.interpolate(x.reshape(1, 1, 3), scale_factor=2, mode="linear")
    assert (x.tolist(), shown.device) == ([1, 1, 0], DEVICE)


def test_tensors_are_made_where_they_are_asked_for(x: Tensor) -> None:
    made = [torch.zeros(2, device="cuda"), torch.rand_like(x), x.new_ones(2), torch.tensor([1], device=DEVICE)]
    made += [x.double(), x.cpu().cuda(), torch.ones(2).type_as(x), torch.zeros_like(torch.ones(2), device=DEVICE)]
    assert {tensor.device for tensor in made} == {DEVICE}
    on_cpu = [
        torch.zeros(2),
        x.cpu(),
        x.to("cpu", torch.float64),
        torch.zeros_like(x, device="cpu"),
        torch.tensor(1.0),
    ]
    assert {tensor.device.type for tensor in on_cpu} == {"cpu"}


def test_gradients_pass_between_devices(x: Tensor) -> None:
    weight = torch.ones(3, requires_grad=True)
    (weight.to(DEVICE) * x).cpu().sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 1, 2]


MIXED = "at least two devices"
MISTAKES: dict[str, tuple[Callable[[Tensor], object], type[Exception], str]] = {
    "a sum with a CPU tensor": (lambda x: x + torch.ones(3), RuntimeError, MIXED),
    "a list with a CPU tensor": (lambda x: torch.cat([x, torch.ones(3)]), RuntimeError, MIXED),
    "a CPU tensor among scalars": (lambda x: torch.stack([x.sum(), torch.tensor(1.0)]), RuntimeError, MIXED),
    "a CPU tensor written to": (lambda x: torch.zeros(3).add_(x), RuntimeError, MIXED),
    "a CPU scalar written to": (lambda x: torch.tensor(0.0).add_(x.sum()), RuntimeError, MIXED),
    "a layer left on the CPU": (lambda x: nn.Linear(3, 2)(x), RuntimeError, MIXED),
    "gathered by a CPU index": (lambda x: x.gather(0, torch.tensor([0])), RuntimeError, MIXED),
    "a CPU mask of where": (lambda x: torch.where(torch.ones(3) > 0, x, 0.0), RuntimeError, MIXED),
    "in inference mode": (
        lambda x: in_inference_mode(lambda: nn.functional.linear(x, torch.ones(3))),
        RuntimeError,
        MIXED,
    ),
    "numpy()": (lambda x: x.numpy(), TypeError, "to numpy"),
    "np.asarray": (np.asarray, TypeError, "to numpy"),
    "np.asarray of a list": (lambda x: np.asarray([x, x]), TypeError, "to numpy"),
    "a CPU generator for a new tensor": (
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
        RuntimeError,
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "a CPU generator for an old tensor": (
        lambda x: x.uniform_(generator=torch.Generator()),
        RuntimeError,
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "a device generator for a CPU tensor": (
        lambda x: torch.rand(3, generator=torch.Generator(x.device)),
        RuntimeError,
        "Expected a 'cpu' device type for generator but found 'cuda'",
    ),
    "summed over workers on the CPU": (lambda x: FakeNccl(2).sum(x.cpu()), RuntimeError, "No backend type"),
    "gathered from workers on the CPU": (lambda x: FakeNccl(2).gather(x.cpu()), RuntimeError, "No backend type"),
}


def in_inference_mode(run: Callable[[], object]) -> object:
    with torch.inference_mode():
        return run()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_about_devices_is_an_error(x: Tensor, name: str) -> None:
    mistake, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        mistake(x)


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "a CPU scalar that is read": lambda x: x * torch.tensor(2.0),
    "a CPU index tensor": lambda x: x[torch.tensor([2, 0])],
    "a copy from the CPU": lambda x: x.copy_(torch.ones(3)),
    "its own generator": lambda x: torch.rand(3, device=x.device, generator=torch.Generator(x.device).manual_seed(0)),
    "workers": lambda x: FakeNccl(2).gather(FakeNccl(2).sum(x)),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_device_permits_is_permitted(x: Tensor, name: str) -> None:
    assert ALLOWED[name](x).device == DEVICE


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[1]),
    "int": lambda x: int(x[1]),
    "bool": lambda x: bool((x > 0).any()),
    "an if": lambda x: 1 if (x > 0).all() else 0,
    "a comparison of tensors": lambda x: torch.equal(x, x),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copied to the CPU": lambda x: torch.zeros(3).copy_(x),
    "copied from the CPU": lambda x: x.copy_(torch.ones(3)),
    "moved from the CPU": lambda x: torch.ones(3).to(x.device),
    "type_as": lambda x: torch.ones(3).type_as(x),
    "torch.tensor": lambda x: torch.tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "nonzero": lambda x: x.nonzero(),
    "where with one argument": lambda x: torch.where(x > 0),
    "boolean indexing": lambda x: x[x > 0],
    "boolean indexing by a CPU mask": lambda x: x[torch.tensor([True, False, True])],
    "boolean indexing that writes a tensor": lambda x: x.__setitem__(x > 0, x[1]),
    "a list as the index": lambda x: x[[2, 0]],
    "a CPU tensor as the index": lambda x: x[torch.tensor([2, 0])],
    "masked_select": lambda x: x.masked_select(x > 0),
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "multinomial": lambda x: x.multinomial(1),
    "inv": lambda x: torch.linalg.inv(torch.eye(2, device=x.device)),
    "nms": lambda x: torchvision.ops.nms(x.new_ones(2, 4), x[:2], 0.5),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_for_the_device_is_counted_with_its_place(cuda: FakeCuda, x: Tensor, name: str) -> None:
    WAITS[name](x)
    assert {sync.file for sync in cuda.syncs} == {"tests/test_fake_cuda.py"}
    assert {sync.line for sync in cuda.syncs} == {inspect.getsourcelines(WAITS[name])[1]}


GOES_ON: dict[str, Callable[[Tensor], object]] = {
    "pinned memory": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "boolean indexing that writes a number": lambda x: x.__setitem__(x > 0, 1.0),
    "an index on the device": lambda x: x[torch.arange(2, device=x.device)],
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(x.long(), output_size=3),
    "a slice": lambda x: x[1:],
    "inv_ex": lambda x: torch.linalg.inv_ex(torch.eye(2, device=x.device)),
    "item of a CPU tensor": lambda x: x + torch.tensor(1.0).item(),
    "sum over workers": lambda x: FakeNccl(2).sum(x),
}


@pytest.mark.parametrize("name", GOES_ON)
def test_what_does_not_wait_is_not_counted(cuda: FakeCuda, x: Tensor, name: str) -> None:
    GOES_ON[name](x)
    assert cuda.syncs == []


def test_the_device_ends_with_its_context(x: Tensor) -> None:
    with FakeCuda():
        inner = torch.ones(2, device=DEVICE)
    assert (inner + x[:2]).tolist() == [1, 2]


def test_a_tensor_that_outlives_its_device_is_an_error() -> None:
    with FakeCuda():
        left = torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="outside of a FakeCuda context"):
        left + 1
    with pytest.raises(RuntimeError, match="outside of a FakeCuda context"):
        left.cpu()
