"""Heat maps of one image, and their position in the original image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr.errors import UserError
from cxr.families.base import one_of
from cxr.imaging.geometry import ResizeTransform, map_to_original


@dataclass(frozen=True)
class HeatMap:
    """Where in an image the evidence for each finding is.

    `maps` is float32 (findings, h, w) in [0, 1], in the order of `findings`, on a grid over the network's square
    input; empty if `error` is set. `transform` maps grid coordinates to pixels of the original image (x to the right,
    y down, pixel edges at integers); see `ResizeTransform`.
    """

    image_id: str
    findings: tuple[str, ...]
    maps: np.ndarray
    transform: ResizeTransform
    height_px: int
    width_px: int
    error: str | None = None

    def on_original(self, finding: str) -> np.ndarray:
        """The map of a finding at the original's size: float32 (height_px, width_px) in [0, 1], 0 outside the part of
        the image that the network received.

        Raises:
            UserError: the image has an error, or there is no map of this finding.
        """
        if self.error is not None:
            raise UserError(f"expected an image with heat maps, got one with an error ({self.error}): skip it")
        one_of("finding", finding, self.findings)
        values = self.maps[self.findings.index(finding)]
        return map_to_original(values, self.transform, self.height_px, self.width_px)
