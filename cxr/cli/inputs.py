"""Checks of a training job's recipe, archives and output folder, made before Ray starts and before decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cxr import schema, storage
from cxr.cli.options import ArchiveOptions, check_described
from cxr.data import shards
from cxr.data.dicom_headers import read_large_archive
from cxr.data.ledger import LEDGER_FILE
from cxr.data.shards import ShardInfo
from cxr.errors import UserError
from cxr.families.base import Recipe
from cxr.families.compatibility import RawArchive, check_compatible, check_raw, check_size, fold_of
from cxr.schema import PixelFormat
from cxr.sources import open_manifest

SHARDS = "shards"  # folder in OUT


@dataclass(frozen=True)
class Inputs:
    """What a job knows of its inputs before it starts."""

    out: str
    """URI of the results."""
    images: int
    """Training images; of folds, about as many as train each network."""


def check_inputs(recipe: Recipe, options: ArchiveOptions, out: str) -> Inputs:
    """Check everything that can be known from the options, the archives' manifests and the recipe.

    Raises:
        UserError: the first mistake.
    """
    out = storage.normalize(out)
    recipe.check_network()
    check_described(options.archive, options.reading, options.labeling)
    if not options.uris:  # a phantom archive, which suits every recipe of which these hold
        fold_of(recipe)
        if options.stream:
            check_raw(recipe, "the phantom archive")
        else:
            check_size(recipe, options.stored_size)
        _check_out(options, out)
        return Inputs(out, options.phantoms)
    for uri in options.uris:
        storage.check_readable(uri)
    if (options.stream and len(options.uris) > 1) or len(set(options.uris)) < len(options.uris):
        raise UserError(
            f"--archive {' --archive '.join(options.uris)}: several archives can be used together only as shards, "
            f"and only if all are different. Use each archive once, and omit --stream"
        )
    _check_out(options, out)
    archives = [open_archive(options, uri) for uri in options.uris]
    check_compatible(archives, recipe)
    is_classifier = schema.PROBABILITIES in recipe.score_columns.names
    _check_alike(archives, by_box=schema.BOXES in recipe.columns and not is_classifier)
    return Inputs(out, training_images(archives, recipe))


def training_images(archives: Sequence[ShardInfo | RawArchive], recipe: Recipe) -> int:
    """The number of images that train a network; of folds, about as many as train each."""
    images = sum(archive.rows(split) for archive in archives for split in ("train", "val")[: 1 + (recipe.folds > 0)])
    return images * (recipe.folds - 1) // recipe.folds if recipe.folds else images


def open_archive(options: ArchiveOptions, uri: str) -> ShardInfo | RawArchive:
    """The description of shards, or the manifest of a raw archive."""
    if not shards.is_shards(uri):
        read_large_archive(uri, options.reading)
        manifest = open_manifest(uri, options.reading, options.labeling)
        return RawArchive(uri, manifest, None if options.stream else options.stored_size)
    options.reading.check_raw(uri)
    options.labeling.check_raw(uri)
    return shards.read_info(uri)  # raises for latents


def _check_out(options: ArchiveOptions, out: str) -> None:
    """Raise UserError if OUT contains shards of other archives."""
    made = storage.join(out, SHARDS)
    before, several = list(shards.joined_archives(made)), len(options.uris) > 1
    if (before and before != options.uris) or (several and storage.exists(storage.join(made, LEDGER_FILE))):
        raise UserError(
            f"{made} contains shards of {' and '.join(before) or 'one archive'}, not of "
            f"{' and '.join(options.uris) or 'phantoms'}: use another --out, or the same --archive in the same order"
        )


def _check_alike(archives: Sequence[ShardInfo | RawArchive], *, by_box: bool) -> None:
    """Raise UserError unless the archives have the same pixels and, if boxes are learned, the same findings.

    Labels of findings that an archive does not have are unknown. Boxes cannot be: what is not listed is absent.
    """
    kinds = {}
    for archive in archives:
        if isinstance(archive, ShardInfo):
            pixels = archive.pixels
        else:
            pixels = PixelFormat(archive.stored_px) if archive.stored_px else None
        kinds[archive.uri] = {"pixels": pixels} | ({"findings": archive.findings} if by_box else {})
    shards.check_alike(kinds)
