"""An archive as a list of parts that are read and scored one after another. Without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from cxr import schema, storage
from cxr.data import ledger, shards
from cxr.data.ledger import Part
from cxr.data.run_ledger import SCORES
from cxr.errors import UserError
from cxr.families import lung_crop
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_compatible
from cxr.inference import latents
from cxr.inference.increments import Listing
from cxr.inference.latents import Origin
from cxr.inference.read import PART_ROWS, ROW_GROUPS, SHARD, InputFormat, PartReader
from cxr.sources import dicom, find_source, open_manifest
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION, file_versions, recorded_listings
from cxr.sources.options import GateMode, ReadOptions

_PART_BYTES = 64 << 20  # of decoded pixels in one part, well below the size at which Ray Data splits a block
_MIN_ROWS, _MAX_ROWS = 16, 1024  # of a part
_SHARD_PART = pa.schema([(SHARD, pa.string()), (ROW_GROUPS, pa.list_(pa.int32())), (PART_ROWS, pa.int64())])


@dataclass(frozen=True)
class Plan:
    """An archive divided into parts, and the formats of its images when they reach the networks."""

    parts: list[Part]
    formats: tuple[InputFormat, ...]
    """All different formats; of shards, there is one, which says how images were cropped and enhanced when they were
    stored."""
    format_of: tuple[int, ...]
    """For each network, the number of its format."""
    origin: Origin
    encoded: bool = False  # the pixels are latents
    notes: tuple[str, ...] = ()  # for the user

    def reader(self, check: GateMode) -> PartReader:
        """The reader of these parts, with or without the gate."""
        return PartReader(self.formats, check)


def plan_scoring(archive: str, models: Mapping[str, Checkpoint], reading: ReadOptions) -> Plan:
    """Divide an archive (raw, shards or latents) into parts that all of these checkpoints can score.

    Args:
        models: the checkpoints by the names that messages call them by; a single one may have an empty name.

    Raises:
        UserError: the archive does not exist or does not fit a checkpoint, or `reading` selects images of shards.
    """
    if shards.is_shards(archive):
        reading.check_raw(archive)
        info = shards.read_info(archive, latents=True)
        for name, model in models.items():
            try:
                check_compatible([info], model)
                if info.latents is not None:
                    latents.check_encoder(info, model)
            except UserError as mistake:
                raise (UserError(f"member {name}: {mistake}") if name else mistake) from mistake.__cause__
        shards.check_ids(info)
        stored = InputFormat(info.pixels, lung_crop.of_checkpoint(next(iter(models.values()))), info.enhancement)
        origin = Origin(archive, info.source, info.findings)
        return Plan(_shard_parts(info), (stored,), (0,) * len(models), origin, bool(info.latents))
    listing, notes = list_raw(archive, reading)
    plan = raw_plan(listing.origin, models)
    parts = ledger.plan(listing.rows, part_rows(plan.formats, listing.rows.num_rows), folder=SCORES)
    return replace(plan, parts=parts, notes=notes)


def list_raw(archive: str, reading: ReadOptions) -> tuple[Listing, tuple[str, ...]]:
    """The images of a raw archive with the versions of their files, and notes for the user.

    Raises:
        UserError: the archive does not exist, or has no images.
    """
    with recorded_listings():
        manifest = open_manifest(archive, reading)
        sizes, versions = file_versions(manifest.table[schema.SOURCE_URI])
    rows = manifest.table.append_column(FILE_BYTES, sizes).append_column(FILE_VERSION, versions)
    source = find_source(archive, reading.source)
    listing = Listing(Origin(archive, source.name, manifest.findings), rows, ids_identify_files=source is dicom)
    return listing, tuple(manifest.notes)


def raw_plan(origin: Origin, models: Mapping[str, Checkpoint], parts: Sequence[Part] = ()) -> Plan:
    """The plan for parts of a raw archive."""
    formats: list[InputFormat] = []
    format_of: list[int] = []
    for recipe, crop in ((model.recipe, lung_crop.of_checkpoint(model)) for model in models.values()):
        own = InputFormat(recipe.pixel_format, crop, recipe.enhancement)
        number = next((i for i, other in enumerate(formats) if own.same_images(other)), len(formats))
        format_of.append(number)
        formats += [own] if number == len(formats) else []
    return Plan([*parts], tuple(formats), tuple(format_of), origin)


def part_rows(formats: Iterable[InputFormat], images: int) -> int:
    """The number of images in each part of so many."""
    return max(_MIN_ROWS, min(rows_per_part(formats), math.ceil(images / 8)))


def rows_per_part(formats: Iterable[InputFormat]) -> int:
    """The largest number of images that are decoded together."""
    return max(1, min(_MAX_ROWS, _PART_BYTES // sum(stored.pixels.row_bytes for stored in formats)))


def _shard_parts(info: shards.ShardInfo) -> list[Part]:
    """Row groups of shard files that fit into memory together, and one part for the images that ingest rejected."""
    groups = max(1, _PART_BYTES // (info.row_group_rows * info.pixels.row_bytes))
    step = groups * info.row_group_rows
    listed: list[tuple[str, list[int] | None, int]] = []  # URI, row groups, rows
    for file in (file for split in sorted(info.parts) for file in info.parts[split]):
        for start in range(0, file.rows, step):
            rows, first = min(step, file.rows - start), start // info.row_group_rows
            listed.append((file.uri, [*range(first, first - (-rows // info.row_group_rows))], rows))
    if info.rejects:
        listed.append((storage.join(info.uri, shards.REJECTS_FILE), None, info.rejects))
    return [
        Part(f"{SCORES}/part-{number:05d}", pa.table([[uri], [groups], [rows]], schema=_SHARD_PART))
        for number, (uri, groups, rows) in enumerate(listed)
    ]
