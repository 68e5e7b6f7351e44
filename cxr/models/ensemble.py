"""Several networks as the one module of an ensemble, with thresholds of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Ensemble(nn.Module):
    """Networks that see the same images; `cxr.families.ensemble` combines what they predict.

    Args:
        findings: those of every member, in the order of its outputs.
        buffers: names of buffers that the ensemble has of its own, such as thresholds; initially the first member's.
    """

    def __init__(self, members: Sequence[nn.Module], findings: Sequence[str], buffers: Sequence[str] = ()) -> None:
        super().__init__()
        self.members, self.findings = nn.ModuleList(members), tuple(findings)
        for name in buffers:
            self.register_buffer(name, members[0].get_buffer(name).clone())


class FusedFeatures(Ensemble):
    """Networks whose pooled features, side by side, one head classifies.

    Args:
        members: `ImageClassifier`s, whose own heads are dropped.
        head: from all features (B, D) to logits (B, F).
    """

    def __init__(self, members: Sequence[nn.Module], findings: Sequence[str], head: nn.Module) -> None:
        super().__init__(members, findings, ("thresholds",))
        for member in members:
            member.register_module("head", None)
        self.head = head
