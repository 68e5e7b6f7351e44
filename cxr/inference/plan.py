"""An archive as a list of parts that are read and scored one after another. Without Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa

from cxr import storage
from cxr.data import ledger, shards
from cxr.data.ledger import Part
from cxr.families import lung_crop
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_compatible
from cxr.families.lung_crop import ImageCrop
from cxr.imaging.enhance import Enhancement
from cxr.inference import latents
from cxr.inference.latents import Origin
from cxr.inference.read import PART_ROWS, SHARD, PartReader
from cxr.schema import PixelFormat
from cxr.sources import find_source, open_manifest
from cxr.sources.options import GateMode, ReadOptions

SCORES = "scores"  # folder of the scores in a result
_PART_BYTES = 64 << 20  # of decoded pixels in one part, well below the size at which Ray Data splits a block
_MIN_ROWS, _MAX_ROWS = 16, 1024  # of a part


@dataclass(frozen=True)
class Plan:
    """An archive divided into parts, and the format of its images when they reach the network."""

    parts: list[Part]
    pixels: PixelFormat
    origin: Origin
    encoded: bool = False  # the pixels are latents
    crop: ImageCrop | None = None  # how images are cropped, or were cropped when shards were made
    enhance: Enhancement | None = None  # how images are enhanced, or were enhanced then
    notes: tuple[str, ...] = ()  # for the user

    def reader(self, check: GateMode) -> PartReader:
        """The reader of these parts, with or without the gate."""
        return PartReader(self.pixels, self.crop, self.enhance, check)


def plan_scoring(archive: str, model: Checkpoint, reading: ReadOptions) -> Plan:
    """Divide an archive (raw, shards or latents) into parts that a checkpoint can score.

    Raises:
        UserError: the archive does not exist or does not fit the checkpoint, or `reading` selects images of shards.
    """
    crop = lung_crop.of_checkpoint(model)
    if shards.is_shards(archive):
        reading.check_raw(archive)
        info = shards.read_info(archive, latents=True)
        check_compatible([info], model)
        if info.latents is not None:
            latents.check_encoder(info, model)
        shards.check_ids(info)
        origin = Origin(archive, info.source, info.findings)
        return Plan(_shard_parts(info), info.pixels, origin, bool(info.latents), crop, info.enhancement)
    manifest = open_manifest(archive, reading)
    pixels = model.recipe.pixel_format
    rows = max(_MIN_ROWS, min(rows_per_part(pixels), math.ceil(manifest.table.num_rows / 8)))
    origin = Origin(archive, find_source(archive, reading.source).name, manifest.findings)
    parts = ledger.plan(manifest.table, rows, folder=SCORES)
    notes = tuple(manifest.notes)
    return Plan(parts, pixels, origin, crop=crop, enhance=model.recipe.enhancement, notes=notes)


def rows_per_part(pixels: PixelFormat) -> int:
    """The largest number of images that are decoded together."""
    return max(1, min(_MAX_ROWS, _PART_BYTES // pixels.row_bytes))


def _shard_parts(info: shards.ShardInfo) -> list[Part]:
    """One part of scores per shard file, and one for the images that ingest rejected."""
    files = [file for split in sorted(info.parts) for file in info.parts[split]]
    rejects = [storage.join(info.uri, shards.REJECTS_FILE)] if info.rejects else []
    listed = [(file.uri, file.rows) for file in files] + [(uri, info.rejects) for uri in rejects]
    return [
        Part(f"{SCORES}/part-{number:05d}", pa.table({SHARD: [uri], PART_ROWS: [rows]}))
        for number, (uri, rows) in enumerate(listed)
    ]
