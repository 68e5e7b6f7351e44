"""Is an image an upright frontal chest X-ray, not inverted? The header decides where it can, else a small network.

The network (cxr/data/gate.safetensors, 54,000 weights, made by `cxr train gate`) sees the whole image at 64 px. It
is applied with NumPy, because decoding does not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file

from cxr.imaging import dicom_terms, geometry
from cxr.imaging.image import to_bits
from cxr.wording import counted

SIZE = 64
FRONTAL = "frontal"
INVERTED = "inverted"
EXCLUDED = "not an upright frontal chest X-ray"  # start of the error of an excluded image
CLASSES = (FRONTAL, "rotated 90", "rotated 180", "rotated 270", "lateral", "not a chest")
"""The network's classes, in the order of its logits; rotations are clockwise degrees. One more logit says that
the gray values are inverted (dense tissue dark)."""
WEIGHTS = Path(__file__).with_suffix(".safetensors")
PASSING_SCORE = 0.5
_BATCH = 64  # bounds the memory of the convolutions' windows


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) uint8 from an image (H, W) of any size, uint8 or uint16; dense tissue is bright."""
    return to_bits(geometry.fit(pixels, SIZE)[0], 8)


def header_verdict(view: str | None, body_part: str | None, modality: str | None) -> str | None:
    """Why codes of `imaging.dicom_terms` rule out a frontal chest X-ray, such as "view LATERAL"; None if they do
    not."""
    return next(iter(dicom_terms.other_than_frontal_chest([view], [body_part], [modality])), None)


def not_frontal(column: pa.ChunkedArray) -> dict[str, int]:
    """Number of images in a column `gate` that are not upright frontal chest X-rays, by kind."""
    counts = Counter(column.to_pylist())
    return {name: count for name, count in counts.items() if name not in (None, FRONTAL)}


def describe(counts: Mapping[str, int]) -> str:
    """The counts of `not_frontal` in words."""
    listed = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    total = sum(counts.values())
    verb, what = ("does", "an upright frontal chest X-ray") if total == 1 else ("do", "upright frontal chest X-rays")
    return f"{counted(total, 'image')} {verb} not look like {what}: {listed}"


def is_excluded(error: str) -> bool:
    """Whether an error says that the image was excluded here, not that it cannot be used."""
    return error.startswith(EXCLUDED)


def verdicts(thumbnails_NHW: np.ndarray, weights: Path = WEIGHTS) -> tuple[list[str], np.ndarray]:
    """What each image is, FRONTAL, INVERTED or another of CLASSES, and (N,) float32 scores.

    The score is the estimated probability that the image is an upright frontal chest X-ray that is not inverted;
    FRONTAL are those with at least PASSING_SCORE.

    Args:
        thumbnails_NHW: uint8, from `thumbnail`.
        weights: file with the network's weights.
    """
    logits = np.concatenate(
        [np.empty((0, len(CLASSES) + 1), np.float32)]
        + [_logits(standardize(part), _weights(weights)) for part in _batches(thumbnails_NHW)]
    )
    classes = np.exp(logits[:, :-1] - logits[:, :-1].max(1, keepdims=True, initial=-np.inf))
    classes /= classes.sum(1, keepdims=True)
    upright = 1 / (1 + np.exp(logits[:, -1]))
    scores = (classes[:, 0] * upright).astype(np.float32)
    best = classes.argmax(1)
    names = [
        FRONTAL if score >= PASSING_SCORE else INVERTED if kind == 0 else CLASSES[kind]
        for score, kind in zip(scores, best.tolist(), strict=True)
    ]
    return names, scores


def standardize(images_NHW: np.ndarray) -> np.ndarray:
    """float32 with mean 0 and standard deviation 1 for each image."""
    images = images_NHW.astype(np.float32)
    mean, deviation = images.mean((1, 2), keepdims=True), images.std((1, 2), keepdims=True)
    return (images - mean) / (deviation + 0.25)


def _batches(images: np.ndarray) -> list[np.ndarray]:
    return [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]


@cache
def _weights(file: Path) -> dict[str, np.ndarray]:
    return load_file(file)


def _logits(x_NHW: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """`models.gate_network.GateNetwork` with `folded` weights: (N, classes + 1)."""
    x = x_NHW[..., None]
    for layer in range(sum(name.endswith(".weight") for name in weights) - 1):
        kernel_OIHW, bias_O = weights[f"conv{layer}.weight"], weights[f"conv{layer}.bias"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows_NHWIhw = sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
        x = np.maximum(np.tensordot(windows_NHWIhw, kernel_OIHW, ((3, 4, 5), (1, 2, 3))) + bias_O, 0)
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1) @ weights["head.weight"].T + weights["head.bias"]
