"""Baselines that ignore the image: boxes at random places, and the mean box of the training images."""

from __future__ import annotations

import numpy as np

from cxr.metrics.localization.box_arrays import Boxes

RANDOM, CENTER = "random", "center"
_SIDES = (
    1 / 16,
    1 / 2,
)  # range of the sides of random boxes of a finding without training boxes, as fractions of the image
_MIDDLE = (1 / 4, 1 / 4, 3 / 4, 3 / 4)


def baselines(training: Boxes, images: int, findings: int, seed: int = 0) -> dict[str, Boxes]:
    """Both baselines by name, as fractions of the image, like `training`."""
    return {
        RANDOM: random_boxes(training, images, findings, seed),
        CENTER: center_boxes(training, images, findings),
    }


def random_boxes(training: Boxes, images: int, findings: int, seed: int = 0) -> Boxes:
    """One box per image and finding, at a random place, with the width and height of a random training box.

    For a finding without training boxes, sides are log-uniform from 1/16 to 1/2 of the image. Both sets of boxes are
    fractions of the image. Deterministic in `seed` and the images' order.
    """
    rng = np.random.default_rng(seed)
    sides = np.stack([_sides(training, finding, images, rng) for finding in range(findings)], axis=1)
    low = rng.uniform(size=sides.shape) * (1 - sides)
    return _everywhere(np.concatenate([low, low + sides], axis=2))


def _sides(training: Boxes, finding: int, images: int, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) widths and heights."""
    own = training.xyxy[training.finding == finding]
    if not len(own):
        return np.exp(rng.uniform(*np.log(_SIDES), size=(images, 2)))
    return np.clip(own[:, 2:] - own[:, :2], 0, 1)[rng.integers(len(own), size=images)]


def center_boxes(training: Boxes, images: int, findings: int) -> Boxes:
    """One box per image and finding: the mean of its training boxes, or the middle half of the image if there are
    none.

    Both sets of boxes are fractions of the image.
    """
    own = [training.xyxy[training.finding == finding] for finding in range(findings)]
    means = np.array([boxes.mean(0) if len(boxes) else _MIDDLE for boxes in own]).reshape(1, findings, 4)
    return _everywhere(np.repeat(means, images, axis=0))


def _everywhere(xyxy_NF4: np.ndarray) -> Boxes:
    images, findings, _ = xyxy_NF4.shape
    image, finding = np.indices((images, findings)).reshape(2, -1)
    return Boxes(image, finding, xyxy_NF4.reshape(-1, 4), np.full(len(image), np.nan))
