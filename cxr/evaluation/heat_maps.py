"""Heat maps of a few images of a report, by the run's own checkpoint if it can still be read. Without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cxr import storage
from cxr.errors import ImageRejectedError, UserError
from cxr.evaluation.run import Run, checkpoint_uri
from cxr.imaging.geometry import ResizeTransform, map_to_original

FAMILIES = ("attend", "classify", "localize")  # with heat maps


@dataclass(frozen=True)
class PlacedMaps:
    """The heat maps of an image, float32 (findings, h, w) in [0, 1], and the transform to pixels of the original."""

    findings: tuple[str, ...]
    maps: np.ndarray
    transform: ResizeTransform

    def on_picture(self, finding: str, picture: ResizeTransform, side: int) -> np.ndarray:
        """The map of a finding on a picture (side, side), whose transform to the original is given."""
        values = self.maps[self.findings.index(finding)]
        return map_to_original(values, self.transform.then(picture.inverse()), side, side)


def heat_maps(run: Run, images: Mapping[str, str]) -> dict[str, PlacedMaps]:
    """Heat maps by image id. None if the family has none, or if the checkpoint or the images cannot be read.

    Args:
        images: their URIs, by image id.
    """
    if run.family not in FAMILIES or not images:
        return {}
    uri = checkpoint_uri(run)
    try:
        if not uri or not storage.exists(storage.join(uri, "checkpoint.json")):
            print("note: the report has no heat maps, because the checkpoint cannot be read", flush=True)
            return {}
        readable = {image_id: source for image_id, source in images.items() if storage.exists(source)}
        if not readable:
            return {}

        from cxr.inference.predictor import load

        predictor = load(uri)
        if predictor.sha256 != run.checkpoint_sha256:
            print(f"note: the report has no heat maps, because {uri} now contains another checkpoint", flush=True)
            return {}
        explained = zip(readable, predictor.explain(list(readable.values())), strict=True)
        return {
            image_id: PlacedMaps(each.findings, each.maps, each.transform)
            for image_id, each in explained
            if each.error is None
        }
    except (UserError, ImageRejectedError, OSError) as error:
        print(f"note: the report has no heat maps: {error}", flush=True)
        return {}
