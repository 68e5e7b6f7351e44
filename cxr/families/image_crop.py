"""The part of each image that a family sees, and how it is brought into a square: one rule for training and scoring.

lung_crop: the square around the lungs, which a checkpoint segments. aligner: the frame that is common to all images,
into which a checkpoint turns, stretches and moves each of them. Centered squares need no checkpoint.

An image is decoded, a network sees it whole and small, and what it found is resampled once from the original's own
pixels: no detail is lost, and the transform leads back to the original exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cxr import schema, storage
from cxr.data.batch import to_tensors
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files, recipe_from_dict
from cxr.families.base import Recipe, ScoringContext
from cxr.families.checkpoint import Checkpoint
from cxr.imaging.aligned_frame import ALIGNED, AlignedFrame, aligned_frame
from cxr.imaging.center_crop import CenterCrop
from cxr.imaging.geometry import ResizeTransform, fit
from cxr.imaging.image import to_bits
from cxr.imaging.lung_bbox import MARGIN, LungSquare, lung_square
from cxr.metrics import alignment
from cxr.schema import PixelFormat
from cxr.sources import rle


@dataclass(frozen=True)
class LungCrop:
    """Images are cropped to the lungs: by the checkpoint, identified by the SHA-256 of its weights, and the margin.

    Equal crops have equal `describe()`, regardless of the checkpoint's URI.
    """

    uri: str
    sha256: str
    margin: float

    def options(self) -> str:
        """The options of `cxr ingest` that crop images in this way."""
        return f"--lung-crop {self.uri} --lung-margin {self.margin:g}"

    def describe(self) -> dict[str, Any]:
        return {"rule": "lungs", "sha256": self.sha256, "margin": self.margin}

    def loaded(self) -> Callable[[np.ndarray], LungSquare]:
        """From an original's pixels (H, W), uint8 or uint16, to the square to cut out of them.

        The network is loaded once in each process; the function may be called by several threads.

        Raises:
            UserError: the checkpoint was deleted, damaged or replaced.
        """
        return partial(_square, _network(self.uri, self.sha256), self.margin)


@dataclass(frozen=True)
class Alignment:
    """Images are brought into the common frame of an aligner, identified by the SHA-256 of its weights.

    Equal alignments have equal `describe()`, regardless of the checkpoint's URI.
    """

    uri: str
    sha256: str

    def options(self) -> str:
        """The options of `cxr ingest` that align images in this way."""
        return f"--aligner {self.uri}"

    def describe(self) -> dict[str, Any]:
        return {"rule": ALIGNED, "sha256": self.sha256}

    def loaded(self) -> Callable[[np.ndarray], AlignedFrame]:
        """From an original's pixels (H, W), uint8 or uint16, to the frame to resample them in.

        The network is loaded once in each process; the function may be called by several threads.

        Raises:
            UserError: the checkpoint was deleted, damaged or replaced.
        """
        return partial(_frame, _network(self.uri, self.sha256))


ImageCrop = LungCrop | Alignment | CenterCrop


def by_lungs(uri: str, margin: float = MARGIN) -> LungCrop:
    """Crops by the lung checkpoint at `uri`.

    Args:
        margin: share of the side of the smallest square around the lungs, added on each side.

    Raises:
        UserError: there is no checkpoint, or it does not segment lungs in whole images.
    """
    uri, sha256, recipe = _of_whole_images("lung_crop", uri)
    if schema.PRED_MASK_RLE not in recipe.score_columns.names or recipe.mask_label != schema.LUNGS:
        raise UserError(
            f"lung_crop={uri}: a checkpoint of family {recipe.family!r}, which does not segment lungs. Use one that "
            f"cxr train lungs made"
        )
    return LungCrop(uri, sha256, margin)


def by_aligner(uri: str) -> Alignment:
    """Alignment by the checkpoint at `uri`.

    Raises:
        UserError: there is no checkpoint, or it does not align whole images.
    """
    uri, sha256, recipe = _of_whole_images("aligner", uri)
    if schema.THETA not in recipe.score_columns.names:
        raise UserError(
            f"aligner={uri}: a checkpoint of family {recipe.family!r}, which does not align images. Use one that "
            f"cxr train align made"
        )
    return Alignment(uri, sha256)


def _of_whole_images(setting: str, uri: str) -> tuple[str, str, Recipe]:
    """A checkpoint's normalized URI, the SHA-256 of its weights, and its recipe, which must be for whole images."""
    uri = storage.normalize(uri)
    about = checkpoint_files.read_about(uri)
    recipe = recipe_from_dict(about["recipe"])
    if recipe.crop_setting:
        raise UserError(
            f"{setting}={uri}: expected a checkpoint for whole images, got one that was trained with "
            f"{recipe.crop_setting}. Use one that was trained without it"
        )
    return uri, about["sha256"], recipe


