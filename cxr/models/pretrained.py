"""Pretrained weights: from the value of a setting to tensors in a network. All families load foreign weights here.

A setting that names weights is empty (none), the path or URI of a state dict or of a checkpoint folder, a torchvision
name such as IMAGENET1K_V1, or `auto`: torchvision's IMAGENET1K_V1 if they can be downloaded. Named weights are
required; only `auto` falls back to random weights. Weights take three steps:

1. Where the job starts, `resolve` reads them once, has the recipe check and select what it needs, and stores that in
   OUT/weights. The setting becomes the URI of this copy.
2. Workers read the copy with `from_uri`. They need neither the internet nor files of the submitting machine.
3. `load` puts them into a network, or says in one line why they do not fit.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cxr import storage
from cxr.errors import UserError

AUTO, AUTO_NAME = "auto", "IMAGENET1K_V1"
TIMEOUT_S = 15.0  # of torchvision's server
CHECKPOINT_WEIGHTS, CHECKPOINT_ABOUT = "weights.safetensors", "checkpoint.json"  # in a checkpoint folder
SAFETENSORS = ".safetensors"
STORE = "weights"  # in OUT
SOURCE, UNAVAILABLE = "source.json", "unavailable.json"  # in a folder of OUT/weights; the first is written last
COUNTER = "num_batches_tracked"  # of batch norms: old files lack it, and no forward pass uses it
_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


class NotWeightsError(UserError):
    """A file that is not a state dict of tensors."""


@dataclass(frozen=True)
class Weights:
    """A state dict, and the `checkpoint.json` of the checkpoint it comes from; None for a plain file."""

    state: Mapping[str, Tensor]
    about: Mapping[str, Any] | None = None

    @property
    def findings(self) -> tuple[str, ...] | None:
        """The checkpoint's findings, in the order of its outputs."""
        return tuple(self.about["findings"]) if self.about else None


class HasInitialWeights(Protocol):
    """The members of a recipe that `resolve` uses; see `families.base.Recipe`."""

    def initial_weights(self) -> dict[str, str]: ...
    def fit_weights(self, setting: str, weights: Weights) -> Mapping[str, Tensor]: ...
    def without_weights(self, setting: str) -> Self | None: ...
    def replace(self, **changes: Any) -> Self: ...


SomeRecipe = TypeVar("SomeRecipe", bound=HasInitialWeights)


# Step 1: copy what a recipe names to OUT/weights.


def resolve(recipe: SomeRecipe, settings: Mapping[str, str], out: str) -> tuple[SomeRecipe, list[str]]:
    """The recipe with URIs of copies in OUT/weights in place of the weights it names, and notes for the user.

    Args:
        settings: those of `recipe.initial_weights()` to resolve.

    Raises:
        UserError: named weights are not available or do not fit.
    """
    notes: list[str] = []
    for setting, network in settings.items():
        value = getattr(recipe, setting)
        if not value or value.startswith(f"{storage.join(out, STORE)}/"):
            continue
        try:
            recipe = recipe.replace(**{setting: _stored(recipe, setting, network, out)})
        except OSError as error:
            fallback = recipe.without_weights(setting) if value == AUTO else None
            if fallback is None:
                raise UserError(_unavailable(setting, network, value, error)) from error
            notes.append(f"{_unavailable(setting, network, value, error)}. Training continues without them")
            storage.write_json(storage.join(out, STORE, key(value, network), UNAVAILABLE), str(error))
            recipe = fallback
    return recipe, notes


def _stored(recipe: HasInitialWeights, setting: str, network: str, out: str) -> str:
    """URI of the copy in OUT of the weights that `setting` names, made unless it exists.

    Later runs in the same OUT start from the same weights: a torchvision name always means the same file, a file at a
    URI is compared with its copy as long as it exists, and `auto` falls back again if it did the first time.

    Raises:
        UserError: the weights do not fit, or differ from those of an earlier run in OUT.
        OSError: torchvision's server cannot be reached.
    """
    value = getattr(recipe, setting)
    folder = storage.join(out, STORE, key(value, network))
    exists = storage.exists(storage.join(folder, SOURCE))
    if exists and not (is_uri(value) and storage.exists(value)):
        return folder
    unavailable = storage.join(folder, UNAVAILABLE)
    if value == AUTO and storage.exists(unavailable):
        raise OSError(f"at the first run in {out}: {storage.read_json(unavailable)}")
    weights = _read(setting, network, value)
    try:
        state = recipe.fit_weights(setting, weights)
    except ValueError as error:
        family = weights.about.get("recipe", {}).get("family") if weights.about else None
        origin = f", a checkpoint of family {family!r}," if family else ""
        raise UserError(f"{setting}={value}{origin} does not fit: {error}") from error
    sha256 = digest(state)
    if exists and sha256 != sha256_of(folder):
        raise UserError(
            f"{setting}={value} contains other weights than those that an earlier run in {out} started from: give "
            f"another --out, or delete {folder} to use the new weights there"
        )
    if not exists:
        source = storage.normalize(value) if is_uri(value) else value
        _write(folder, state, weights.about, {"given": source, "network": network, "sha256": sha256})
    return folder


