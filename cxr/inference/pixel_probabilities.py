"""The probability of each pixel of an original image that it belongs to the mask that a checkpoint predicts."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from cxr.inference.predictor import Predictor, load


class PixelProbabilities:
    """Probabilities of a checkpoint's masks, for one image at a time.

    Args:
        checkpoint: URI of a checkpoint that segments. It is loaded for the first image.
    """

    def __init__(self, checkpoint: str) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def _predictor(self) -> Predictor:
        return load(self._checkpoint, precision="float32")

    def __call__(self, uri: str) -> np.ndarray:
        """Float32 (height, width) in [0, 1], at the size of the image at this URI; 0 where the network did not see
        it.

        Raises:
            ImageRejectedError: the image cannot be used.
        """
        (found,) = self._predictor.segment([uri], on_error="raise")
        return found.on_original(found.findings[0])
