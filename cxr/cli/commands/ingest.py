"""Decode an archive of X-rays once into shards, which training reads fast.

cxr ingest --archive s3://xrays/nih --out s3://xrays/shards
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cxr import schema, storage
from cxr.cli.options import check_described
from cxr.cli.phantoms import some_phantoms
from cxr.cli.plan_options import PlanOptions
from cxr.errors import ImageRejectedError, UserError, check_fraction, check_least
from cxr.imaging.center_crop import CenterCrop
from cxr.imaging.decode import check_head
from cxr.imaging.enhance import Enhancement
from cxr.imaging.geometry import fit
from cxr.imaging.image import to_bits
from cxr.imaging.lung_bbox import MARGIN
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.label_table import read_label_table
from cxr.sources.options import Labeling, ReadOptions

if TYPE_CHECKING:
    from cxr.data.decode import CropSettings
    from cxr.data.ingest import IngestResult

PICTURED, PICTURE_PX = 4, 320
_SHOWN = (schema.IMAGE_ID, schema.SOURCE_URI)


@dataclass(frozen=True)
class Options:
    """Settings of the job."""

    archive: str | None = None
    """Folder or URI of the archive, a ZIP or TAR file, or a CSV or Parquet file that lists images. Default: a small
    phantom archive, written to OUT/phantoms."""
    out: str = "runs/ingest"
    """Folder or URI of the shards. Run the same command again to continue a run that was stopped."""
    stored_size: int = 256
    """Height and width of the stored images in pixels. Images are padded to a square to keep their aspect ratio."""
    bits: Literal[8, 16] = 8
    """Bits per stored pixel."""
    max_rejects: float = 0.05
    """Fraction of unusable images above which the job fails, after it has written everything."""
    limit: int | None = None
    """Maximum number of images, spread evenly over the archive. Default: all."""
    lung_crop: str = ""
    """URI of a checkpoint of family lungs. Images are cropped to the square around the lungs. Default: no crop."""
    lung_margin: float = MARGIN
    """Margin added on each side of the square around the lungs, as a fraction of its side."""
    aligner: str = ""
    """URI of a checkpoint of family align. Images are registered to its common frame, in a single resampling of the
    original pixels. Not for family attend, which aligns in its network. Default: no alignment."""
    center_crop: Literal["", "area", "gaussian"] = ""
    """Crop images to their largest centered square, and resize it by area averaging, or with a Gaussian filter as
    TorchXRayVision does (add --bits 16). Default: no crop."""
    enhancement: Enhancement = field(default_factory=Enhancement)
    reading: ReadOptions = field(default_factory=ReadOptions)
    labeling: Labeling = field(default_factory=Labeling)
    planning: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        check_least(self, stored_size=1, limit=1)
        check_fraction(self, "max_rejects")
        check_described(self.archive, self.reading, self.labeling)


def main(options: Options) -> dict[str, Any]:
    given = [name for name in ("lung_crop", "aligner", "center_crop") if getattr(options, name)]
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"expected at most one of --lung-crop, --aligner and --center-crop, got {names}: use one")
    if options.archive:
        storage.check_readable(options.archive)
    if options.labeling.labels:
        read_label_table(options.labeling)

    # These import torch and Ray, which takes seconds: mistakes above are reported without them.
    from cxr.cli.plans import say_plan
    from cxr.data.ingest import ingest
    from cxr.runtime import cluster

    crop = _crop(options)
    cluster.connect()
    archive = options.archive or some_phantoms(options.out, count=60)
    result = ingest(
        archive,
        options.out,
        reading=options.reading,
        pixels=PixelFormat(options.stored_size, options.bits),
        max_rejects=options.max_rejects,
        limit=options.limit,
        crop=crop,
        enhance=options.enhancement,
        labeling=options.labeling,
        on_start=partial(say_plan, options),
    )
    _print_summary(result)
    return asdict(result) | {"pictures": _pictures(options, archive) if options.enhancement else []}


def _crop(options: Options) -> CropSettings | None:
    from cxr.families import image_crop  # imports torch

    if options.lung_crop:
        return image_crop.by_lungs(options.lung_crop, options.lung_margin)
    if options.aligner:
        return image_crop.by_aligner(options.aligner)
    return CenterCrop(options.center_crop) if options.center_crop else None


def _pictures(options: Options, archive: str) -> list[str]:
    """Write OUT/pictures/enhanced.png: a few images before and after each enhancement step."""
    from cxr.data.decode_pool import decode_image
    from cxr.reporting.figures import picture_rows, save_figure

    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    image_ids = []
    manifest = open_manifest(archive, options.reading.with_headers(options.out)).table
    for image_id, uri in zip(*(manifest[n].slice(0, PICTURED).to_pylist() for n in _SHOWN), strict=True):
        with suppress(ImageRejectedError, storage.NotFoundError):
            image = decode_image(storage.read_bytes(uri, check=check_head)).image.pixels
            for name, pixels in options.enhancement.after_each_step(image).items():
                rows[name].append(to_bits(fit(pixels, PICTURE_PX)[0], 8) / 255)
            image_ids.append(image_id)
    if not rows:
        return []
    shown = {name: np.stack(images) for name, images in rows.items()}
    uri = save_figure(picture_rows(shown, image_ids), storage.join(options.out, "pictures"), "enhanced.png")
    print(f"picture: {uri}", flush=True)
    return [uri]


def _print_summary(result: IngestResult) -> None:
    from cxr.data import gate

    for split, count in result.counts.items():
        print(f"{split:>8} {count:>9,}")
    print(f"rejected {result.rejects:>9,}")
    for reason, count in result.reasons.items():
        print(f"{count:>18,}  {reason}")
    if result.not_frontal:
        print(f"note: {gate.describe(result.not_frontal)}")
