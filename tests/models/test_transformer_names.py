"""Vision transformers of Hugging Face, Meta, OpenAI and EVA in timm's networks: nothing is missing."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr.models import pretrained
from cxr.models.image_backbone import timm_network

WIDTH, DEPTH, HEADS, PATCH = 32, 2, 2, 14
SMALL: dict[str, Any] = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def hugging_face_dinov2(side: int) -> dict[str, Tensor]:
    """The layout of `transformers.Dinov2Model`, which RAD-DINO has, with side x side patches."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, side * side + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            shapes |= {f"{layer}{name}.weight": (WIDTH, WIDTH), f"{layer}{name}.bias": (WIDTH,)}
        shapes |= {f"{layer}attention.output.dense.weight": (WIDTH, WIDTH)}
        shapes |= {f"{layer}attention.output.dense.bias": (WIDTH,)}
        shapes |= {f"{layer}norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{layer}layer_scale{n}.lambda1": (WIDTH,) for n in (1, 2)}
        shapes |= {f"{layer}mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{layer}mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{layer}mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{layer}mlp.fc2.bias": (WIDTH,)}
    return random_state(shapes)


def dinov2(size: int) -> nn.Module:
    return timm.create_model("vit_small_patch14_dinov2", img_size=size, **SMALL).eval()


def dinov2_by_hand(state: dict[str, Tensor], x_B3HW: Tensor) -> Tensor:
    """The class token that `Dinov2Model` computes, from its names."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    stem = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(x_B3HW, state[f"{stem}.weight"], state[f"{stem}.bias"], PATCH).flatten(2).mT
    x = torch.cat([state["embeddings.cls_token"].expand(len(patches), -1, -1), patches], 1)
    x = x + state["embeddings.position_embeddings"]
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        seen = norm(f"{layer}.norm1", x)
        q, k, v = (
            linear(f"{layer}.attention.attention.{part}", seen).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(f"{layer}.attention.output.dense", mixed) * state[f"{layer}.layer_scale1.lambda1"]
        hidden = F.gelu(linear(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", x)))
        x = x + linear(f"{layer}.mlp.fc2", hidden) * state[f"{layer}.layer_scale2.lambda1"]
    return norm("layernorm", x)[:, 0]


@pytest.mark.parametrize("prefix", ["", "dinov2.", "backbone.body."])
def test_rad_dino_in_hugging_faces_names_gives_the_same_class_token(prefix: str) -> None:
    state, network = hugging_face_dinov2(4), dinov2(4 * PATCH)
    fit = pretrained.load(network, {prefix + name: values for name, values in state.items()}, "the backbone")
    assert (fit.loaded, fit.kept, fit.unused) == (len(network.state_dict()), (), ())
    x = torch.rand(2, 3, 4 * PATCH, 4 * PATCH)
    with torch.no_grad():
        torch.testing.assert_close(network.forward_features(x)[:, 0], dinov2_by_hand(state, x), rtol=1e-4, atol=1e-4)  # pyright: ignore


def test_position_embeddings_are_resized_and_colors_summed() -> None:
    network = timm.create_model("vit_small_patch14_dinov2", img_size=4 * PATCH, in_chans=1, **SMALL)
    fit = pretrained.load(network, hugging_face_dinov2(6), "the backbone")
    assert fit.adapted == (
        "renamed from Hugging Face's DINOv2 to timm's names",
        "pos_embed resized from 1x37x32 to 1x17x32",
        "patch_embed.proj.weight: summed over 3 input channels",
    )


def test_dinov2_in_metas_names_loads() -> None:
    network = dinov2(4 * PATCH)
    state = {name: values + 1 for name, values in network.state_dict().items()}
    state["mask_token"] = torch.zeros(1, WIDTH)
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, WIDTH)
    fit = pretrained.load(network, {f"teacher.{name}": values for name, values in state.items()}, "the backbone")
    assert fit.adapted == ("pos_embed resized from 1x1370x32 to 1x17x32",)
    assert torch.equal(network.state_dict()["blocks.0.ls1.gamma"], state["blocks.0.ls1.gamma"])


def clip_vit() -> dict[str, Tensor]:
    """The layout of OpenAI's CLIP with a small image encoder."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (1,),
        "transformer.resblocks.0.ln_1.weight": (8,),  # of the text encoder
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (10, WIDTH),
        "visual.proj": (WIDTH, 16),
        "visual.conv1.weight": (WIDTH, 3, 32, 32),
    }
    norms = ("visual.ln_pre", "visual.ln_post")
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}."
        norms += (f"{block}ln_1", f"{block}ln_2")
        shapes |= {f"{block}attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}attn.in_proj_bias": (3 * WIDTH,)}
        shapes |= {f"{block}attn.out_proj.weight": (WIDTH, WIDTH), f"{block}attn.out_proj.bias": (WIDTH,)}
        shapes |= {f"{block}mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{block}mlp.c_fc.bias": (4 * WIDTH,)}
        shapes |= {f"{block}mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{block}mlp.c_proj.bias": (WIDTH,)}
    shapes |= {f"{norm}.{kind}": (WIDTH,) for norm in norms for kind in ("weight", "bias")}
    return random_state(shapes)


