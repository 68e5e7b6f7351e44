"""Teaching lungs by phantoms: it works on unseen phantoms, says when it does not, and carries over to real lungs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cxr.errors import UserError
from cxr.families import lung_pretraining
from cxr.families.lung_pretraining import Lesson
from cxr.models.backbones import normalise_contrast
from cxr.models.small_unet import soft_dice


def test_phantoms_come_with_their_lungs() -> None:
    chests = lung_pretraining.draw_chests(4, 48, seed=3)
    assert chests.shape == (4, 2, 48, 48)
    assert chests.dtype == torch.uint8
    gray, lungs = chests.float().div(255).unbind(1)
    for x, lung in zip(gray, lungs > 0.5, strict=True):
        assert 0.08 < lung.float().mean() < 0.5
        assert x[lung].mean() < x[~lung].mean() + 0.1
    assert torch.equal(chests[:2], lung_pretraining.draw_chests(2, 48, seed=3))


def test_phantoms_are_augmented_in_float32_under_autocast() -> None:
    chests = lung_pretraining.draw_chests(3, 48, seed=3)
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(lung_pretraining._varied(chests))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
        assert plain.dtype == torch.float32


def test_a_lesson_that_taught_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lung_steps"):
        lung_pretraining.kept(Lesson(size=32, phantoms=4, steps=10, seed=0), str(tmp_path))
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_lungs_learnt_from_phantoms_are_found_in_real_images(real_data: Path) -> None:
    network, dice = lung_pretraining.taught(Lesson(size=96, phantoms=400, steps=250, seed=0), torch.device("cpu"))
    assert dice > 0.93
    real = []
    for path in sorted((real_data / "montgomery/CXR_png").glob("*.png"))[::4]:
        sides = [
            cv2.imread(str(real_data / "montgomery/ManualMask" / s / path.name), 0) for s in ("leftMask", "rightMask")
        ]
        lungs = np.maximum(*sides)
        pictures = [cv2.imread(str(path), 0), lungs]
        real.append([cv2.resize(x, (96, 96), interpolation=cv2.INTER_AREA) for x in pictures])
    gray, lungs = torch.from_numpy(np.array(real)).float().div(255).split(1, 1)
    with torch.no_grad():
        found = network(normalise_contrast(gray))
    assert soft_dice(found > 0.5, lungs > 0.5).mean() > 0.88
