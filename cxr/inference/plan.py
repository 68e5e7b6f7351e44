"""An archive as a list of parts that are read and scored one after another. Without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data import ledger, shard_index, shards
from cxr.data.ledger import Part
from cxr.data.run_ledger import SCORES
from cxr.errors import UserError
from cxr.families import image_crop
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_compatible
from cxr.inference import latents
from cxr.inference.increments import KNOWN, Listing
from cxr.inference.latents import Origin
from cxr.inference.options import ScoredSplit
from cxr.inference.read import PART_ROWS, ROW_GROUPS, SHARD, InputFormat, PartReader
from cxr.sources import dicom, find_source, open_manifest
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION, file_versions, recorded_listings
from cxr.sources.options import GateMode, ReadOptions

PART_BYTES = 64 << 20  # of decoded pixels in one part, well below the size at which Ray Data splits a block
_MIN_ROWS, _MAX_ROWS = 16, 256  # of a part
SHARD_PARTS = pa.schema([*KNOWN, (SHARD, pa.string()), (ROW_GROUPS, pa.list_(pa.int32())), (PART_ROWS, pa.int64())])
"""Parts of shards as rows of a listing. A part's id is the URI of its file with its first row group, and its size its
number of images."""


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
    listing = list_images(archive, reading)
    plan = plan_inputs(listing.origin, models)
    return replace(
        plan,
        parts=list(ledger.plan(listing.rows, part_rows(plan, listing.rows), folder=SCORES)),
        notes=listing.notes,
    )


def list_images(archive: str, reading: ReadOptions, split: ScoredSplit = "all") -> Listing:
    """The images of an archive with the versions of their files; of shards and latents, their parts (SHARD_PARTS).

    Raises:
        UserError: the archive does not exist or has no images in this split, or `reading` selects images of shards.
    """
    if shards.is_shards(archive):
        reading.check_raw(archive)
        info = shards.read_info(archive, latents=True)
        shard_index.check_ids(info)
        return Listing(Origin(archive, info.source, info.findings), _shard_parts(info, split))
    with recorded_listings():
        manifest = open_manifest(archive, reading)
        images = manifest.table
        if split != "all":
            images = images.filter(pc.equal(images[schema.SPLIT], split))
            _check_any(images.num_rows, archive, split)
        sizes, versions = file_versions(images[schema.SOURCE_URI])
    rows = images.append_column(FILE_BYTES, sizes).append_column(FILE_VERSION, versions)
    source = find_source(archive, reading.source)
    origin = Origin(archive, source.name, manifest.findings)
    return Listing(origin, rows, ids_identify_files=source is dicom, notes=tuple(manifest.notes))


def plan_inputs(origin: Origin, models: Mapping[str, Checkpoint]) -> Plan:
    """The formats in which images of an archive reach these checkpoints, without any parts.

    Raises:
        UserError: shards do not fit a checkpoint.
    """
    if shards.is_shards(origin.archive):
        info = shards.read_info(origin.archive, latents=True)
        for name, model in models.items():
            try:
                check_compatible([info], model)
                if info.latents is not None:
                    latents.check_encoder(info, model)
            except UserError as mistake:
                raise (UserError(f"member {name}: {mistake}") if name else mistake) from mistake.__cause__
        stored = InputFormat(info.pixels, image_crop.of_checkpoint(next(iter(models.values()))), info.enhancement)
        return Plan([], (stored,), (0,) * len(models), origin, bool(info.latents))
    formats: list[InputFormat] = []
    format_of: list[int] = []
    for recipe, crop in ((model.recipe, image_crop.of_checkpoint(model)) for model in models.values()):
        own = InputFormat(recipe.pixel_format, crop, recipe.enhancement)
        number = next((i for i, other in enumerate(formats) if own.same_images(other)), len(formats))
        format_of.append(number)
        formats += [own] if number == len(formats) else []
    return Plan([], tuple(formats), tuple(format_of), origin)


def part_rows(plan: Plan, rows: pa.Table) -> int:
    """How many rows of a listing make a part: images, or a single part of shards."""
    if SHARD in rows.column_names:
        return 1
    return max(_MIN_ROWS, min(rows_per_part(plan.formats), math.ceil(rows.num_rows / 8)))


def rows_per_part(formats: Iterable[InputFormat]) -> int:
    """The largest number of images that are decoded together."""
    return max(1, min(_MAX_ROWS, PART_BYTES // sum(stored.pixels.row_bytes for stored in formats)))


def _check_any(images: int, archive: str, split: ScoredSplit) -> None:
    if not images:
        raise UserError(f"expected images in the {split} split of {archive}, got none: use another --split, or all")


def _shard_parts(info: shards.ShardInfo, split: ScoredSplit) -> pa.Table:
    """Row groups of shard files that fit into memory together, and, if all splits are scored, one part for the images
    that ingest rejected."""
    splits = sorted(info.parts) if split == "all" else [split]
    if split != "all":
        _check_any(info.rows(split), info.uri, split)
    groups = max(1, PART_BYTES // (info.row_group_rows * info.pixels.row_bytes))
    step = groups * info.row_group_rows
    listed: list[tuple[str, list[int] | None, int]] = []  # URI, row groups, rows
    for file in (file for name in splits for file in info.parts[name]):
        for start in range(0, file.rows, step):
            rows, first = min(step, file.rows - start), start // info.row_group_rows
            listed.append((file.uri, [*range(first, first - (-rows // info.row_group_rows))], rows))
    if info.rejects and split == "all":
        listed.append((storage.join(info.uri, shards.REJECTS_FILE), None, info.rejects))
    uris, row_groups, rows = ([part[n] for part in listed] for n in range(3))
    ids = [f"{uri}#{groups[0] if groups else 0:06d}" for uri, groups, _ in listed]
    columns = {schema.IMAGE_ID: ids, schema.SOURCE_URI: uris, FILE_BYTES: rows, FILE_VERSION: [""] * len(ids)}
    return pa.table(columns | {SHARD: uris, ROW_GROUPS: row_groups, PART_ROWS: rows}, schema=SHARD_PARTS)