def _read(setting: str, network: str, value: str) -> Weights:
    if is_uri(value):
        return Weights(from_uri(value), about_of(value))
    if not network:
        raise UserError(
            f"{setting}={value}: expected the path or URI of a state dict or checkpoint; torchvision has no weights "
            f"for this network. Begin the path of a file in the working directory with ./"
        )
    return Weights(from_torchvision(network, AUTO_NAME if value == AUTO else value))


def _write(folder: str, state: Mapping[str, Tensor], about: Mapping[str, Any] | None, source: dict[str, str]) -> None:
    storage.write_bytes(storage.join(folder, CHECKPOINT_WEIGHTS), to_safetensors(state))
    if about is not None:
        storage.write_json(storage.join(folder, CHECKPOINT_ABOUT), dict(about))
    storage.write_json(storage.join(folder, SOURCE), source)


def _unavailable(setting: str, network: str, value: str, error: OSError) -> str:
    from torchvision.models import get_model_weights  # imported here because it takes seconds

    name, option = AUTO_NAME if value == AUTO else value, f"--{setting.replace('_', '-')}"
    return (
        f"{setting}={value}: torchvision's {name} weights for {network} could not be fetched ({error}). Download "
        f"{get_model_weights(network)[name].url} where there is internet access, and give the file's path or URI as "
        f"{option}; or leave {option} out to train without them"
    )


def key(value: str, network: str = "") -> str:
    """Name of the folder in OUT/weights for a setting's value; a torchvision name needs the network."""
    if not is_uri(value):
        return f"{network}-{AUTO_NAME if value == AUTO else value}"
    uri = storage.normalize(value)
    return f"{storage.name(uri)}-{hashlib.blake2b(uri.encode(), digest_size=4).hexdigest()}"


def sources(recipe: HasInitialWeights) -> dict[str, dict[str, str] | None]:
    """For the record: where the weights of each setting came from; None if there were none."""
    return {setting: _source(getattr(recipe, setting)) for setting in recipe.initial_weights()}


def _source(value: str) -> dict[str, str] | None:
    if not value:
        return None
    about = storage.join(value, SOURCE)
    return {**(storage.read_json(about) if storage.exists(about) else {"given": value}), "uri": value}


def sha256_of(stored: str) -> str:
    """SHA-256 of the tensors in a folder that `resolve` made; see `digest`."""
    return storage.read_json(storage.join(stored, SOURCE))["sha256"]


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and values of a state dict, in any order."""
    total = hashlib.sha256()
    for name, values in sorted(state.items()):
        total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        total.update(np.ascontiguousarray(values.contiguous().flatten().view(torch.uint8).numpy()).data)
    return total.hexdigest()


def to_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as the bytes of a safetensors file. Tensors that share memory are stored as separate ones."""
    own = {name: values.detach().cpu().contiguous().clone() for name, values in state.items()}
    return safetensors.torch.save(own)


# Step 2: read a state dict.


def is_uri(weights: str) -> bool:
    """Whether this is a URI or path, and not one of torchvision's names such as IMAGENET1K_V1."""
    return "/" in weights or weights.endswith((".pt", ".pth", SAFETENSORS))


def from_uri(uri: str) -> Mapping[str, Tensor]:
    """The state dict in a file (safetensors or `torch.save`) or a checkpoint folder; never runs a pickle's code.

    Raises:
        NotFoundError: there is nothing at the URI.
        NotWeightsError: it is not a state dict.
    """
    inside = storage.join(uri, CHECKPOINT_WEIGHTS)
    file = inside if storage.exists(inside) else uri
    data = storage.read_bytes(file)
    try:
        state: Any = (
            safetensors.torch.load(data)
            if file.endswith(SAFETENSORS)
            else torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        )
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
            f"{uri} holds a {type(state).__name__}: expected a state dict, a mapping from names to tensors"
        )
    return _with_current_names(state)


def about_of(uri: str) -> dict[str, Any] | None:
    """The `checkpoint.json` of a checkpoint folder; None for a plain file of weights."""
    about = storage.join(uri, CHECKPOINT_ABOUT)
    return storage.read_json(about) if storage.exists(about) else None


def findings_of(uri: str) -> tuple[str, ...] | None:
    """The findings of a checkpoint folder, in order; None for a plain file of weights."""
    return Weights({}, about_of(uri)).findings


