"""The classifier's heads against their formulas, and the evidence for its logits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cxr.models.image_classifier import HEADS, LSE_R, HeadName, ImageClassifier
from cxr.models.input_contract import InputContract, named

FINDINGS = ("Mass", "Nodule", "Hernia")
CONTRACT = named("imagenet", 64)
TOKENS = "timm:vit_tiny_patch16_224"


def classifier(
    head: HeadName = "linear", backbone: str = "small", contract: InputContract = CONTRACT
) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(backbone, contract, FINDINGS, head).eval()


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_linear_head_classifies_the_embedding() -> None:
    network = classifier()
    embedding = network.embed(images())
    torch.testing.assert_close(embedding, network.features(images()).mean((2, 3)))
    torch.testing.assert_close(network(images()), embedding @ network.head.weight.T + network.head.bias)


@torch.no_grad()
def test_attention_is_that_of_ilse_et_al() -> None:
    """Equation 9: weights are a softmax over positions of wᵀ (tanh(V h) ⊙ sigmoid(U h))."""
    network = classifier("attention")
    attention = network.attention
    assert attention is not None
    cells = network.backbone.cells(network.features(images()))
    for cells_Dhw, embedding_D in zip(cells, network.embed(images()), strict=True):
        positions = cells_Dhw.flatten(1).T
        content = (positions @ attention.content.weight.T + attention.content.bias).tanh()
        gate = (positions @ attention.gate.weight.T + attention.gate.bias).sigmoid()
        weights = ((content * gate) @ attention.score.weight[0] + attention.score.bias).softmax(0)
        torch.testing.assert_close(embedding_D, weights @ positions)
    torch.testing.assert_close(network(images()), network.head(network.embed(images())))


@torch.no_grad()
def test_with_multiple_instances_a_finding_is_present_if_it_is_at_some_position() -> None:
    network = classifier("mil")
    cells = network.backbone.cells(network.features(images())).flatten(2).mT
    p_cells = network.head(cells).double().sigmoid()
    torch.testing.assert_close(network(images()).double().sigmoid(), 1 - (1 - p_cells).prod(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["small", TOKENS])
@torch.no_grad()
def test_multiple_instances_start_with_unlikely_findings(backbone: str) -> None:
    network = classifier("mil", backbone)
    network.head.weight.zero_()
    torch.testing.assert_close(network(images()).sigmoid(), torch.full((2, 3), 0.1))


@torch.no_grad()
def test_log_sum_exp_pools_the_logits_of_positions() -> None:
    network = classifier("lse")
    cells = network.backbone.cells(network.features(images())).flatten(2).mT
    logits = network.head(cells).double()
    expected = (LSE_R * logits).exp().mean(1).log() / LSE_R
    torch.testing.assert_close(network(images()).double(), expected, rtol=1e-4, atol=1e-5)


def test_evidence_of_a_linear_head_is_the_class_activation_map() -> None:
    """Zhou et al. 2016, equation 2, divided by the number of positions, so that its sum is the logit."""
    network = classifier()
    logits, evidence = network.evidence(images())
    with torch.no_grad():
        features = network.features(images())
        activation_maps = torch.einsum("fd,bdyx->bfyx", network.head.weight, features) / features[0, 0].numel()
        torch.testing.assert_close(evidence, activation_maps)
        torch.testing.assert_close(logits, network(images()))
        torch.testing.assert_close(evidence.sum((2, 3)) + network.head.bias, logits)


@pytest.mark.parametrize("backbone", ["small", TOKENS])
@pytest.mark.parametrize("head", HEADS)
def test_evidence_is_where_a_change_of_the_image_changes_the_logit(backbone: str, head: HeadName) -> None:
    """Also within inference mode, and it leaves no gradients in the network."""
    network = classifier(head, backbone)
    with torch.inference_mode():
        logits, evidence = network.evidence(images())
        expected = network(images())
    torch.testing.assert_close(logits, expected)
    assert evidence.shape[:2] == (2, 3)
    assert evidence.abs().amax((2, 3)).min() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.is_grad_enabled()


def test_evidence_of_a_class_token_comes_from_the_tokens_before_the_last_block() -> None:
    """A first-order estimate: adding ε times the tokens of a position changes the logit by ε times its evidence."""
    network = classifier("linear", TOKENS)
    _, evidence = network.evidence(images())
    block = network.backbone.last_mixing
    assert block is not None
    step = 1e-3

    def enlarge(_: object, inputs: tuple[Tensor, ...]) -> Tensor:
        tokens = inputs[0].clone()
        tokens[:, 1 + 6] *= 1 + step  # row 1, column 2 of a grid of 4 x 4, after the class token
        return tokens

    with torch.no_grad():
        before = network(images()).double()
        block.register_forward_pre_hook(enlarge)
        changed = (network(images()).double() - before) / step
    torch.testing.assert_close(changed, evidence[:, :, 1, 2].double(), rtol=0.05, atol=2e-3)


def test_several_threads_share_a_network() -> None:
    network = classifier("linear", TOKENS)
    batches = [torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    expected = [network.evidence(batch)[1] for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for found, alone in zip(pool.map(lambda batch: network.evidence(batch)[1], batches), expected, strict=True):
            torch.testing.assert_close(found, alone)


@torch.no_grad()
def test_the_contract_is_applied_inside_the_network() -> None:
    """A network for one channel in [-1024, 1024] sees gray values in that range."""
    network = classifier(contract=named("torchxrayvision", 64))
    seen: list[Tensor] = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(-1, 1, 64, 64))
    assert seen[0].shape == (3, 1, 64, 64)
    assert seen[0][:, 0, 0, 0].tolist() == [-1024, 0, 1024]
