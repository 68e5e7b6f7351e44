"""A stand-in for one CUDA device: tensors that report `cuda:0` and hold their data on the CPU.

    with FakeCuda() as cuda:
        network.to("cuda:0")
        network(images.pin_memory().to("cuda:0", non_blocking=True)).mean().backward()
    assert cuda.syncs == []

Within the context, factory functions with device="cuda:0" give such tensors, and so do operations on them. As on a
real device, an error is raised where a CPU tensor is mixed in (0-dim tensors and index tensors aside), where NumPy is
handed a device tensor, and where a CPU generator draws for the device. `FakeCuda.syncs` lists each time that the host
would have waited for the device, and the line that asked for it: what `torch.cuda.set_sync_debug_mode` sees on a GPU.

PyTorch itself believes that these tensors are on the CPU, since a machine without a GPU can run autograd on nothing
else. Its C++ code therefore takes the CPU's branch where it asks for a tensor's device, and autocast is the CPU's,
whose list of operations differs a little from CUDA's.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torchvision
from torch import Tensor
from torch._C import DispatchKey
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda:0")

_REPOSITORY = Path(__file__).parents[1]
_PYTORCH = (*(f"{Path(package.__file__).parent}/" for package in (torch, torchvision)), __file__)

# Operators that take CPU tensors as indices, from which the host waits until they are copied.
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# Operators whose result's size or value only the device knows, and those that check for errors.
_WAITS = {
    "aten::_linalg_check_errors",
    "aten::_local_scalar_dense",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::histc",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::multinomial",  # checks its probabilities
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
    "torchvision::nms",
}


class FakeCudaTensor(Tensor):
    """A tensor on the stand-in device; `host` holds its data."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> FakeCudaTensor:
        with torch.inference_mode(False):  # as a view of a tensor that was made outside of inference mode must be
            made = Tensor._make_wrapper_subclass(
                cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
            )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a FakeCudaTensor outside of a FakeCuda context")

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return FakeCuda.current().to(self, *args, **kwargs)

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return self.to("cpu", memory_format=memory_format)

    def cuda(self, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        return self.to(DEVICE, non_blocking=non_blocking, **kwargs)

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, device: Any = None) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")

    def record_stream(self, s: Any) -> None:
        pass

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"device": DEVICE, "dtype": self.dtype} | kwargs)

    def __repr__(self, **_: Any) -> str:
        return f"{self.host!r} on {DEVICE}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "host"})
        memo[id(self)] = copied
        return copied

    # Because of these two, nn.Module.to replaces parameters as a whole. It would else replace their storage.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: Any) -> FakeCudaTensor:
        return FakeCudaTensor(inner["host"])


class FakeCudaGenerator(torch.Generator):
    """A generator of random numbers for the stand-in device."""

    device = property(lambda self: DEVICE)


@dataclass(frozen=True)
class Sync:
    """One wait of the host for the device.

    Args:
        operation: the operator that waited.
        file: of the innermost call outside of PyTorch, relative to the repository or to site-packages.
    """

    operation: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.operation}"