def from_torchvision(network: str, name: str) -> Mapping[str, Tensor]:
    """torchvision's weights, from its cache on this machine or from its server, checked by their hash.

    Raises:
        UserError: `network` has no weights of this name.
        OSError: the server cannot be reached, or the download is damaged.
    """
    from torchvision.models import get_model_weights  # imported here because it takes seconds

    known = get_model_weights(network)
    if name not in known.__members__:
        raise UserError(
            f"torchvision has no {name!r} weights for {network}: expected {', '.join(known.__members__)}, or a path "
            f"or URI. Begin the path of a file in the working directory with ./"
        )
    try:
        with _socket_timeout():
            return _with_current_names(
                known[name].get_state_dict(progress=False, check_hash=True, map_location="cpu")
            )
    except (RuntimeError, EOFError, HTTPException, pickle.UnpicklingError) as error:  # wrong hash; truncated file
        raise OSError(str(error).partition("\n")[0]) from error


def _with_current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with today's names of DenseNet's layers; torchvision's files still say `denselayer1.norm.1`."""
    return {_OLD_DENSENET_NAME.sub(r"\1\2", name): values for name, values in state.items()}


@contextmanager
def _socket_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# Step 3: put it into a network.


def load(
    network: nn.Module, state: Mapping[str, Tensor], what: str, *, exact: bool = False, skip: Sequence[str] = ()
) -> None:
    """Load a state dict into `network`; see `match` for what fits.

    Args:
        what: the network in words, for the error message.
        exact: the state dict must have exactly the network's names.
        skip: prefixes of parameters that keep their values.

    Raises:
        ValueError: the weights do not fit; the message says in one line how they differ.
    """
    own = network.state_dict()
    required = {name: values for name, values in own.items() if not name.startswith(tuple(skip))}
    network.load_state_dict(own | match(required, state, what, exact=exact))


def match(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str, *, exact: bool = False
) -> dict[str, Tensor]:
    """The tensors of `weights` under the names of `own` and in its shapes, without missing batch-norm counters.

    `weights` may be the state dict of a larger network that contains this one: its names may have any prefix. The
    weights of a linear layer fit a convolution of the same size.

    Args:
        own: the state dict of the network, or of the part to load.
        what: the network in words, for the error message.
        exact: `weights` must have the same names: no prefix, and no other tensors.

    Raises:
        ValueError: tensors are missing or have other shapes; the message says in one line which.
    """
    names = [name for name in own if not name.endswith(COUNTER)]
    prefixes = [""] if exact else _prefixes(names, weights)
    misfits = {
        prefix: [name for name in names if not _fits(own[name], weights.get(prefix + name))] for prefix in prefixes
    }
    prefix = min(
        prefixes, key=lambda prefix: (len(misfits[prefix]), sum(prefix + name not in weights for name in names))
    )
    if misfits[prefix]:
        raise ValueError(_difference(own, weights, prefix, names, misfits[prefix], what))
    extra = [name for name in weights if name not in own] if exact else []
    if extra:
        raise ValueError(f"they have {_count(extra)} that {what} does not have, such as {extra[0]}")
    return {name: weights[prefix + name].reshape(own[name].shape) for name in own if prefix + name in weights}


def _prefixes(names: Sequence[str], weights: Mapping[str, Tensor]) -> list[str]:
    """Candidates for the prefix of the names in a larger network; the empty one is always among them."""
    ends = (names[0], names[-1])
    prefixes = (name.removesuffix(end) for end in ends for name in weights if name.endswith(f".{end}"))
    return list(dict.fromkeys(["", *prefixes]))


def _fits(own: Tensor, weight: Tensor | None) -> bool:
    if weight is None:
        return False
    linear_as_convolution = (weight.ndim, own.ndim) == (2, 4) and weight.numel() == own.numel()
    return weight.shape == own.shape or linear_as_convolution


def _difference(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    prefix: str,
    names: Sequence[str],
    misfits: Sequence[str],
    what: str,
) -> str:
    missing = [name for name in misfits if prefix + name not in weights]
    if len(missing) == len(names):
        return f"they have none of the {len(names)} tensors of {what}, such as {names[0]}"
    if missing:
        return f"they lack {len(missing)} of the {len(names)} tensors of {what}, such as {prefix}{missing[0]}"
    first = misfits[0]
    shapes = f"expected shape {_shape(own[first])}, got {_shape(weights[prefix + first])}"
    channels = _channels(own[first], weights[prefix + first])
    more = f"; {len(misfits) - 1} more tensors differ in shape" if len(misfits) > 1 else ""
    return f"{prefix}{first} of {what}: {shapes}{channels}{more}"


def _channels(own: Tensor, weight: Tensor) -> str:
    """A remark for two convolutions that differ only in their input channels."""
    if own.ndim == weight.ndim == 4 and own[:, 0].shape == weight[:, 0].shape:
        return f" (input channels: expected {own.shape[1]}, got {weight.shape[1]})"
    return ""


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "of a single number"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"
