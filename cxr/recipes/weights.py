"""Weights for frozen networks: torchvision's by name, or a state dict or checkpoint by URI."""

from __future__ import annotations

import io
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cxr import storage
from cxr.errors import UserError

PATIENCE_S = 15.0  # without an answer from torchvision's server
CHECKPOINT_WEIGHTS, CHECKPOINT_ABOUT = "weights.pt", "checkpoint.json"  # in a checkpoint folder
_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def is_uri(weights: str) -> bool:
    """A URI or path, rather than one of torchvision's names such as IMAGENET1K_V1."""
    return "/" in weights or weights.endswith((".pt", ".pth"))


def named(network: str, given: str) -> Mapping[str, Tensor]:
    """What `given` stands for: `from_uri`, or `from_torchvision` of `network`."""
    return from_uri(given) if is_uri(given) else from_torchvision(network, given)


def from_scratch(setting: str, network: str, given: str, error: OSError) -> str:
    """What to tell a user whose `setting` names weights that cannot be had here."""
    return (
        f"{network}'s weights {given} cannot be had here ({error}): it is trained from scratch. Or copy the weights "
        f"to storage and give their URI as {setting}"
    )


def from_torchvision(network: str, name: str) -> Mapping[str, Tensor]:
    """The state dict, from torchvision's cache on this machine or, checked by its hash, from its server.

    Raises:
        UserError: `network` has no weights of this name.
        OSError: the server cannot be reached, or sent something else.
    """
    from torchvision.models import get_model_weights  # here, for it takes seconds to import

    known = get_model_weights(network)
    if name not in known.__members__:
        raise UserError(f"{network} has no weights {name!r}: wanted {', '.join(known.__members__)} or a URI")
    try:
        with _impatient():
            return renamed(known[name].get_state_dict(progress=False, check_hash=True, map_location="cpu"))
    except RuntimeError as error:  # torch.hub's word for a wrong hash
        raise OSError(str(error)) from error


def from_uri(uri: str) -> Mapping[str, Tensor]:
    """A state dict's file, or the network's weights in a checkpoint folder; no pickle is run.

    Raises:
        UserError: nothing there, or something that is no state dict.
    """
    inside = storage.join(uri, CHECKPOINT_WEIGHTS)
    data = storage.read_bytes(inside if storage.exists(inside) else uri)
    try:
        state: Any = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise UserError(f"{uri} cannot be read as weights: {error}. Wanted a state dict of tensors") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{uri} holds a {type(state).__name__}: wanted a state dict of tensors")
    return renamed(state)


def findings_of(uri: str) -> tuple[str, ...] | None:
    """The findings of a checkpoint folder, in order; None for a mere file of weights."""
    about = storage.join(uri, CHECKPOINT_ABOUT)
    return tuple(storage.read_json(about)["findings"]) if storage.exists(about) else None


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with today's names for DenseNet's layers: torchvision's files still say `denselayer1.norm.1`."""
    return {_OLD_NAME.sub(r"\1\2", name): values for name, values in state.items()}


@contextmanager
def _impatient() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
