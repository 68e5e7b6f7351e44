"""Training a lung network on phantoms: it generalizes to held-out phantoms and real lungs, and reports failure."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open

from cxr.cli.commands import train_phantom_lungs
from cxr.errors import UserError
from cxr.families import lung_pretraining
from cxr.families.lung_pretraining import LungTraining
from cxr.models.small_unet import LungField


def test_phantoms_have_lung_masks() -> None:
    phantoms = lung_pretraining.render_phantoms(4, 48, seed=3)
    assert phantoms.shape == (4, 2, 48, 48)
    assert phantoms.dtype == torch.uint8
    gray, lungs = phantoms.float().div(255).unbind(1)
    for x, lung in zip(gray, lungs > 0.5, strict=True):
        assert 0.08 < lung.float().mean() < 0.5
        assert x[lung].mean() < x[~lung].mean() + 0.1
    assert torch.equal(phantoms[:2], lung_pretraining.render_phantoms(2, 48, seed=3))


def test_phantoms_are_augmented_in_float32_under_autocast() -> None:
    phantoms = lung_pretraining.render_phantoms(3, 48, seed=3)
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(lung_pretraining._augmented(phantoms, size=32))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
        assert plain.dtype == torch.float32
        assert plain.shape == (3, 1, 32, 32)


def test_failed_training_raises_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lung_steps"):
        lung_pretraining.pretrain(LungTraining(sizes=(32,), phantoms=4, steps=10), str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_weights_carry_their_provenance(tmp_path: Path) -> None:
    network, training = LungField(), LungTraining((32, 48), phantoms=4, steps=10)
    uri = str(tmp_path / "lungs.safetensors")
    lung_pretraining.save_weights(network, training, {"dice": 0.9}, uri, "python jobs/train_phantom_lungs.py")
    with safe_open(uri, "pt") as file:
        provenance = file.metadata()
    assert json.loads(provenance["training"]) == {"sizes": [32, 48], "phantoms": 4, "steps": 10, "seed": 0}
    assert json.loads(provenance["held_out_phantoms"]) == {"dice": 0.9}
    assert provenance["command"] == "python jobs/train_phantom_lungs.py"
    loaded = lung_pretraining.load_weights(uri)
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[name], values) for name, values in network.state_dict().items())


def test_the_shipped_network_is_small_and_records_how_it_was_made() -> None:
    assert lung_pretraining.SHIPPED_FILE.stat().st_size < 5_000_000
    with safe_open(str(lung_pretraining.SHIPPED_FILE), "pt") as file:
        provenance = file.metadata()
    assert "no patient data" in provenance["description"]
    assert provenance["command"] == "cxr train phantom-lungs --out runs/phantom_lungs"


@pytest.mark.parametrize(("size", "least"), [(64, 0.9), (128, 0.95)])
def test_the_shipped_network_segments_the_lungs_of_new_phantoms(size: int, least: float) -> None:
    phantoms = lung_pretraining.render_phantoms(16, size, seed=1)
    assert lung_pretraining.evaluate(shipped(), *phantoms.split(1, 1))["iou"] > least


def test_the_shipped_network_segments_the_lungs_of_patients(real_data: Path) -> None:
    images = []
    for path in sorted((real_data / "montgomery/CXR_png").glob("*.png"))[::4]:
        sides = [
            cv2.imread(str(real_data / "montgomery/ManualMask" / s / path.name), 0) for s in ("leftMask", "rightMask")
        ]
        pair = [cv2.imread(str(path), 0), np.maximum(*sides)]
        images.append([cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA) for image in pair])
    images_B2HW = torch.from_numpy(np.array(images))
    assert lung_pretraining.evaluate(shipped(), *images_B2HW.split(1, 1))["dice"] > 0.9


def shipped() -> LungField:
    network = LungField().eval()
    network.load_state_dict(lung_pretraining.load_weights(lung_pretraining.SHIPPED))
    return network


@pytest.mark.slow
def test_training_generalizes_to_held_out_phantoms() -> None:
    training = LungTraining(sizes=(96,), phantoms=400, steps=250)
    _, metrics = lung_pretraining.train(training, torch.device("cpu"))
    assert metrics["dice"] > 0.93


def test_sizes_that_the_network_never_sees_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--sizes: expected at most 160 px, got 192: .* omit it"):
        train_phantom_lungs.main(train_phantom_lungs.Options(out=str(out), sizes=(64, 192), steps=1))
    assert not out.exists()
