"""The gate: its verdicts, its network in NumPy, and its use in ingest and scoring."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cxr import schema
from cxr.data import gate
from cxr.data.decode import make_rows
from cxr.families.gate_training import TURNS, measure, read_frontal, render_images, save_weights, train
from cxr.families.gate_training import GateTraining as Training
from cxr.models.gate_network import GateNetwork
from cxr.schema import PixelFormat
from cxr.sources import open_manifest

PIXELS = PixelFormat(96)


@pytest.fixture(scope="module")
def held_out():
    return render_images(24, seed=5, first=10_000)


def test_upright_frontal_phantoms_pass_and_all_others_do_not(held_out) -> None:
    passed = measure(held_out.frontal)
    assert passed["upright"] >= 0.95
    assert all(share <= 0.05 for name, share in passed.items() if name != "upright")
    assert max(measure(held_out.lateral).values()) <= 0.05
    assert max(measure(held_out.other).values()) <= 0.05


def test_verdicts_name_the_kind_of_image(held_out) -> None:
    small = np.stack([gate.thumbnail(image) for image in held_out.frontal.numpy()])
    for turn in TURNS:
        turned = np.rot90(small, -turn // 90, (1, 2))
        names, scores = gate.verdicts(turned)
        expected = f"rotated {turn}" if turn else "frontal"
        assert names.count(expected) >= 0.95 * len(small)
        assert ((scores >= gate.PASSING_SCORE) == [name == "frontal" for name in names]).all()
    assert gate.verdicts(255 - small)[0].count("inverted") >= 0.9 * len(small)
    assert gate.verdicts(small[:0])[0] == []


def test_numpy_applies_the_network_that_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = GateNetwork(gate.SIZE, len(gate.CLASSES) + 1)
    network(torch.randn(64, 1, gate.SIZE, gate.SIZE) * 2 + 1)  # statistics of the batch normalization
    save_weights(network.eval(), Training(), {}, str(tmp_path / "weights.safetensors"))
    images = np.random.default_rng(0).integers(0, 256, (70, gate.SIZE, gate.SIZE), np.uint8)
    with torch.no_grad():
        logits = network(torch.from_numpy(gate.standardize(images))[:, None])
    scores = logits[:, :-1].softmax(1)[:, 0] * (-logits[:, -1]).sigmoid()
    np.testing.assert_allclose(gate.verdicts(images, tmp_path / "weights.safetensors")[1], scores, atol=1e-5)


@pytest.mark.slow
def test_a_short_training_learns_and_writes_weights(tmp_path: Path) -> None:
    network = train(Training(phantoms=24, steps=40), [])
    save_weights(network, Training(phantoms=24, steps=40), {}, str(tmp_path / "gate.safetensors"))
    frontal = measure(render_images(16, seed=1, first=500).frontal, tmp_path / "gate.safetensors")
    assert frontal["upright"] > frontal["inverted_rotated_180"]


def test_rows_contain_the_verdict_and_excluded_images_are_errors(tmp_path: Path) -> None:
    image = render_images(1, seed=5, first=10_000).frontal[0].numpy()
    for name, pixels in {"a": image, "b": np.rot90(image), "c": 255 - image}.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), pixels)
    (tmp_path / "d.png").write_bytes(b"no image")
    manifest = open_manifest(str(tmp_path)).table
    unchecked = make_rows(manifest, PIXELS)
    assert unchecked[schema.GATE].null_count == 4
    warned = make_rows(manifest, PIXELS, check="warn")
    assert warned[schema.GATE].to_pylist() == ["frontal", "rotated 270", "inverted", None]
    assert warned.drop_columns([schema.GATE, schema.GATE_SCORE]) == unchecked.drop_columns(
        [schema.GATE, schema.GATE_SCORE]
    )
    excluded = make_rows(manifest, PIXELS, check="exclude")
    errors = excluded[schema.ERROR].to_pylist()
    assert errors[:3] == [None, f"{gate.EXCLUDED}: rotated 270", f"{gate.EXCLUDED}: inverted"]
    assert [error is not None and gate.is_excluded(error) for error in errors] == [False, True, True, False]
    assert excluded[schema.PIXELS].is_null().to_pylist() == [False, True, True, True]
    assert gate.not_frontal(excluded[schema.GATE]) == {"rotated 270": 1, "inverted": 1}


def test_a_header_that_names_another_view_decides_alone() -> None:
    assert gate.header_verdict("LL", "CHEST", "DX") == "view LL"
    assert gate.header_verdict("PA", "HAND", "DX") == "body part HAND"
    assert gate.header_verdict(None, None, "CT") == "modality CT"
    assert gate.header_verdict("PA", "CHEST", "CR") is None
    assert gate.header_verdict(None, None, None) is None


@pytest.mark.parametrize("archive", ["montgomery", "shenzhen"])
def test_real_x_rays_that_were_not_trained_on(real_data: Path, archive: str) -> None:
    passed = measure(read_frontal(str(real_data / archive), None))
    assert passed["upright"] >= 0.98
    assert max(share for name, share in passed.items() if name != "upright") <= 0.05
