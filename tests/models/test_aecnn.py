"""AE-CNN: the published codec as published, the residual one no worse than resizing, latents as they are stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cxr.models.aecnn import AECNN, Codec, NoCodec, PublishedCodec, ResidualCodec, ResizeCodec, clipped, stepped

FINDINGS = ("Mass", "Nodule")


def made(codec: Codec, bits: int = 8) -> AECNN:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, len(FINDINGS)))
    return AECNN(codec, head, FINDINGS, bits)


def test_the_published_codec_has_1025_parameters_and_keeps_a_sixteenth() -> None:
    codec = PublishedCodec()
    assert sum(p.numel() for p in codec.parameters()) == 1025
    with torch.inference_mode():
        latent = codec.encode(torch.rand(1, 1, 896, 896))
        assert latent.shape == (1, 1, 224, 224)
        assert codec.decode(latent).shape == (1, 1, 896, 896)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("depth", [1, 4])
def test_the_residual_codec_starts_as_plain_resizing(factor: int, depth: int) -> None:
    torch.manual_seed(0)
    codec, plain, x = ResidualCodec(factor, depth, 8), ResizeCodec(factor), torch.rand(2, 1, 32, 48)
    latent = codec.encode(x)
    assert latent.shape == (2, 1, 32 // factor, 48 // factor)
    assert torch.allclose(latent, plain.encode(x), atol=1e-6)
    assert torch.allclose(codec.decode(latent), plain.decode(plain.encode(x)), atol=1e-6)


def test_the_residual_codec_learns_what_resizing_loses() -> None:
    torch.manual_seed(0)
    codec = ResidualCodec(4, 1, 16)
    x = (torch.arange(32) % 4 == 0).float().expand(4, 1, 32, 32)  # stripes that resizing makes an even gray
    optimizer = torch.optim.Adam(codec.parameters(), 1e-2)
    before = (codec.decode(codec.encode(x)) - x).square().mean().item()
    for _ in range(60):
        loss = (codec.decode(codec.encode(x)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * before


@pytest.mark.parametrize("bits", [8, 16])
def test_latents_are_values_that_can_be_stored(bits: int) -> None:
    torch.manual_seed(0)
    network = made(PublishedCodec(), bits)
    latent = network.encode(torch.rand(2, 1, 32, 32))
    steps = latent.double() * (2**bits - 1)
    assert torch.allclose(steps, steps.round(), atol=1e-2)
    assert latent.min() >= 0
    assert latent.max() <= 1


def test_rounding_lets_gradients_through() -> None:
    x = torch.rand(100, requires_grad=True)
    rounded = stepped(x, 8)
    assert not torch.equal(rounded, x)
    assert (rounded - x).abs().max() <= 0.5 / 255 + 1e-6
    rounded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(100))


def test_gradients_move_clipped_values_back_into_range_only() -> None:
    values = torch.tensor([-1.0, -1.0, 0.5, 2.0, 2.0], requires_grad=True)
    kept = clipped(values)
    assert kept.tolist() == [0, 0, 0.5, 1, 1]
    kept.backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))  # a step goes against the gradient
    assert values.grad is not None
    assert values.grad.tolist() == [0, -1, 1, 1, 0]


def test_without_a_codec_the_classifier_sees_the_image() -> None:
    network, x = made(NoCodec(), 16), torch.rand(3, 1, 16, 16)
    logits, decoded = network(x)
    assert torch.allclose(decoded, x, atol=1e-4)
    assert torch.allclose(logits, network.classifier(x), atol=1e-4)


def test_the_published_codec_starts_as_resizing() -> None:
    codec = PublishedCodec()
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 1, 64, 64)
    slope = ramp + 0.1 * ramp.transpose(2, 3)
    decoded = codec.decode(codec.encode(slope))
    assert (decoded - slope)[..., 8:-8, 8:-8].abs().max() < 1e-5
    assert all(parameter.requires_grad for parameter in codec.parameters())


def test_all_of_the_published_codec_learns() -> None:
    torch.manual_seed(0)
    codec = PublishedCodec()
    optimizer = torch.optim.SGD(codec.parameters(), lr=0.1)
    x = torch.rand(2, 1, 32, 32)
    for _ in range(2):  # what mixes the channels moves first, then the channels
        optimizer.zero_grad()
        (codec.decode(codec.encode(x)) - x).square().mean().backward()
        optimizer.step()
    assert all((p.grad != 0).any() for p in codec.parameters())
