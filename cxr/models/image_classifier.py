"""A classifier of images: a backbone, pooling, and a linear layer, with the evidence for its outputs by position.

    features = network.features(x)        # in the backbone's layout
    embedding_BD = network.pool(features)  # network.embed(x)
    logits_BF = network.head(embedding_BD)

The heads `mil` and `lse` apply the linear layer to each position and pool its outputs instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cxr.models.image_backbone import ImageBackbone, image_backbone
from cxr.models.input_contract import InputContract
from cxr.models.mil_loss import log_absent, log_present, unlikely_bias
from cxr.models.multiscale_cam import pool_cells

HeadName = Literal["linear", "mlp", "attention", "mil", "lse"]
HEADS: tuple[HeadName, ...] = get_args(HeadName)
POOLED_HEADS: tuple[HeadName, ...] = ("linear", "mlp")  # those that classify the backbone's own pooled features
POSITION_HEADS: tuple[HeadName, ...] = ("mil", "lse")  # those that classify positions
LSE_R = 6.0  # sharpness of log-sum-exp pooling, as in family `localize`
ATTENTION_WIDTH = 128
MLP_WIDTH = 64


class ImageClassifier(nn.Module):
    """Images (B, 1, H, W) in [0, 1] to logits (B, F), float32.

    Args:
        backbone: see `image_backbone`.
        contract: what the backbone's weights expect as input.
        findings: F names.
        head: linear: a linear layer on the backbone's own pooling. mlp: two layers on it. attention: a linear layer
            on the mean of positions, weighted by a learned attention. mil: a finding is present if it is at some
            position (noisy-or of their probabilities). lse: log-sum-exp of the positions' logits.
    """

    thresholds: Tensor

    def __init__(
        self, backbone: str, contract: InputContract, findings: Sequence[str], head: HeadName = "linear"
    ) -> None:
        super().__init__()
        self.findings, self.contract, self.head_name = tuple(findings), contract, head
        self.backbone: ImageBackbone = image_backbone(
            backbone, contract.channels, contract.size, pools=head in POOLED_HEADS
        )
        self.attention = GatedAttention(self.backbone.width) if head == "attention" else None
        self.head = classification_layers(head, self.backbone.width, len(findings))
        if head == "mil":
            nn.init.constant_(self.head.get_parameter("bias"), unlikely_bias(self._cells_per_side()))
        self.register_buffer("thresholds", torch.full((len(findings),), 0.5, dtype=torch.float64))

    def forward(self, x_B1HW: Tensor) -> Tensor:
        return self.logits(self.features(x_B1HW))

    def features(self, x_B1HW: Tensor) -> Tensor:
        """The backbone's features, in its own layout."""
        return self.backbone(self.contract.apply(x_B1HW))

    def pool(self, features: Tensor) -> Tensor:
        """(B, D) embeddings. With the heads `mil` and `lse`, which need none, the mean of the positions."""
        if self.head_name in POOLED_HEADS:
            return self.backbone.pool(features)
        cells_BDhw = self.backbone.cells(features)
        return cells_BDhw.mean((2, 3)) if self.attention is None else self.attention(cells_BDhw)

    def embed(self, x_B1HW: Tensor) -> Tensor:
        """(B, D) embeddings of images, float32."""
        return self.pool(self.features(x_B1HW)).float()

    def logits(self, features: Tensor) -> Tensor:
        """(B, F) logits, float32."""
        if self.head_name not in POSITION_HEADS:
            return self.head(self.pool(features)).float()
        cells_BFN = self.head(self.backbone.cells(features).flatten(2).mT).mT.float()
        if self.head_name == "lse":
            return pool_cells(cells_BFN, "lse", LSE_R)
        return log_present(cells_BFN) - log_absent(cells_BFN)

    def evidence(self, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, F), and evidence for each of them at each position (B, F, h, w), float32.

        The evidence is the gradient of the logit with respect to the features, times the features (HiResCAM,
        Draelos and Carin 2020, arXiv 2011.08891). With a linear head on averaged features it equals the class
        activation map (Zhou et al. 2016): its sum is the logit without the bias. Where a class token is pooled, the
        features are the tokens before the last block. In evaluation mode only; also works within inference mode.
        """
        with torch.inference_mode(False), torch.no_grad():
            x_B1HW = x_B1HW.clone()  # not an inference tensor
            mixing = self.backbone.last_mixing
            if mixing is None:
                features = self.features(x_B1HW).requires_grad_()
                with torch.enable_grad():
                    logits_BF = self.logits(features)
            else:
                logits_BF, features = _with_gradients_from(mixing, self, x_B1HW)
            by_finding = []
            for one_F in torch.eye(len(self.findings), device=x_B1HW.device):
                one_BF = one_F.expand_as(logits_BF)
                (gradient,) = torch.autograd.grad(logits_BF, features, one_BF, retain_graph=True)
                by_finding.append(self.backbone.as_map(gradient.float() * features.float()).sum(1))
            return logits_BF.detach(), torch.stack(by_finding, 1)

    def _cells_per_side(self) -> int:
        was_training = self.training
        with torch.no_grad():
            self.eval()
            blank = torch.zeros(1, self.contract.channels, self.contract.size, self.contract.size)
            side = self.backbone.cells(self.backbone(blank)).shape[-1]
        self.train(was_training)
        return side


def classification_layers(head: HeadName, width: int, findings: int) -> nn.Module:
    """The layers from embeddings (B, width), or from positions, to logits (B, findings)."""
    if head == "mlp":
        return nn.Sequential(nn.Linear(width, MLP_WIDTH), nn.GELU(), nn.Linear(MLP_WIDTH, findings))
    return nn.Linear(width, findings)


class GatedAttention(nn.Module):
    """Positions (B, D, h, w) to their mean (B, D), weighted by gated attention.

    Ilse et al. 2018, "Attention-based deep multiple instance learning" (arXiv 1802.04712).
    """

    def __init__(self, width: int, hidden: int = ATTENTION_WIDTH) -> None:
        super().__init__()
        self.content, self.gate, self.score = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, cells_BDhw: Tensor) -> Tensor:
        cells_BND = cells_BDhw.flatten(2).mT
        scores_BN1 = self.score(self.content(cells_BND).tanh() * self.gate(cells_BND).sigmoid())
        return (scores_BN1.float().softmax(1) * cells_BND).sum(1)


def _with_gradients_from(module: nn.Module, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output of `network`, and the input of its submodule `module`, from which on gradients are recorded.

    Other threads may use the network meanwhile.
    """
    seen: list[Tensor] = []
    thread = get_ident()

    def start_recording(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if get_ident() != thread:
            return None
        torch.set_grad_enabled(True)
        seen.append(inputs[0].detach().requires_grad_())
        return (seen[-1], *inputs[1:])

    hook = module.register_forward_pre_hook(start_recording)
    try:
        with torch.no_grad():
            return network(x), seen[-1]
    finally:
        hook.remove()
