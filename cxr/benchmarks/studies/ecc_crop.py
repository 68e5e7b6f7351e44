"""ECC as a way to prepare images: templates of training images, and each image registered to them when it is decoded.

Only `cxr study alignment` ingests with it, for comparison with an aligner; no recipe can ask for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from cxr import storage
from cxr.benchmarks.studies import ecc
from cxr.benchmarks.studies.ecc import Ecc, Template
from cxr.imaging.aligned_frame import AlignedFrame, aligned_frame
from cxr.imaging.enhance import Enhancement
from cxr.imaging.geometry import fit
from cxr.imaging.image import to_bits
from cxr.metrics import alignment

SIZE = 128  # height and width in pixels of the images that are registered; the last stage has 64


def write_templates(uri: str, images_BHW: np.ndarray) -> None:
    """Register uint8 images (B, SIZE, SIZE) to their own mean, and store the templates of all rounds at `uri`."""
    templates = ecc.align(images_BHW, Ecc()).templates
    sink = io.BytesIO()
    pictures, means = [each.picture for each in templates], [each.mean_theta.numpy() for each in templates]
    np.savez(sink, pictures=np.stack(pictures), mean_thetas=np.stack(means))
    storage.write_bytes(uri, sink.getvalue())


@dataclass(frozen=True)
class EccCrop:
    """Images are brought into the common frame of the templates at `uri`; see `data.decode.CropSettings`."""

    uri: str
    enhance: Enhancement
    """Changes images before they are registered, as it did those from which the templates were made."""

    def describe(self) -> dict[str, Any]:
        """Nothing: no recipe can ask for ECC, so that to a classifier the shards contain images like any others."""
        return {}

    def loaded(self) -> Callable[[np.ndarray], AlignedFrame]:
        """From an original's pixels (H, W), uint8 or uint16, to the frame to resample them in."""
        arrays = np.load(io.BytesIO(storage.read_bytes(self.uri)))
        pairs = zip(arrays["pictures"], torch.from_numpy(arrays["mean_thetas"]), strict=True)
        return partial(_frame, [Template(picture, mean) for picture, mean in pairs], self.enhance)


def _frame(templates: list[Template], enhance: Enhancement, pixels_HW: np.ndarray) -> AlignedFrame:
    cv2.setNumThreads(1)
    stored, square = fit(to_bits(enhance(pixels_HW), 8), SIZE)
    theta = ecc.align_one(stored, templates, Ecc())
    return aligned_frame(theta.numpy(), square, SIZE, alignment.implausible_reason(theta))
