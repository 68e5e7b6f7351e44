"""Files of weights: safetensors, `torch.save`, checkpoint folders, and folders as model hubs publish them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cxr import storage
from cxr.errors import UserError

SAFETENSORS = ".safetensors"
SUFFIXES = (".pt", ".pth", ".bin", SAFETENSORS)
CHECKPOINT_WEIGHTS = "weights.safetensors"  # in a checkpoint folder
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder of a model hub
HUB_INDEX = "model.safetensors.index.json"  # names the files of weights that are divided among several
_WRAPPERS = ("state_dict", "model", "module")  # keys of training checkpoints under which others store a state dict


class NotWeightsError(UserError):
    """A file that is not a state dict of tensors."""


class PythonObjectsError(NotWeightsError):
    """A file of `torch.save` that holds other objects than a state dict of tensors."""


def read(uri: str) -> dict[str, Tensor]:
    """The state dict in a file or folder; never runs a pickle's code.

    Raises:
        NotFoundError: there is nothing at the URI.
        NotWeightsError: it is not a state dict.
    """
    index = storage.join(uri, HUB_INDEX)
    if storage.exists(index):
        parts = sorted(set(storage.read_json(index).get("weight_map", {}).values()))
        if not parts or any(part != storage.name(part) for part in parts):
            raise NotWeightsError(
                f"{index}: expected the names of files in its own folder: download the folder again"
            )
        return {name: values for part in parts for name, values in _read_file(storage.join(uri, part)).items()}
    for name in (CHECKPOINT_WEIGHTS, *HUB_WEIGHTS):
        if storage.exists(storage.join(uri, name)):
            return _read_file(storage.join(uri, name))
    return _read_file(uri)


def load(data: bytes, uri: str, expected: str = "tensors and plain values") -> Any:
    """What `torch.save` wrote, if it is made of tensors and plain values; never runs a pickle's code.

    Args:
        uri: where the data is from, for errors.
        expected: what the error for a file with other objects says.

    Raises:
        PythonObjectsError: it holds other objects.
        NotWeightsError: it is damaged, or no file of `torch.save`.
    """
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise PythonObjectsError(
            f"{uri} contains Python objects, which are not loaded: expected {expected}"
        ) from error
    except Exception as error:
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> NotWeightsError:
    reason = str(error).partition("\n")[0]
    return NotWeightsError(f"{uri} cannot be read as weights ({reason}): expected a state dict of tensors")


def _read_file(uri: str) -> dict[str, Tensor]:
    data = storage.read_bytes(uri)
    if uri.endswith(SAFETENSORS):
        try:
            state: Any = safetensors.torch.load(data)
        except Exception as error:
            raise _unreadable(uri, error) from error
    else:
        state = load(data, uri, "a state dict of tensors. If you trust the file, import it with cxr import-weights")
    while isinstance(state, Mapping) and (
        key := next((k for k in _WRAPPERS if isinstance(state.get(k), Mapping)), "")
    ):
        state = state[key]
    if not is_state_dict(state):
        raise PythonObjectsError(
            f"{uri} contains a {type(state).__name__}: expected a state dict, a mapping from names to tensors"
        )
    return dict(state)


def is_state_dict(state: object) -> bool:
    """Whether this is a mapping from names to tensors, with at least one."""
    return isinstance(state, Mapping) and bool(state) and all(isinstance(v, Tensor) for v in state.values())


def to_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as the bytes of a safetensors file. Tensors that share memory are stored as separate ones."""
    own = {name: values.detach().cpu().contiguous().clone() for name, values in state.items()}
    return safetensors.torch.save(own)
