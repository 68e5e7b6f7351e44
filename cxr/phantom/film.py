"""From line integrals to gray values: scatter, quantum noise, film curve, collimation and side markers."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cxr.phantom.canvas import Layer, blur

_STEPS_PER_CM = 64


@dataclass(frozen=True)
class Film:
    """Settings of an exposure."""

    middle: float = 12.0
    """Thickness in cm that becomes middle gray."""
    latitude: float = 5.0
    """Thickness range in cm over which the curve rises; a smaller range gives more contrast."""
    equalize: float = 0.25
    """Fraction of low-frequency differences that processing removes."""
    scatter: float = 0.12
    """Fraction of the signal that is scattered."""
    noise: float = 0.10
    """Standard deviation in cm behind 10 cm of tissue; larger behind thicker tissue."""
    sharpness: float = 0.5
    """Strength of edge enhancement."""
    collimated: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Collimated fractions of the image at its left, top, right and bottom."""
    marker: str = ""
    """Side marker next to the patient's shoulder; empty for none."""
    marker_at: tuple[float, float] = (0.92, 0.12)
    """Position of the marker as fractions of width and height."""
    caption: str = ""

    @classmethod
    def sample(cls, rng: np.random.Generator, view: str) -> Film:
        """A random exposure; bedside exposures (AP) are grayer, noisier and more often captioned."""
        bedside = view == "AP"
        shut = rng.uniform(0.0, 0.035, 4) * (rng.random(4) < 0.3)
        letter, across = ("R", 0.08) if rng.random() < 0.3 else ("L", 0.92)
        captions = ("PORTABLE", "AP ERECT", "SUPINE", "AP") if bedside else ("ERECT", "PA")
        return cls(
            middle=rng.normal(12.5, 1.0),
            latitude=float(np.clip(rng.normal(5.6 if bedside else 4.6, 0.7), 3.4, 7.5)),
            equalize=rng.uniform(0.2, 0.5),
            scatter=rng.uniform(0.10, 0.22 if bedside else 0.16),
            noise=rng.uniform(0.10, 0.22 if bedside else 0.15),
            sharpness=rng.uniform(0.0, 0.9),
            collimated=(float(shut[0]), float(shut[1]), float(shut[2]), float(shut[3])),
            marker=letter,
            marker_at=(across + rng.normal(0, 0.015), rng.uniform(0.06, 0.22)),
            caption=str(rng.choice(captions)) if rng.random() < (0.5 if bedside else 0.12) else "",
        )

    def develop(self, thickness: Layer, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Thickness (size, size) in cm -> gray values with dense tissue bright."""
        size = len(thickness)
        ray = thickness + self.scatter * (blur(thickness, 0.10 * size) - thickness)
        roughness = np.clip(0.5 + 0.06 * ray, 0.5, 2.5)  # fewer photons behind more tissue, hence more noise
        ray += self.noise * roughness * _grain(ray.shape, rng)
        ray += self.sharpness * (ray - blur(ray, 0.004 * size))
        ray += self.equalize * np.clip(ray * 0.2, 0, 1) * (11 - blur(ray, 0.12 * size))
        curve = self._curve()
        steps = np.clip(ray * _STEPS_PER_CM, 0, len(curve) - 1).astype(np.uint16)
        return self._write(curve[steps]) * self.open_field(size)

    def _curve(self) -> NDArray[np.uint8]:
        """Gray value for each thickness step: a logistic curve that starts at black."""
        ray = np.arange(64 * _STEPS_PER_CM) / _STEPS_PER_CM
        rise = 1 / (1 + np.exp((self.middle - ray) / self.latitude))
        return (255 * np.clip(0.98 * (rise - rise[0]) / (1 - rise[0]), 0.004, 1)).astype(np.uint8)

    def _write(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size, font = len(image), cv2.FONT_HERSHEY_SIMPLEX
        x, y = (int(fraction * size) for fraction in self.marker_at)
        thick = max(1, size // 200)
        if self.marker:
            cv2.putText(image, self.marker, (x - size // 50, y), font, size / 560, 250, thick, cv2.LINE_AA)
        if self.caption:
            cv2.putText(
                image,
                self.caption,
                (size // 30, size - size // 30),
                font,
                size / 1100,
                235,
                max(1, size // 500),
                cv2.LINE_AA,
            )
        return image

    def open_field(self, size: int) -> NDArray[np.bool_]:
        """Whether each pixel is inside the collimated field."""
        left, top, right, bottom = (round(fraction * size) for fraction in self.collimated)
        field = np.zeros((size, size), np.bool_)
        field[top : size - bottom, left : size - right] = True
        return field


def _grain(shape: tuple[int, ...], rng: np.random.Generator) -> Layer:
    """Slightly blurred noise with mean 0 and standard deviation about 1; blurring makes uniform bytes nearly
    normal."""
    grain = rng.integers(0, 256, shape, np.uint8).astype(np.float32)
    return cv2.GaussianBlur((grain - 127.5) * np.float32(1.6 / 73.9), (3, 3), 0.55)