def of_recipe(recipe: Recipe, cropping: str | None = None) -> ImageCrop | None:
    """How images are cropped that a network of this recipe sees; None: they are whole.

    Args:
        cropping: URI of the checkpoint by which they are cropped; None: where the recipe says.
    """
    cropping = recipe.crop_checkpoint if cropping is None else cropping
    if recipe.crop_setting == "lung_crop":
        return by_lungs(cropping, recipe.lung_margin)
    if recipe.crop_setting == "aligner":
        return by_aligner(cropping)
    contract = recipe.input_contract
    return CenterCrop(contract.resampling) if contract.crop == "center" else None


def of_checkpoint(saved: Checkpoint) -> ImageCrop | None:
    """The crop of the images that `saved` scores; None: they are not cropped."""
    return of_recipe(saved.recipe, checkpoint_files.crop_checkpoint_of(saved.uri, saved.recipe.crop_checkpoint))


@lru_cache(maxsize=2)
def _network(uri: str, sha256: str) -> Checkpoint:
    saved = checkpoint.load(uri)
    if saved.about["sha256"] != sha256:
        raise UserError(
            f"the checkpoint {uri}, by which images are cropped, was replaced by another (its weights' SHA-256 was "
            f"{sha256[:12]}, is {saved.about['sha256'][:12]}): restore the original, or start over in another --out"
        )
    return saved


def _seen(saved: Checkpoint, pixels_HW: np.ndarray) -> tuple[np.ndarray, ResizeTransform]:
    """An original as the network sees it: enhanced, padded to a square and small, uint8; and the transform back."""
    return fit(to_bits(saved.recipe.enhancement(pixels_HW), 8), saved.recipe.size)


@torch.inference_mode()
def _square(finder: Checkpoint, margin: float, pixels_HW: np.ndarray) -> LungSquare:
    """The network sees the padded image; predicted lungs in the padding are ignored."""
    height, width = pixels_HW.shape
    stored, frame = _seen(finder, pixels_HW)
    corners = np.rint(frame.from_original(np.array([[0, 0], [width, height]])))
    (left, top), (right, bottom) = corners.astype(int).tolist()
    inner = _lungs(finder, stored)[top:bottom, left:right]
    return lung_square(inner, margin).on_original(ResizeTransform(frame.x_scale, frame.y_scale), height, width)


def _lungs(finder: Checkpoint, stored_SS: np.ndarray) -> np.ndarray:
    """The lungs in an image of the network's own size, bool (size, size): what its scores would be."""
    size = len(stored_SS)
    batch = to_tensors({schema.PIXELS: stored_SS[None]}, PixelFormat(size))
    here = {schema.RESIZE_TRANSFORM: [ResizeTransform().as_dict()], schema.HEIGHT_PX: [size], schema.WIDTH_PX: [size]}
    context = ScoringContext(finder.findings, size)
    scores = finder.recipe.scored(finder.recipe.predict(finder.network, batch), pa.table(here), context)
    return rle.decode(scores[schema.PRED_MASK_RLE][0].as_py(), size, size)


@torch.inference_mode()
def _frame(aligner: Checkpoint, pixels_HW: np.ndarray) -> AlignedFrame:
    """The network sees the padded image; its transform in [−1, 1] holds at any resolution."""
    size = aligner.recipe.size
    stored, square = _seen(aligner, pixels_HW)
    batch = to_tensors({schema.PIXELS: stored[None]}, PixelFormat(size))
    theta = aligner.recipe.predict(aligner.network, batch)[schema.THETA].reshape(2, 3)
    return aligned_frame(theta.numpy(), square, size, alignment.implausible_reason(theta))
