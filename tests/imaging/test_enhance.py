"""Noise removal, normalization and contrast: their effect on a known image, the same in 8 and 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from cxr.errors import UserError
from cxr.imaging import enhance
from cxr.imaging.enhance import Enhancement
from cxr.imaging.image import to_bits

BITS = pytest.mark.parametrize("bits", [8, 16])
ALL = Enhancement("nlm", "percentile", "clahe")


def ramp(bits: int, low: int = 60, high: int = 120, side: int = 96) -> np.ndarray:
    """A smooth image between two 8-bit gray levels."""
    y, x = np.mgrid[:side, :side] / (side - 1)
    gray = low + (high - low) * (0.5 * x + 0.5 * np.sin(4 * y) ** 2)
    return np.rint(gray * (1 if bits == 8 else 257)).astype(np.uint8 if bits == 8 else np.uint16)


def noisy(bits: int, level: float) -> np.ndarray:
    clean = ramp(bits)
    most = np.iinfo(clean.dtype).max
    noise = np.random.default_rng(0).normal(0, level * most / 255, clean.shape)
    return np.clip(np.rint(clean + noise), 0, most).astype(clean.dtype)


def error(pixels: np.ndarray, bits: int) -> float:
    """Root mean squared difference from the clean image, in 8-bit gray levels."""
    most = np.iinfo(pixels.dtype).max
    return float(np.sqrt(((pixels.astype(float) - ramp(bits)) ** 2).mean()) * 255 / most)


@BITS
def test_no_enhancement_returns_the_same_array(bits: int) -> None:
    pixels = ramp(bits)
    assert Enhancement()(pixels) is pixels
    assert not Enhancement()
    assert (Enhancement().describe(), str(Enhancement())) == ({}, "none")


@BITS
@pytest.mark.parametrize(("denoise", "most"), [("median", 0.6), ("nlm", 0.45)])
def test_noise_is_removed_and_the_image_is_preserved(bits: int, denoise: enhance.Denoise, most: float) -> None:
    done = Enhancement(denoise)
    assert error(done(noisy(bits, 8)), bits) < most * error(noisy(bits, 8), bits)
    assert error(done(ramp(bits)), bits) < 0.5


@BITS
@pytest.mark.parametrize("level", [2, 8])
def test_noise_estimate(bits: int, level: float) -> None:
    pixels = noisy(bits, level)
    assert enhance.noise(pixels) * 255 / np.iinfo(pixels.dtype).max == pytest.approx(level, rel=0.1)


@BITS
def test_an_image_without_noise_is_not_blurred(bits: int) -> None:
    pixels = ramp(bits)
    assert enhance.non_local_means(pixels) is pixels


@BITS
def test_the_percentile_window_ignores_a_small_marker(bits: int) -> None:
    pixels = ramp(bits, 60, 120, side=200)
    pixels[:3, :3], pixels[-3:, -3:] = 0, np.iinfo(pixels.dtype).max  # far fewer than 1 %
    shown = enhance.percentile_window(pixels).astype(float) / np.iinfo(pixels.dtype).max
    assert [(shown <= 0).mean(), (shown >= 1).mean()] == pytest.approx([0.01, 0.01], abs=0.006)
    assert np.corrcoef(shown.ravel(), pixels.ravel())[0, 1] > 0.9
    brighter = (pixels // 2 + np.iinfo(pixels.dtype).max // 4).astype(pixels.dtype)
    np.testing.assert_allclose(enhance.percentile_window(brighter) / np.iinfo(pixels.dtype).max, shown, atol=0.02)


@BITS
def test_a_window_of_one_gray_level_changes_nothing(bits: int) -> None:
    pixels = np.zeros_like(ramp(bits))
    pixels[0, 0] = 9
    assert enhance.percentile_window(pixels) is pixels


@BITS
def test_clahe_increases_local_contrast_up_to_its_limit(bits: int) -> None:
    pixels = ramp(bits, 100, 110)
    before, after = (np.ptp(to_bits(each, 8)[:24, :24].astype(int)) for each in (pixels, enhance.clahe(pixels)))
    assert before < after < 25 * before


def test_16_bits_are_equalized_like_8_and_keep_their_depth() -> None:
    coarse = ramp(8)
    np.testing.assert_array_equal(enhance.clahe(coarse * np.uint16(257)), enhance.clahe(coarse) * np.uint16(257))
    fine = ramp(16)
    assert len(np.unique(enhance.clahe(fine))) > 5 * len(np.unique(coarse))
    assert np.abs(enhance.clahe(fine) / 257 - enhance.clahe(to_bits(fine, 8))).max() <= 1


@BITS
def test_steps_run_in_order_and_each_result_is_available(bits: int) -> None:
    pixels = noisy(bits, 8)
    shown = ALL.after_each_step(pixels)
    assert list(shown) == ["as decoded", "nlm", "percentile", "clahe"]
    np.testing.assert_array_equal(shown["clahe"], ALL(pixels))
    wanted = enhance.clahe(enhance.percentile_window(enhance.non_local_means(pixels)))
    np.testing.assert_array_equal(ALL(pixels), wanted)
    assert {each.dtype for each in shown.values()} == {pixels.dtype}


def test_options_and_invalid_values() -> None:
    assert str(ALL) == "--denoise nlm --normalize percentile --equalize clahe"
    assert Enhancement(**ALL.describe()) == ALL
    with pytest.raises(UserError, match="expected denoise to be one of none, median, nlm, got 'gauss'"):
        Enhancement("gauss")  # type: ignore[arg-type]
