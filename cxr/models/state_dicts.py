"""Tensors for a network out of another network's state dict, and one line that says why they do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

COUNTER = "num_batches_tracked"  # of batch norms; old files lack it, and no forward pass uses it


def matching(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, *, whole: bool = False
) -> dict[str, Tensor]:
    """The tensors of `given` under `own`'s names and with its shapes; counters that are missing are left out.

    `given` may be the state of a larger network that contains this one: its names may begin with any prefix. The
    weights of a linear layer fit a convolution with equally many.

    Args:
        own: the state dict of the network, or of the part of it, that is to be loaded.
        what: the network in words, for the message.
        whole: `given` must have the same names, without a prefix and without more.

    Raises:
        ValueError: tensors are missing or of other shapes; the message says which, in one line.
    """
    names = [name for name in own if not name.endswith(COUNTER)]
    prefixes = [""] if whole else _prefixes(names, given)
    misfits = {
        prefix: [name for name in names if not _fits(own[name], given.get(prefix + name))] for prefix in prefixes
    }
    prefix = min(
        prefixes, key=lambda prefix: (len(misfits[prefix]), sum(prefix + name not in given for name in names))
    )
    if misfits[prefix]:
        raise ValueError(_difference(own, given, prefix, names, misfits[prefix], what))
    extra = [name for name in given if name not in own] if whole else []
    if extra:
        raise ValueError(f"they have {_count(extra)} that {what} does not have, such as {extra[0]}")
    return {name: given[prefix + name].reshape(own[name].shape) for name in own if prefix + name in given}


def _prefixes(names: Sequence[str], given: Mapping[str, Tensor]) -> list[str]:
    """What may stand before the names in a larger network; always also nothing."""
    ends = (names[0], names[-1])
    found = (name.removesuffix(end) for end in ends for name in given if name.endswith(f".{end}"))
    return list(dict.fromkeys(["", *found]))


def _fits(own: Tensor, given: Tensor | None) -> bool:
    if given is None:
        return False
    unrolled = (given.ndim, own.ndim) == (2, 4) and given.numel() == own.numel()
    return given.shape == own.shape or unrolled


def _difference(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    prefix: str,
    names: Sequence[str],
    misfits: Sequence[str],
    what: str,
) -> str:
    missing = [name for name in misfits if prefix + name not in given]
    if len(missing) == len(names):
        return f"they have none of the {len(names)} tensors of {what}, such as {names[0]}"
    if missing:
        return f"they lack {len(missing)} of the {len(names)} tensors of {what}, such as {prefix}{missing[0]}"
    first = misfits[0]
    shapes = f"expected shape {_shape(own[first])}, got {_shape(given[prefix + first])}"
    channels = _channels(own[first], given[prefix + first])
    more = f"; {len(misfits) - 1} more tensors differ in shape" if len(misfits) > 1 else ""
    return f"{prefix}{first} of {what}: {shapes}{channels}{more}"


def _channels(own: Tensor, given: Tensor) -> str:
    """Where two convolutions differ in their input channels alone: that they do."""
    if own.ndim == given.ndim == 4 and own[:, 0].shape == given[:, 0].shape:
        return f" (input channels: expected {own.shape[1]}, got {given.shape[1]})"
    return ""


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "of a single number"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"
