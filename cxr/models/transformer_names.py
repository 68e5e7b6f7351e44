"""Weights of vision transformers that have other names than timm's: those of Hugging Face, Meta, OpenAI and EVA.

timm knows the original names of its networks, and resizes position and patch embeddings (`checkpoint_filter_fn` of
each of its modules). It does not know those that Hugging Face's transformers library gives DINOv2.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# transformers/models/dinov2/convert_dinov2_to_hf.py, create_rename_keys and read_in_q_k_v, in reverse
_HUGGING_FACE = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.weights_in.", ".mlp.w12."),
    (".mlp.weights_out.", ".mlp.w3."),
    ("layernorm.", "norm."),
)
_HUGGING_FACE_QKV = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(?:query|key|value)\.(weight|bias)")
_HUGGING_FACE_STEM = "embeddings.patch_embeddings.projection.weight"
_STEMS = (_HUGGING_FACE_STEM, "patch_embed.proj.weight", "visual.conv1.weight")  # each in one kind of state dict


def to_timm(state: Mapping[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict under the names of `network`, and what was changed, in words.

    Nothing is changed unless `network` is one of timm's that has other names elsewhere.

    Raises:
        ValueError: the position or patch embeddings cannot be resized to those of `network`.
    """
    module = type(network).__module__
    convert = getattr(sys.modules[module], "checkpoint_filter_fn", None) if module.startswith("timm.") else None
    if convert is None:
        return dict(state), []
    given = _without_prefix(state)
    changes: list[str] = []
    if _HUGGING_FACE_STEM in given:
        given, changes = _from_hugging_face(given), ["renamed from Hugging Face's DINOv2 to timm's names"]
    try:
        converted: dict[str, Tensor] = convert(dict(given), network)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"timm cannot convert them to {type(network).__name__}: {error}") from error
    if not changes and converted.keys() != given.keys() and not converted.keys() <= given.keys():
        changes = ["renamed to timm's names"]
    for name, values in converted.items():
        if name in given and given[name].shape != values.shape:
            before, after = ("x".join(map(str, tensor.shape)) for tensor in (given[name], values))
            changes.append(f"{name} resized from {before} to {after}")
    return converted, changes


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with names as the published file would have them, if it is part of a larger network."""
    for stem in _STEMS:
        for name in state:
            if name == stem or name.endswith(f".{stem}"):
                prefix = name.removesuffix(stem)
                return {other.removeprefix(prefix): values for other, values in state.items()}
    return dict(state)


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 from the names of Hugging Face's transformers to Meta's."""
    renamed: dict[str, Tensor] = {}
    for name, values in state.items():
        if found := _HUGGING_FACE_QKV.fullmatch(name):
            block, kind = found.groups()
            parts = (f"encoder.layer.{block}.attention.attention.{part}.{kind}" for part in ("query", "key", "value"))
            renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([state[part] for part in parts])
            continue
        for theirs, metas in _HUGGING_FACE:
            name = name.replace(theirs, metas)
        renamed[name] = values
    return renamed
