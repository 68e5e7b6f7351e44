"""One split of shards in memory with its ground truth, and the boxes of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from cxr import schema, storage
from cxr.data import shards
from cxr.data.batch import to_columns, to_device, to_tensors
from cxr.errors import UserError
from cxr.families.base import ScoringContext
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_size
from cxr.metrics.localization import Boxes, Located, known_places, locate
from cxr.schema import PixelFormat

BATCH = 32  # images per forward pass
_IDENTITY = {"x_scale": 1.0, "y_scale": 1.0, "x_offset": 0.0, "y_offset": 0.0}  # a resize transform
_SIZES = (schema.WIDTH_PX, schema.HEIGHT_PX)
_COLUMNS = (
    schema.IMAGE_ID,
    schema.PATIENT_ID,
    schema.LABELS,
    schema.BOXES,
    schema.MASKS,
    *_SIZES,
    schema.RESIZE_TRANSFORM,
    schema.PIXELS,
)


@dataclass(frozen=True)
class StoredXRays:
    """Images of a split with their ground truth; row i of each array belongs to image i."""

    rows: pa.Table  # with pixels
    pixels: PixelFormat
    findings: tuple[str, ...]  # of the archive

    @property
    def labels(self) -> np.ndarray:
        """(N, F) int8."""
        unknown = [schema.UNKNOWN] * len(self.findings)
        return np.array([known or unknown for known in self.rows[schema.LABELS].to_pylist()], np.int8)

    @property
    def sizes_px(self) -> np.ndarray:
        """(2, N) width and height of the originals."""
        return np.stack([self.rows[name].to_numpy() for name in _SIZES]).astype(np.float64)

    @property
    def true(self) -> Boxes:
        """True boxes in pixels of the originals."""
        return Boxes.of(self.rows[schema.BOXES], self.findings)

    @property
    def known(self) -> np.ndarray:
        """(N, F) bool: whether an image's label and boxes of a finding are known."""
        return known_places(self.true, self.labels)

    def located(self, predicted: Boxes) -> Located:
        """Match predicted boxes, in pixels of the originals, with the true ones."""
        return locate(predicted, self.true, self.known)

    @torch.inference_mode()
    def scored(self, checkpoint: Checkpoint, device: torch.device, *, as_stored: bool = False) -> pa.Table:
        """Scores of the images, the same as those of the scoring job.

        Args:
            as_stored: boxes and masks are in the frame of the stored images, not of the originals.

        Raises:
            UserError: the images are smaller than the network needs.
        """
        check_size(checkpoint.recipe, self.pixels.size)
        network, scores = checkpoint.network.to(device), []
        context = ScoringContext(checkpoint.findings, self.pixels.size)
        for start in range(0, self.rows.num_rows, BATCH):
            rows = self.rows.slice(start, BATCH)
            columns = to_columns(rows, [schema.PIXELS], self.pixels)
            batch = to_device(to_tensors(columns, self.pixels), device)
            rows = rows if not as_stored else self._uncropped(rows.num_rows)
            scores.append(checkpoint.recipe.scored(checkpoint.recipe.predict(network, batch), rows, context))
        return pa.concat_tables(scores)

    def _uncropped(self, count: int) -> pa.Table:
        """What scoring needs to know of `count` originals that look like the stored images."""
        side = pa.array([self.pixels.size] * count)
        frame = {schema.RESIZE_TRANSFORM: pa.array([_IDENTITY] * count)}
        return pa.table({**frame, schema.HEIGHT_PX: side, schema.WIDTH_PX: side})

    def boxed(self) -> list[int]:
        """Indices of the findings with true boxes."""
        return np.unique(self.true.finding).tolist()

    def pairs(self) -> dict[str, int]:
        """Number of images with a true box, per finding."""
        true = self.true
        pairs = np.unique(np.stack([true.image, true.finding]), axis=1)[1]
        return {self.findings[f]: int((pairs == f).sum()) for f in self.boxed()}


@dataclass(frozen=True)
class BoxedXRays(StoredXRays):
    """Images of a split with their boxes."""

    training: Boxes  # of the training images, as fractions of the image


def read_stored(uri: str, split: str, limit: int = 0) -> StoredXRays:
    """Images of a split of shards.

    Args:
        limit: maximum number of images, spread evenly over the split; 0 for all.

    Raises:
        UserError: there are no shards, or none of the images is in that split.
    """
    info = shards.read_info(uri)
    parts = [shards.read_rows(file, _COLUMNS, info.findings) for file in info.parts.get(split, ())]
    total = sum(part.num_rows for part in parts)
    if not total:
        raise UserError(f"{uri} has no image in its {split} split: give another archive, or one of more patients")
    chosen = pa.array(np.linspace(0, total - 1, min(limit or total, total)).astype(int))
    return StoredXRays(pa.concat_tables(parts).take(chosen), info.pixels, info.findings)


def read(uri: str, split: str, limit: int = 0) -> BoxedXRays:
    """`read_stored`, with the boxes of the training images.

    Raises:
        UserError: as `read_stored`, or none of the images has a box of one of the archive's findings.
    """
    stored, info = read_stored(uri, split, limit), shards.read_info(uri)
    training = [_shares(file.uri, info.findings) for file in info.parts.get("train", ())]
    xrays = BoxedXRays(stored.rows, stored.pixels, stored.findings, _joined(training))
    if not xrays.boxed():
        raise UserError(
            f"{uri}: none of {xrays.rows.num_rows:,} images of its {split} split has a box of "
            f"{', '.join(info.findings)}: give an archive that has such boxes"
        )
    return xrays


def _shares(uri: str, findings: Sequence[str]) -> Boxes:
    rows = storage.read_parquet(uri, columns=[schema.BOXES, *_SIZES])
    return Boxes.of(rows[schema.BOXES], findings).scaled(*(1 / rows[name].to_numpy() for name in _SIZES))


def _joined(parts: Sequence[Boxes]) -> Boxes:
    no_boxes = Boxes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    fields = ("image", "finding", "xyxy", "score")
    return Boxes(*(np.concatenate([getattr(part, name) for part in [no_boxes, *parts]]) for name in fields))
