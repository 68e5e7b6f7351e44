"""Tensors of a file that holds Python objects, read in a process of its own without running the file's code.

`torch.save(network)` stores a pickle that names classes and functions, and loading it as intended runs any code that
it names. Here only PyTorch's functions for tensors are what they are; inert stand-ins take the place of all others.
The tensors are then collected from the attributes in which `nn.Module` keeps them. The libraries that wrote the file
need not be installed.
"""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from cxr.models.weight_files import NotWeightsError, is_state_dict, to_safetensors

TIMEOUT_S = 600
_STATE, _FACTS = "state.safetensors", "facts.json"
_NETWORKS = ("ema", "model", "state_dict")  # keys of training checkpoints that hold the network
_TRUSTED = {
    **dict.fromkeys(("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"), "torch._utils"),
    **dict.fromkeys(
        ("Size", "device", "float16", "bfloat16", "float32", "float64", "int32", "int64", "bool"), "torch"
    ),
    "OrderedDict": "collections",
    "set": "builtins",
}
"""Names that are what they are, and their modules."""


def open_in_subprocess(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of the network in a file, and its attributes that are plain values, such as its labels.

    Raises:
        NotWeightsError: the file holds no network.
    """
    with tempfile.TemporaryDirectory(prefix="cxr-import-") as folder:
        command = [sys.executable, "-m", "cxr.models.pickled_modules", folder]
        try:
            done = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise NotWeightsError(f"the file could not be read in {TIMEOUT_S} s: use another file") from error
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise NotWeightsError(f"the file contains no network that could be read ({reason}): use another file")
        state = safetensors.torch.load((Path(folder) / _STATE).read_bytes())
        return state, json.loads((Path(folder) / _FACTS).read_text())


class _StandIn:
    """Takes the place of an object of any class, and only remembers its attributes."""

    dump_patches = False  # which torch.load asks of networks in files of its old format

    def __new__(cls, *arguments: object, **named: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)

    def __setitem__(self, key: object, value: object) -> None:
        """Entries of subclasses of dict."""

    def append(self, value: object) -> None:
        """Entries of subclasses of list."""


class _RestrictedUnpickler(pickle.Unpickler):
    """As in "Restricting Globals" of Python's documentation of pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if _TRUSTED.get(name) == {"__builtin__": "builtins"}.get(module, module):
            return super().find_class(_TRUSTED[name], name)
        return _StandIn


class _RestrictedPickle:
    """The parts of the module pickle that `torch.load` uses."""

    Unpickler = _RestrictedUnpickler

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        return _RestrictedUnpickler(file, **options).load()


def read(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `open_in_subprocess`, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sources of stand-ins are not those in the file
        loaded: Any = torch.load(
            io.BytesIO(data), weights_only=False, pickle_module=_RestrictedPickle, map_location="cpu"
        )
    facts = _plain(loaded)
    if isinstance(loaded, Mapping) and not is_state_dict(loaded):
        found = (loaded[key] for key in _NETWORKS if isinstance(loaded.get(key), (_StandIn, Mapping)))
        loaded = next(found, None)
        facts |= _plain(loaded)
    state = dict(loaded) if is_state_dict(loaded) else dict(_tensors(loaded, ""))
    if not state:
        raise NotWeightsError("expected a network or a state dict")
    return {name: values.float() if values.is_floating_point() else values for name, values in state.items()}, facts


def _tensors(module: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names and values of parameters and persistent buffers, as in `nn.Module.state_dict`."""
    own = vars(module) if isinstance(module, _StandIn) else {}
    transient = own.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, values in (own.get(kind) or {}).items():
            if isinstance(values, Tensor) and not (kind == "_buffers" and name in transient):
                yield prefix + name, values.detach()
    for name, child in (own.get("_modules") or {}).items():
        yield from _tensors(child, f"{prefix}{name}.")


def _plain(value: object) -> dict[str, Any]:
    """The attributes or entries that are plain values."""
    entries = vars(value) if isinstance(value, _StandIn) else value if isinstance(value, Mapping) else {}
    facts = {}
    for name, entry in entries.items():
        if isinstance(name, str) and not name.startswith("_") and not isinstance(entry, Tensor):
            try:
                facts[name] = json.loads(json.dumps(entry))
            except (TypeError, ValueError):
                continue
    return facts


if __name__ == "__main__":
    state_, facts_ = read(sys.stdin.buffer.read())
    (Path(sys.argv[1]) / _STATE).write_bytes(to_safetensors(state_))
    (Path(sys.argv[1]) / _FACTS).write_text(json.dumps(facts_))
