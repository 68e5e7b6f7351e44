"""Weights that training starts from: read once where the job starts, stored in OUT, and read from there by workers.

A setting that names weights is empty (none), the path or URI of a state dict or of a checkpoint folder, a
torchvision name such as IMAGENET1K_V1, or `auto`: torchvision's IMAGENET1K_V1 where they can be fetched. Weights that
are named are required; only `auto` falls back. `resolve` replaces each by the URI of a copy in OUT/weights, so that
no worker needs the internet, or a file that only one machine can read.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from cxr import storage
from cxr.errors import UserError

AUTO, AUTO_NAME = "auto", "IMAGENET1K_V1"
PATIENCE_S = 15.0  # without an answer from torchvision's server
CHECKPOINT_WEIGHTS, CHECKPOINT_ABOUT = "weights.pt", "checkpoint.json"  # in a checkpoint folder
STORE = "weights"  # in OUT
SOURCE, UNAVAILABLE = "source.json", "unavailable.json"  # in a folder of OUT/weights; the first is written last
_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


class NotWeightsError(UserError):
    """A file that is not a state dict of tensors."""


@dataclass(frozen=True)
class Weights:
    """A state dict, and what the checkpoint that it was read from says of itself; None for a mere file."""

    state: Mapping[str, Tensor]
    about: Mapping[str, Any] | None = None

    @property
    def findings(self) -> tuple[str, ...] | None:
        """The findings of the checkpoint, in order."""
        return tuple(self.about["findings"]) if self.about else None


class Starting(Protocol):
    """What `resolve` needs of a recipe; see `recipes.base.Recipe`."""

    def initial_weights(self) -> dict[str, str]: ...
    def fit_weights(self, setting: str, given: Weights) -> Mapping[str, Tensor]: ...
    def without_weights(self, setting: str) -> Self | None: ...
    def replace(self, **changes: Any) -> Self: ...


SomeStarting = TypeVar("SomeStarting", bound=Starting)


def resolve(recipe: SomeStarting, settings: Mapping[str, str], out: str) -> tuple[SomeStarting, list[str]]:
    """The recipe with a copy in OUT/weights in place of the weights that it names, and what to tell the user.

    Args:
        settings: those of `recipe.initial_weights()` to look at.

    Raises:
        UserError: weights that were named cannot be had, or do not fit.
    """
    notes: list[str] = []
    for setting, network in settings.items():
        given = getattr(recipe, setting)
        if not given or given.startswith(f"{storage.join(out, STORE)}/"):
            continue
        try:
            recipe = recipe.replace(**{setting: _stored(recipe, setting, network, out)})
        except OSError as error:
            without = recipe.without_weights(setting) if given == AUTO else None
            if without is None:
                raise UserError(_unavailable(setting, network, given, error)) from error
            notes.append(f"{_unavailable(setting, network, given, error)}. Training goes on without them")
            storage.write_json(storage.join(out, STORE, key(given, network), UNAVAILABLE), str(error))
            recipe = without
    return recipe, notes


def _stored(recipe: Starting, setting: str, network: str, out: str) -> str:
    """URI of the copy in OUT of the weights that `setting` names, which is made unless it is there.

    What a run in OUT has started from stays: a torchvision name always stands for the same weights, a file at a URI
    is compared with its copy as long as it exists, and where `auto` has fallen back it falls back again.

    Raises:
        UserError: the weights do not fit, or are not those that an earlier run in OUT started from.
        OSError: torchvision's server cannot be reached.
    """
    given = getattr(recipe, setting)
    folder = storage.join(out, STORE, key(given, network))
    have = storage.exists(storage.join(folder, SOURCE))
    if have and not (is_uri(given) and storage.exists(given)):
        return folder
    earlier = storage.join(folder, UNAVAILABLE)
    if given == AUTO and storage.exists(earlier):
        raise OSError(f"at the first run in {out}: {storage.read_json(earlier)}")
    loaded = _named(setting, network, given)
    try:
        state = recipe.fit_weights(setting, loaded)
    except ValueError as error:
        family = loaded.about.get("recipe", {}).get("family") if loaded.about else None
        which = f", a checkpoint of family {family!r}," if family else ""
        raise UserError(f"{setting}={given}{which} does not fit: {error}") from error
    sha256 = digest(state)
    if have and sha256 != sha256_of(folder):
        raise UserError(
            f"{setting}={given} holds other weights than those that an earlier run in {out} started from: give "
            f"another --out, or delete {folder} to use the new weights there"
        )
    if not have:
        source = storage.normalize(given) if is_uri(given) else given
        _write(folder, state, loaded.about, {"given": source, "network": network, "sha256": sha256})
    return folder


def _named(setting: str, network: str, given: str) -> Weights:
    if is_uri(given):
        return Weights(from_uri(given), about_of(given))
    if not network:
        raise UserError(
            f"{setting}={given}: expected the path or URI of a state dict or checkpoint; torchvision has no weights "
            f"for this network. Begin the path of a file in the working directory with ./"
        )
    return Weights(from_torchvision(network, AUTO_NAME if given == AUTO else given))


def _write(folder: str, state: Mapping[str, Tensor], about: Mapping[str, Any] | None, source: dict[str, str]) -> None:
    data = io.BytesIO()
    torch.save(dict(state), data)
    storage.write_bytes(storage.join(folder, CHECKPOINT_WEIGHTS), data.getvalue())
    if about is not None:
        storage.write_json(storage.join(folder, CHECKPOINT_ABOUT), dict(about))
    storage.write_json(storage.join(folder, SOURCE), source)


def _unavailable(setting: str, network: str, given: str, error: OSError) -> str:
    from torchvision.models import get_model_weights  # here, for it takes seconds to import

    name, option = AUTO_NAME if given == AUTO else given, f"--{setting.replace('_', '-')}"
    return (
        f"{setting}={given}: torchvision's {name} weights for {network} could not be fetched ({error}). Download "
        f"{get_model_weights(network)[name].url} where there is internet access, and give the file's path or URI as "
        f"{option}; or leave {option} out to train without them"
    )


def key(given: str, network: str = "") -> str:
    """Name of the folder in OUT/weights with the weights that `given` stands for; of `network`, if it is a name."""
    if not is_uri(given):
        return f"{network}-{AUTO_NAME if given == AUTO else given}"
    uri = storage.normalize(given)
    return f"{storage.name(uri)}-{hashlib.blake2b(uri.encode(), digest_size=4).hexdigest()}"


def sources(recipe: Starting) -> dict[str, dict[str, str] | None]:
    """Where the weights of each setting that names some came from, for the record; None: there were none."""
    return {setting: _source(getattr(recipe, setting)) for setting in recipe.initial_weights()}


def _source(value: str) -> dict[str, str] | None:
    if not value:
        return None
    about = storage.join(value, SOURCE)
    return {**(storage.read_json(about) if storage.exists(about) else {"given": value}), "uri": value}


def sha256_of(stored: str) -> str:
    """Of the tensors in a folder that `resolve` made."""
    return storage.read_json(storage.join(stored, SOURCE))["sha256"]


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and values of a state dict."""
    total = hashlib.sha256()
    for name, values in state.items():
        total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        total.update(np.ascontiguousarray(values.contiguous().flatten().view(torch.uint8).numpy()).data)
    return total.hexdigest()


