"""Weights by name and by URI, and what is said when they cannot be had."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

from cxr.errors import UserError
from cxr.models import perceptual
from cxr.models.classifier import Classifier, load_body
from cxr.recipes import weights


def test_names_and_uris_are_told_apart() -> None:
    assert not weights.is_uri("IMAGENET1K_V1")
    assert all(map(weights.is_uri, ("s3://bucket/run", "/data/vgg.pth", "vgg.pth")))


def test_files_and_checkpoint_folders_are_read(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "weights.pt")
    for uri in (str(tmp_path), str(tmp_path / "weights.pt")):
        torch.testing.assert_close(dict(weights.from_uri(uri)), state)


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "list.pt"):
        with pytest.raises(UserError, match=r"[wW]anted a state dict"):
            weights.from_uri(str(tmp_path / name))
    with pytest.raises(UserError):
        weights.from_uri(str(tmp_path / "missing.pt"))


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        weights.from_torchvision("vgg16", "IMAGENET")


def test_an_unreachable_server_is_an_os_error_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patience = []

    def unreachable(*args: object, **options: object) -> None:
        patience.append(socket.getdefaulttimeout())
        raise OSError("unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(OSError, match="unreachable"):
        weights.from_torchvision("vgg16", "IMAGENET1K_V1")
    assert patience == [weights.PATIENCE_S]
    assert socket.getdefaulttimeout() is None


def test_torchvision_s_old_files_are_understood(tmp_path: Path) -> None:
    classifier = Classifier("densenet121", 3)
    state = classifier.body.state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): v for name, v in state.items()}
    old = {name: v for name, v in old.items() if not name.endswith("num_batches_tracked")}
    assert any("denselayer1.norm.1.weight" in name for name in old)
    torch.save(old, tmp_path / "densenet121.pth")
    found = weights.from_uri(str(tmp_path / "densenet121.pth"))
    fresh = Classifier("densenet121", 3)
    load_body(fresh, found, head=True)
    assert torch.equal(
        fresh.body.features.denseblock1.denselayer1.conv1.weight,
        state["features.denseblock1.denselayer1.conv1.weight"],
    )
    assert perceptual.build("densenet121", found, 5) is not None