def test_openais_clip_loads() -> None:
    network = timm.create_model("vit_base_patch32_clip_224", img_size=96, **SMALL)
    state = clip_vit()
    fit = pretrained.load(network, state, "the backbone")
    assert fit.loaded == len(network.state_dict())
    assert fit.adapted == ("renamed to timm's names",)
    loaded = network.state_dict()
    assert torch.equal(loaded["blocks.1.attn.qkv.bias"], state["visual.transformer.resblocks.1.attn.in_proj_bias"])


def eva_x(fused: bool) -> dict[str, Tensor]:
    """The layout of EVA-X's pretraining: EVA-02 with patches of 16 px; -Ti and -S have fused layers, -B has not."""
    hidden = int(WIDTH * 4 * 2 / 3)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "mask_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + 14 * 14, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
        "rope.freqs_cos": (196, 16),
        "rope.freqs_sin": (196, 16),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "lm_head.weight": (512, WIDTH),
        "lm_head.bias": (512,),
    }
    for i in range(DEPTH):
        block = f"blocks.{i}."
        shapes |= {f"{block}{name}.{kind}": (WIDTH,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.{name}": (WIDTH,) for name in ("q_bias", "v_bias", "proj.bias")}
        shapes |= {f"{block}attn.proj.weight": (WIDTH, WIDTH)}
        if fused:
            shapes |= {f"{block}attn.qkv.weight": (3 * WIDTH, WIDTH)}
            shapes |= {f"{block}mlp.w12.weight": (2 * hidden, WIDTH), f"{block}mlp.w12.bias": (2 * hidden,)}
        else:
            shapes |= {f"{block}attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkv"}
            shapes |= {f"{block}mlp.{name}.weight": (hidden, WIDTH) for name in ("w1", "w2")}
            shapes |= {f"{block}mlp.{name}.bias": (hidden,) for name in ("w1", "w2")}
            shapes |= {f"{block}mlp.ffn_ln.{kind}": (hidden,) for kind in ("weight", "bias")}
        shapes |= {f"{block}mlp.w3.weight": (WIDTH, hidden), f"{block}mlp.w3.bias": (WIDTH,)}
    return random_state(shapes)


@pytest.mark.parametrize(("name", "fused"), [("eva_x_small_patch16", True), ("eva_x_base_patch16", False)])
def test_eva_x_loads(name: str, fused: bool) -> None:
    network = timm_network(name, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    state = eva_x(fused)
    fit = pretrained.load(network, state, "the backbone")
    assert (fit.loaded, fit.kept, fit.unused) == (len(network.state_dict()), (), ())
    loaded = network.state_dict()
    assert torch.equal(loaded["fc_norm.weight"], state["norm.weight"])
    assert torch.equal(loaded["blocks.1.mlp.fc2.weight"], state["blocks.1.mlp.w3.weight"])


def test_weights_of_another_size_are_rejected() -> None:
    network = timm.create_model("vit_small_patch14_dinov2", img_size=56, **(SMALL | {"embed_dim": 64}))
    with pytest.raises(ValueError, match=r"of the backbone: expected shape 1 x 1 x 64, got 1 x 1 x 32"):
        pretrained.load(network, hugging_face_dinov2(4), "the backbone")