def is_uri(weights: str) -> bool:
    """A URI or path, rather than one of torchvision's names such as IMAGENET1K_V1."""
    return "/" in weights or weights.endswith((".pt", ".pth"))


def from_torchvision(network: str, name: str) -> Mapping[str, Tensor]:
    """The state dict, from torchvision's cache on this machine or, checked by its hash, from its server.

    Raises:
        UserError: `network` has no weights of this name.
        OSError: the server cannot be reached, or what it sent is damaged.
    """
    from torchvision.models import get_model_weights  # here, for it takes seconds to import

    known = get_model_weights(network)
    if name not in known.__members__:
        raise UserError(
            f"torchvision has no {name!r} weights for {network}: expected {', '.join(known.__members__)}, or a path "
            f"or URI. Begin the path of a file in the working directory with ./"
        )
    try:
        with _impatient():
            return renamed(known[name].get_state_dict(progress=False, check_hash=True, map_location="cpu"))
    except (RuntimeError, EOFError, HTTPException, pickle.UnpicklingError) as error:  # a wrong hash; half a file
        raise OSError(str(error).partition("\n")[0]) from error


def from_uri(uri: str) -> Mapping[str, Tensor]:
    """A state dict's file, or the network's weights in a checkpoint folder; no pickle is run.

    Raises:
        NotFound: nothing is there.
        NotWeightsError: it is not a state dict.
    """
    inside = storage.join(uri, CHECKPOINT_WEIGHTS)
    data = storage.read_bytes(inside if storage.exists(inside) else uri)
    try:
        state: Any = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise NotWeightsError(
            f"{uri} holds Python objects, which are not loaded: expected a state dict of tensors"
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise NotWeightsError(
            f"{uri} cannot be read as weights ({reason}): expected a state dict of tensors"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(values, Tensor) for values in state.values()):
        raise NotWeightsError(
            f"{uri} holds a {type(state).__name__}: expected a state dict, names with their tensors"
        )
    return renamed(state)


def about_of(uri: str) -> dict[str, Any] | None:
    """What a checkpoint folder says of itself; None for a mere file of weights."""
    about = storage.join(uri, CHECKPOINT_ABOUT)
    return storage.read_json(about) if storage.exists(about) else None


def findings_of(uri: str) -> tuple[str, ...] | None:
    """The findings of a checkpoint folder, in order; None for a mere file of weights."""
    return Weights({}, about_of(uri)).findings


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
