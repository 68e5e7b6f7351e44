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
import pickle
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cxr import storage
from cxr.errors import UserError
from cxr.models import transformer_names, weight_files
from cxr.models.weight_files import CHECKPOINT_WEIGHTS, to_safetensors

AUTO, AUTO_NAME = "auto", "IMAGENET1K_V1"
TIMEOUT_S = 15.0  # of torchvision's server
CHECKPOINT_ABOUT = "checkpoint.json"  # in a checkpoint folder
STORE = "weights"  # in OUT
SOURCE, UNAVAILABLE = "source.json", "unavailable.json"  # in a folder of OUT/weights; the first is written last
COUNTER = "num_batches_tracked"  # of batch norms: old files lack it, and no forward pass uses it
_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


@dataclass(frozen=True)
class Weights:
    """A state dict, and the `checkpoint.json` of the checkpoint it comes from; None for a plain file."""

    state: Mapping[str, Tensor]
    about: Mapping[str, Any] | None = None

    @property
    def findings(self) -> tuple[str, ...] | None:
        """The checkpoint's findings, in the order of its outputs."""
        return tuple(self.about["findings"]) if self.about else None


@dataclass(frozen=True)
class Fit:
    """How weights fit a network."""

    state: Mapping[str, Tensor]
    """Tensors under the network's names and in its shapes."""
    loaded: int
    """Number of the network's tensors that the weights have, without batch-norm counters."""
    adapted: tuple[str, ...] = ()
    """What was changed to make them fit, in words."""
    kept: tuple[str, ...] = ()
    """Names of the network's tensors that keep their initial values."""
    unused: tuple[str, ...] = ()
    """Names of the tensors that the network does not have."""

    def summary(self) -> str:
        """All of it in one line."""
        parts = [f"{self.loaded} tensors loaded", *self.adapted]
        if self.kept:
            parts.append(f"{_some(self.kept)} of the network not loaded, since the weights do not have them")
        if self.unused:
            parts.append(f"{_some(self.unused)} of the weights not used")
        return "; ".join(parts)

    def describe(self) -> dict[str, Any]:
        """All of it as JSON, for the record."""
        names = {name: list(getattr(self, name)) for name in ("adapted", "kept", "unused")}
        return {"loaded": self.loaded, **names}


class HasInitialWeights(Protocol):
    """The members of a recipe that `resolve` uses; see `families.base.Recipe`."""

    def initial_weights(self) -> dict[str, str]: ...
    def fit_weights(self, setting: str, weights: Weights) -> Fit: ...
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
            stored, fit = _stored(recipe, setting, network, out)
            recipe = recipe.replace(**{setting: stored})
            if fit is not None:
                notes.append(f"{setting}={value}: {fit.summary()}")
        except OSError as error:
            fallback = recipe.without_weights(setting) if value == AUTO else None
            if fallback is None:
                raise UserError(_unavailable(setting, network, value, error)) from error
            notes.append(f"{_unavailable(setting, network, value, error)}. Training continues without them")
            storage.write_json(storage.join(out, STORE, key(value, network), UNAVAILABLE), str(error))
            recipe = fallback
    return recipe, notes


def _stored(recipe: HasInitialWeights, setting: str, network: str, out: str) -> tuple[str, Fit | None]:
    """URI of the copy in OUT of the weights that `setting` names, and how they fit if the copy is new.

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
        return folder, None
    unavailable = storage.join(folder, UNAVAILABLE)
    if value == AUTO and storage.exists(unavailable):
        raise OSError(f"at the first run in {out}: {storage.read_json(unavailable)}")
    weights = _read(setting, network, value)
    try:
        fit = recipe.fit_weights(setting, weights)
    except ValueError as error:
        family = weights.about.get("recipe", {}).get("family") if weights.about else None
        origin = f", a checkpoint of family {family!r}," if family else ""
        raise UserError(f"{setting}={value}{origin} does not fit: {error}") from error
    sha256 = digest(fit.state)
    if exists and sha256 != sha256_of(folder):
        raise UserError(
            f"{setting}={value} contains other weights than those that an earlier run in {out} started from: use "
            f"another --out, or delete {folder} to use the new weights there"
        )
    if exists:
        return folder, None
    source = {"given": storage.normalize(value) if is_uri(value) else value, "network": network, "sha256": sha256}
    _write(folder, fit.state, weights.about, {**source, "fit": fit.describe()})
    return folder, fit


def _read(setting: str, network: str, value: str) -> Weights:
    if is_uri(value):
        return Weights(from_uri(value), about_of(value))
    if not network:
        raise UserError(
            f"{setting}={value}: expected the path or URI of a state dict or checkpoint; torchvision has no weights "
            f"for this network. Begin the path of a file in the working directory with ./"
        )
    return Weights(from_torchvision(network, AUTO_NAME if value == AUTO else value))


def _write(folder: str, state: Mapping[str, Tensor], about: Mapping[str, Any] | None, source: dict[str, Any]) -> None:
    storage.write_bytes(storage.join(folder, CHECKPOINT_WEIGHTS), to_safetensors(state))
    if about is not None:
        storage.write_json(storage.join(folder, CHECKPOINT_ABOUT), dict(about))
    storage.write_json(storage.join(folder, SOURCE), source)


def _unavailable(setting: str, network: str, value: str, error: OSError) -> str:
    from torchvision.models import get_model_weights  # imported here because it takes seconds

    name, option = AUTO_NAME if value == AUTO else value, f"--{setting.replace('_', '-')}"
    return (
        f"{setting}={value}: torchvision's {name} weights for {network} could not be fetched ({error}). Download "
        f"{get_model_weights(network)[name].url} where there is internet access, and use the file's path or URI as "
        f"{option}; or leave {option} out to train without them"
    )


def key(value: str, network: str = "") -> str:
    """Name of the folder in OUT/weights for a setting's value; a torchvision name needs the network."""
    if not is_uri(value):
        return f"{network}-{AUTO_NAME if value == AUTO else value}"
    uri = storage.normalize(value)
    return f"{storage.name(uri)}-{hashlib.blake2b(uri.encode(), digest_size=4).hexdigest()}"


