"""Masks are compared as runs with the same result as pixel by pixel, in one process and in several."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from cxr import schema
from cxr.evaluation import mask_comparison
from cxr.evaluation.mask_comparison import ImageMasks, PublishedMask, compare, compare_all
from cxr.metrics.segmentation import overlap_rows
from cxr.metrics.segmentation.boundary import boundary
from cxr.sources import rle

HEIGHT, WIDTH = 90, 70


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """An ellipse with rough edges; empty in one of five."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    center, radii = rng.uniform(20, 60, 2), rng.uniform(8, 30, 2)
    distance = np.hypot((y - center[0]) / radii[0], (x - center[1]) / radii[1]) + rng.normal(0, 0.05, y.shape)
    return (distance < 1) & (rng.random() > 0.2)


def absolute(mask: np.ndarray, *, rows: bool = False) -> str:
    flat = np.pad((mask if rows else mask.T).reshape(-1), 1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]).reshape(-1, 2)
    return " ".join(f"{start + 1} {end - start}" for start, end in edges[::-1].tolist()) or rle.EMPTY


def entry(mask: np.ndarray, form: str | None) -> dict[str, Any]:
    code = absolute(mask, rows=form == "absolute-rows") if form else rle.encode(mask)
    empty = dict.fromkeys(schema.MASK_SOURCE_TYPE.names)
    return {**empty, schema.LABEL: "Lungs", schema.MASK_RLE: code, schema.MASK_FORM: form}


def slow_hd95(predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, float]) -> float:
    if not predicted.any() or not true.any():
        return math.nan
    outlines = boundary(predicted), boundary(true)
    ends = []
    for ours, theirs in (outlines, outlines[::-1]):
        away: Any = distance_transform_edt(~theirs, sampling=spacing)
        ends.append(np.percentile(away[ours], 95))
    return max(ends)


def made(count: int) -> list[tuple[np.ndarray, np.ndarray, ImageMasks]]:
    rng, images = np.random.default_rng(0), []
    for number in range(count):
        predicted, left, right = (random_mask(rng) for _ in range(3))
        form = (None, "absolute", "absolute-rows")[number % 3]
        source = PublishedMask([entry(left, form), entry(right, None)])
        spacing = (None, (0.2, 0.2), (0.2, 0.15))[number // 3 % 3]
        images.append((predicted, left | right, ImageMasks(source, rle.encode(predicted), HEIGHT, WIDTH, spacing)))
    return images


def test_runs_give_what_pixels_give() -> None:
    for predicted, true, masks in made(36):
        compared = compare(masks)
        assert not isinstance(compared, str)
        counted = overlap_rows(torch.from_numpy(predicted)[None], torch.from_numpy(true)[None])
        assert list(compared.counts) == counted[0].tolist()
        assert compared.hd95_px == pytest.approx(slow_hd95(predicted, true, (1, 1)), abs=1e-5, nan_ok=True)
        in_mm = slow_hd95(predicted, true, masks.spacing_mm) if masks.spacing_mm else math.nan
        assert compared.hd95_mm == pytest.approx(in_mm, abs=1e-5, nan_ok=True)


def test_a_mask_that_exceeds_the_image_is_a_reason() -> None:
    _, true, _ = made(1)[0]
    too_large = ImageMasks(PublishedMask([entry(true, None)]), "0 99999", HEIGHT, WIDTH, None)
    assert compare(too_large) == f"mask code exceeds the image ({WIDTH} x {HEIGHT} = {HEIGHT * WIDTH} pixels)"


@pytest.mark.slow
def test_several_processes_compare_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [masks for _, _, masks in made(80)]
    alone = list(compare_all(images, len(images)))
    monkeypatch.setattr(mask_comparison, "_HERE_AT_MOST", 10)
    assert repr(list(compare_all(iter(images), len(images), workers=2))) == repr(alone)
