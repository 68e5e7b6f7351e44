"""Images cropped before any family sees them: to the square around the lungs, which a checkpoint finds, or centered.

For the lungs, an image is decoded, a network sees it whole and small, and the square is cut out of the original's own
pixels: a crop loses no detail, and its transform leads back to the original exactly.
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
from cxr.imaging.center_crop import CenterCrop
from cxr.imaging.geometry import ResizeTransform, fit
from cxr.imaging.image import to_bits
from cxr.imaging.lung_bbox import MARGIN, LungSquare, lung_square
from cxr.schema import PixelFormat
from cxr.sources import rle


@dataclass(frozen=True)
class LungCrop:
    """How images are cropped: the checkpoint, identified by the SHA-256 of its weights, and the margin.

    Equal crops have equal `describe()`, regardless of the checkpoint's URI.
    """

    uri: str
    sha256: str
    margin: float

    def options(self) -> str:
        """The options of `cxr ingest` that crop images in this way."""
        return f"--lung-crop {self.uri} --lung-margin {self.margin:g}"

    def describe(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "margin": self.margin}

    def loaded(self) -> Callable[[np.ndarray], LungSquare]:
        """From an original's pixels (H, W), uint8 or uint16, to the square to cut out of them.

        The network is loaded once in each process; the function may be called by several threads.

        Raises:
            UserError: the checkpoint was deleted, damaged or replaced.
        """
        return partial(_square, _finder(self.uri, self.sha256), self.margin)


ImageCrop = LungCrop | CenterCrop


def by_checkpoint(uri: str, margin: float = MARGIN) -> LungCrop:
    """Crops by the checkpoint at `uri`.

    Args:
        margin: share of the side of the smallest square around the lungs, added on each side.

    Raises:
        UserError: there is no checkpoint, or it does not segment lungs.
    """
    uri = storage.normalize(uri)
    about = checkpoint_files.read_about(uri)
    recipe = recipe_from_dict(about["recipe"])
    if schema.PRED_MASK_RLE not in recipe.score_columns.names or recipe.mask_label != schema.LUNGS:
        raise UserError(
            f"lung_crop={uri}: a checkpoint of family {recipe.family!r}, which does not segment lungs. Give one that "
            f"cxr train lungs made"
        )
    return LungCrop(uri, about["sha256"], margin)


def of_recipe(recipe: Recipe, lungs: str | None = None) -> ImageCrop | None:
    """How images are cropped that a network of this recipe sees; None: they are whole.

    Args:
        lungs: URI of the lung checkpoint; None: where the recipe says.
    """
    lungs = recipe.lung_crop if lungs is None else lungs
    if lungs:
        return by_checkpoint(lungs, recipe.lung_margin)
    contract = recipe.input_contract
    return CenterCrop(contract.resampling) if contract.crop == "center" else None


def of_checkpoint(saved: Checkpoint) -> ImageCrop | None:
    """The crop of the images that `saved` scores; None: they are not cropped."""
    return of_recipe(saved.recipe, checkpoint_files.lungs_of(saved.uri, saved.recipe.lung_crop))


@lru_cache(maxsize=2)
def _finder(uri: str, sha256: str) -> Checkpoint:
    saved = checkpoint.load(uri)
    if saved.about["sha256"] != sha256:
        raise UserError(
            f"the lung checkpoint {uri} was replaced by another (its weights' SHA-256 was {sha256[:12]}, is "
            f"{saved.about['sha256'][:12]}): restore the original, or start over in another --out"
        )
    return saved


@torch.inference_mode()
def _square(finder: Checkpoint, margin: float, pixels_HW: np.ndarray) -> LungSquare:
    """The network sees the padded image; predicted lungs in the padding are ignored."""
    height, width = pixels_HW.shape
    stored, frame = fit(to_bits(finder.recipe.enhancement(pixels_HW), 8), finder.recipe.size)
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