def sources(recipe: HasInitialWeights) -> dict[str, dict[str, Any] | None]:
    """For the record: where the weights of each setting came from; None if there were none."""
    return {setting: _source(getattr(recipe, setting)) for setting in recipe.initial_weights()}


def _source(value: str) -> dict[str, Any] | None:
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


# Step 2: read a state dict.


def is_uri(weights: str) -> bool:
    """Whether this is a URI or path, and not one of torchvision's names such as IMAGENET1K_V1."""
    return "/" in weights or weights.endswith(weight_files.SUFFIXES)


def from_uri(uri: str) -> dict[str, Tensor]:
    """The state dict in a file (safetensors or `torch.save`), a checkpoint folder, or a folder of a model hub.

    Never runs a pickle's code.

    Raises:
        NotFoundError: there is nothing at the URI.
        NotWeightsError: it is not a state dict.
    """
    return with_current_names(weight_files.read(uri))


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
            return with_current_names(known[name].get_state_dict(progress=False, check_hash=True, map_location="cpu"))
    except (RuntimeError, EOFError, HTTPException, pickle.UnpicklingError) as error:  # wrong hash; truncated file
        raise OSError(str(error).partition("\n")[0]) from error


def with_current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
) -> Fit:
    """Load a state dict into `network`; see `match` for what fits. timm's networks also take the names of others.

    Args:
        what: the network in words, for the error message.
        exact: the state dict must have exactly the network's names and shapes.
        skip: prefixes of parameters that keep their values.

    Raises:
        ValueError: the weights do not fit; the message says in one line how they differ.
    """
    own = network.state_dict()
    required = {name: values for name, values in own.items() if not name.startswith(tuple(skip))}
    converted, changes = (state, []) if exact else transformer_names.to_timm(state, network)
    fit = match(required, converted, what, exact=exact)
    network.load_state_dict({**own, **fit.state})
    kept = [name for name in own if name not in required and not name.endswith(COUNTER)]
    return replace(fit, adapted=(*changes, *fit.adapted), kept=tuple(kept))


def match(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str, *, exact: bool = False) -> Fit:
    """The tensors of `weights` under the names of `own` and in its shapes, without missing batch-norm counters.

    `weights` may be the state dict of a larger network that contains this one: its names may have any prefix. The
    weights of a linear layer fit a convolution of the same size. A first convolution for color images fits one for
    gray images, and the reverse: its weights are summed over colors, or repeated and divided by three. Either gives
    the same output for images whose three channels are equal.

    Args:
        own: the state dict of the network, or of the part to load.
        what: the network in words, for the error message.
        exact: `weights` must have the same names, shapes and channels: no prefix, and no other tensors.

    Raises:
        ValueError: tensors are missing or have other shapes; the message says in one line which.
    """
    names = [name for name in own if not name.endswith(COUNTER)]
    prefixes = [""] if exact else _prefixes(names, weights)
    misfits = {
        prefix: [name for name in names if _fitted(own[name], weights.get(prefix + name), exact) is None]
        for prefix in prefixes
    }
    prefix = min(
        prefixes, key=lambda prefix: (len(misfits[prefix]), sum(prefix + name not in weights for name in names))
    )
    if misfits[prefix]:
        raise ValueError(_difference(own, weights, prefix, names, misfits[prefix], what))
    used = {prefix + name for name in own}
    unused = tuple(name for name in weights if name not in used and not name.endswith(COUNTER))
    if exact and unused:
        raise ValueError(f"they have {_count(unused)} that {what} does not have, such as {unused[0]}")
    state, adapted = {}, []
    for name in own:
        if prefix + name in weights:
            fitted = _fitted(own[name], weights[prefix + name], exact)
            assert fitted is not None
            state[name], change = fitted
            adapted += [f"{name}: {change}"] if change else []
    return Fit(state, len(names), tuple(adapted), unused=unused)


def _prefixes(names: Sequence[str], weights: Mapping[str, Tensor]) -> list[str]:
    """Candidates for the prefix of the names in a larger network; the empty one is always among them."""
    ends = (names[0], names[-1])
    prefixes = (name.removesuffix(end) for end in ends for name in weights if name.endswith(f".{end}"))
    return list(dict.fromkeys(["", *prefixes]))


def _fitted(own: Tensor, weight: Tensor | None, exact: bool) -> tuple[Tensor, str] | None:
    """`weight` in the shape of `own`, and what was changed, in words; None if it does not fit."""
    if weight is None:
        return None
    linear_as_convolution = (weight.ndim, own.ndim) == (2, 4) and weight.numel() == own.numel()
    if weight.shape == own.shape or linear_as_convolution:
        return weight.reshape(own.shape), ""
    if exact or own.ndim != 4 or weight.ndim != 4 or own[:, 0].shape != weight[:, 0].shape:
        return None
    match weight.shape[1], own.shape[1]:
        case 3, 1:
            return weight.sum(1, keepdim=True), "summed over 3 input channels"
        case 1, 3:
            return weight.repeat(1, 3, 1, 1) / 3, "repeated for 3 input channels and divided by 3"
    return None


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


def _some(names: Sequence[str]) -> str:
    """The number of tensors and up to two of their names."""
    more = ", …" if len(names) > 2 else ""
    return f"{_count(names)} ({', '.join(names[:2])}{more})"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"