class FakeCuda:
    """The context in which the stand-in device exists; `syncs` are the host's waits so far."""

    _entered: ClassVar[list[FakeCuda]] = []

    def __init__(self) -> None:
        self.syncs: list[Sync] = []
        self._named: bool | None = None  # whether the function being called names a device, and that is this one
        self._given = False  # whether the function being called is given a tensor of this device
        self._stack = ExitStack()

    @classmethod
    def current(cls) -> FakeCuda:
        if not cls._entered:
            raise RuntimeError("a FakeCudaTensor was used outside of a FakeCuda context")
        return cls._entered[-1]

    def __enter__(self) -> FakeCuda:
        self._entered.append(self)
        self._stack.callback(self._entered.pop)
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_Functions(self))
        for place in (torch, torch.amp):
            self._stack.enter_context(mock.patch.object(place, "autocast", _autocast))
        for name in ("Stream", "stream", "current_stream"):  # everything happens at once
            self._stack.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
        self._stack.enter_context(mock.patch.object(torch.cuda, "Event", _Event))
        self._stack.enter_context(mock.patch.object(torch, "Generator", _generator))
        self._stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`tensor.to(...)` for tensors of either device."""
        if args and isinstance(args[0], Tensor):
            device, dtype, rest = (
                args[0].device,
                args[0].dtype,
                {"non_blocking": args[1] if args[1:] else False} | kwargs,
            )
        else:
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            rest = {"non_blocking": non_blocking, "memory_format": memory_format, "copy": kwargs.get("copy", False)}
        if device is not None and device.type != tensor.device.type:
            if not rest["non_blocking"]:
                self._waited(f"copy from {tensor.device} to {device}")
            tensor = _Move.apply(tensor)
        with torch._C.DisableTorchFunction():
            return Tensor.to(tensor, dtype=dtype or tensor.dtype, **rest)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of PyTorch's Python API."""
        if func is Tensor.to:
            return self.to(*args, **kwargs)
        if func is Tensor.cuda:
            return self.to(args[0], DEVICE, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.type_as:
            return self.to(*args)
        if func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        before = self._named, self._given
        named = kwargs.get("device")
        self._named = None if named is None else isinstance(named, int) or torch.device(named).type == "cuda"
        self._given = any(isinstance(each, FakeCudaTensor) for each in _leaves((args, kwargs)))
        here = self._given if self._named is None else self._named
        _check_generator(DEVICE if here else torch.device("cpu"), (args, kwargs))
        try:
            if named is not None:
                kwargs = kwargs | {"device": torch.device("cpu")}
            if func in (torch.tensor, torch.as_tensor, torch.asarray):
                return self._from_data(func, *args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self._named, self._given = before

    def _from_data(self, func: Any, data: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, FakeCudaTensor):
            return self.to(data, DEVICE if self._named is not False else "cpu", kwargs.get("dtype"))
        made = func(data, **kwargs)
        if not self._named:
            return made
        self._waited(f"copy from cpu to {DEVICE}")
        return FakeCudaTensor(made.detach()).requires_grad_(made.requires_grad)

    def run(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator that PyTorch dispatches."""
        tensors = [each for each in _leaves((args, kwargs)) if isinstance(each, Tensor)]
        given = any(isinstance(each, FakeCudaTensor) for each in tensors)
        made_here = given
        if _makes(operator):
            made_here = self._named if self._named is not None else given or (not tensors and self._given)
        if not given:
            out = operator(*args, **kwargs)
            return tree_map_only(Tensor, FakeCudaTensor, out) if made_here else out
        if _is_composite(operator):
            with _Operators(self):
                return operator._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        name = operator._schema.name
        if name == "aten::copy_":
            return self._copied(*args, **kwargs)
        _check_devices(operator, args, kwargs)
        if _waits(name, args, kwargs):
            self._waited(name)
        host_args, host_kwargs = tree_map_only(FakeCudaTensor, lambda tensor: tensor.host, (args, kwargs))
        out = operator(*host_args, **host_kwargs)
        if not made_here:
            return out
        return return_and_correct_aliasing(operator, args, kwargs, tree_map_only(Tensor, FakeCudaTensor, out))

    def _copied(self, into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if into.device != source.device and not non_blocking:
            self._waited(f"copy from {source.device} to {into.device}")
        _host(into).copy_(_host(source))
        return into

    def _waited(self, operation: str) -> None:
        frame = sys._getframe()
        while frame.f_back and frame.f_code.co_filename.startswith(_PYTORCH):
            frame = frame.f_back
        file = frame.f_code.co_filename.rpartition("site-packages/")[2].removeprefix(f"{_REPOSITORY}/")
        self.syncs.append(Sync(operation, file, frame.f_lineno))


class FakeNccl:
    """`size` workers that train together, all of which hold the same; as NCCL, it takes no tensor of the CPU.

    It stands for `cxr.families.base.Communicator`.
    """

    def __init__(self, size: int = 1) -> None:
        self.rank, self.size = 0, size

    def sum(self, values: Tensor) -> Tensor:
        return self._received(values) * self.size

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat([self._received(rows)] * self.size)

    def all_rows(self, rows: Tensor) -> Tensor:
        self._received(rows)
        return torch.cat([rows] * self.size)

    @staticmethod
    def _received(values: Tensor) -> Tensor:
        if not values.is_cuda:
            raise RuntimeError("No backend type associated with device type cpu")
        return values.detach()


class _Functions(TorchFunctionMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.cuda.call(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.cuda.run(func, args, kwargs or {})


class _Move(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeCudaTensor):
            return tensor.host.clone()
        return FakeCudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Move.apply(grad)


_real_autocast, _RealGenerator, _real_grouped = (
    torch.autocast,
    torch.Generator,
    torch._C._group_tensors_by_device_and_dtype,
)


class _Event:
    """An event that the device reaches when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timed, self._at = enable_timing, math.nan

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        assert self._timed
        return 1000 * (end._at - self._at)


def _autocast(device_type: str = "cuda", *args: Any, **kwargs: Any) -> Any:
    return _real_autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _generator(device: Any = "cpu") -> torch.Generator:
    on_cpu = not isinstance(device, int) and torch.device(device).type == "cpu"
    return _RealGenerator() if on_cpu else FakeCudaGenerator()


def _grouped(*args: Any) -> dict[tuple[torch.device, torch.dtype], Any]:
    """What optimizers and gradient clipping sort tensors with; it asks C++ for their device."""
    groups = _real_grouped(*args)
    return {(group[0][0][0].device, dtype): group for (_, dtype), group in groups.items()}


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for each in tree:
            yield from _leaves(each)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree


def _host(tensor: Tensor) -> Tensor:
    return tensor.host if isinstance(tensor, FakeCudaTensor) else tensor


@functools.cache
def _makes(operator: Any) -> bool:
    """Whether an operator's arguments include the device of its result."""
    return any(argument.name == "device" for argument in operator._schema.arguments)


@functools.cache
def _is_composite(operator: Any) -> bool:
    """Whether an operator consists of others; in inference mode it arrives here as a whole."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")


@functools.cache
def _written(operator: Any) -> tuple[str, ...]:
    """Names of the arguments that an operator writes to."""
    return tuple(each.name for each in operator._schema.arguments if each.alias_info and each.alias_info.is_write)


def _on_cpu(tree: Any) -> list[Tensor]:
    return [each for each in _leaves(tree) if isinstance(each, Tensor) and not each.is_cuda]


def _check_devices(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Reject CPU tensors next to a device tensor, except indices, and 0-dim ones that are only read."""
    named = kwargs | dict(zip((each.name for each in operator._schema.arguments), args, strict=False))
    if operator._schema.name in _INDEXING:
        del named["indices"]
    refused = _on_cpu([named.get(name) for name in _written(operator)])
    for argument in named.values():
        refused += [each for each in _on_cpu(argument) if each.ndim > 0 or each is not argument]
    if refused:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(in {operator})"
        )


def _check_generator(device: torch.device, tree: Any) -> None:
    for each in _leaves(tree):
        if isinstance(each, _RealGenerator) and each.device.type != device.type:
            found = each.device.type
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{found}'")


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether CUDA's implementation of an operator makes the host wait."""
    if name in _INDEXING:
        indices = [each for each in args[1] if each is not None]
        masks = [each for each in indices if each.dtype in (torch.bool, torch.uint8)]
        if masks and name != "aten::index":  # with one CPU number as the value, it is `masked_fill_`
            filled = args[2].numel() == 1 and not args[2].is_cuda and len(indices) == 1
            masks = [] if filled else masks
        return bool(masks) or any(not each.is_cuda for each in indices)
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return name in _WAITS
