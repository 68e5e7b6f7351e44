"""Whether a recipe or a checkpoint can work with an archive: all such checks, without Ray or decoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from cxr import schema
from cxr.data.sampling import Fold, Sampling
from cxr.data.shards import ShardInfo
from cxr.errors import UserError
from cxr.families import image_crop
from cxr.families.base import Recipe
from cxr.families.capabilities import PositiveSampling
from cxr.families.checkpoint import Checkpoint
from cxr.families.image_crop import ImageCrop
from cxr.imaging.aligned_frame import ALIGNED
from cxr.imaging.center_crop import CENTER
from cxr.imaging.enhance import Enhancement
from cxr.sources.manifest import Manifest


@dataclass(frozen=True)
class RawArchive:
    """An archive before it is decoded."""

    uri: str
    manifest: Manifest
    stored_px: int | None
    """Height and width of the shards that will be made of it; None: it is streamed into training without shards."""

    @property
    def findings(self) -> tuple[str, ...]:
        return self.manifest.findings

    def rows(self, split: str) -> int:
        return pc.sum(pc.equal(self.manifest.table[schema.SPLIT], split)).as_py() or 0


def check_compatible(archives: Sequence[ShardInfo | RawArchive], model: Recipe | Checkpoint) -> None:
    """Check that `model` can work with `archives`, which are used as one.

    A checkpoint must be able to score them: shards need images as large as the network's input, with the crop and
    the enhancement that it was trained with. A recipe must also be able to learn from them: images in both splits,
    the findings or masks that its family learns from, and, where an archive is streamed, nothing that only shards
    offer.

    Raises:
        UserError: the message says what differs and what to do.
    """
    if isinstance(model, Checkpoint):
        for shards in archives:
            if isinstance(shards, ShardInfo):
                check_pixels(shards, model.recipe, image_crop.of_checkpoint(model))
        return
    recipe, crop, fold = model, image_crop.of_recipe(model), fold_of(model)
    for archive in archives:
        if isinstance(archive, ShardInfo):
            check_pixels(archive, recipe, crop)
        elif archive.stored_px is None:
            check_raw(recipe, archive.uri)
        else:
            check_size(recipe, archive.stored_px)
    _check_splits(archives, fold)
    for archive in archives:
        _check_findings(archive, recipe)
    _check_masks(archives, recipe)
    _check_boxes(archives, recipe)


def check_pixels(info: ShardInfo, recipe: Recipe, crop: ImageCrop | None) -> None:
    """Raise UserError unless the stored images have the size, the crop and the enhancement that `recipe` needs.

    The size of latents is checked with their encoder, see `cxr.inference.latents`.
    """
    if info.latents is None:
        check_size(recipe, info.pixels.size)
    check_crop(info, crop)
    check_enhancement(info, recipe.enhancement)


def check_size(recipe: Recipe, stored_px: int) -> None:
    """Raise UserError if images are stored smaller than the network's input."""
    if stored_px < recipe.size:
        raise UserError(
            f"expected stored images of at least size={recipe.size} px, got {stored_px} px: ingest the archive again "
            f"with larger pixels, or lower the recipe's size"
        )


def check_crop(info: ShardInfo, crop: ImageCrop | None) -> None:
    """Raise UserError unless the images of `info` were cropped by `crop`; None: unless they are whole."""
    expected = crop.describe() if crop else None
    if info.crop == expected:
        return
    how = f"with {crop.options()}" if crop else "without --lung-crop, --aligner and --center-crop"
    raise UserError(
        f"{info.uri} contains {_crop_text(info.crop)}, but {_crop_text(expected)} are needed: run "
        f"cxr ingest {how} into another --out, or use the archive that these shards were made of"
    )


def _crop_text(crop: Mapping[str, Any] | None) -> str:
    if crop is None:
        return "whole images"
    if crop["rule"] == CENTER:
        return f"centered squares ({crop['resampling']} resampling)"
    if crop["rule"] == ALIGNED:
        return f"images aligned by the checkpoint {crop['sha256'][:12]}"
    return f"crops by the lung checkpoint {crop['sha256'][:12]} with margin {crop['margin']:g}"


def check_enhancement(info: ShardInfo, enhancement: Enhancement) -> None:
    """Raise UserError unless the images of `info` were enhanced in this way before they were stored."""
    if info.enhancement != enhancement:
        actual, expected = info.enhancement.options() or "no enhancement", enhancement.options()
        raise UserError(
            f"{info.uri} was ingested with {actual}, but this run needs {expected or 'no enhancement'}: run "
            f"cxr ingest {expected or 'without these options'} into another --out, or use the archive "
            f"that these shards were made of"
        )


def fold_of(recipe: Recipe) -> Fold | None:
    """The fold that a network of this recipe is validated on; None: the archive's own split.

    Raises:
        UserError: there are folds, but the recipe does not say which of them validates.
    """
    if recipe.folds and recipe.fold is None:
        raise UserError(
            f"folds={recipe.folds} without fold: only a train job trains all of them. Use --fold, from 0 to "
            f"{recipe.folds - 1}"
        )
    return Fold(recipe.fold, recipe.folds) if recipe.fold is not None else None


def sampling_of(recipe: Recipe) -> Sampling | None:
    """How images are sampled for each epoch of a recipe. None: every image once."""
    if not isinstance(recipe, PositiveSampling):
        return None
    fractions = [recipe.positive_fraction_of(epoch) for epoch in range(recipe.total_epochs)]
    known = tuple(fraction for fraction in fractions if fraction is not None)
    assert len(known) in (0, len(fractions)), "a fraction of positives in all epochs, or in none"
    return Sampling(recipe.sampled_finding, known) if known else None


def check_raw(recipe: Recipe, archive: str) -> None:
    """Raise UserError if the recipe needs what only shards offer, and `archive` is to be streamed."""
    if needed := _needs_own_reader(recipe):
        raise UserError(
            f"{archive} is not shards, but {needed} require the list of all images before the first is decoded. "
            f"Leave --stream out, or run cxr ingest and use its --out as --archive"
        )


def check_ray_reader(recipe: Recipe) -> None:
    """Raise UserError if the recipe needs what only our own reader of shards offers."""
    if needed := _needs_own_reader(recipe):
        raise UserError(
            f"--shard-reader ray: {needed} are not available, because Ray Data reads each image of the archive's own "
            f"splits once per epoch. Use --shard-reader own"
        )


def _needs_own_reader(recipe: Recipe) -> str:
    """What the recipe asks for that Ray Data cannot do, as a plural; empty if nothing."""
    if recipe.folds:
        return "folds"
    return "samples with a fraction of positives" if sampling_of(recipe) else ""


def _check_splits(archives: Sequence[ShardInfo | RawArchive], fold: Fold | None) -> None:
    """Raise UserError unless there are images to train on and images to validate with."""
    train, val = (sum(archive.rows(split) for archive in archives) for split in ("train", "val"))
    if max(train, val) == 0 or (fold is None and min(train, val) == 0):
        rejects = sum(archive.rejects for archive in archives if isinstance(archive, ShardInfo))
        raise UserError(
            f"expected usable images in the train split and in the val split of {_names(archives)}, got {train} and "
            f"{val}, and {rejects} images that cannot be used: use an archive of more patients, or repair its images"
        )


def _check_findings(archive: ShardInfo | RawArchive, recipe: Recipe) -> None:
    """Raise UserError unless the archive has labels, where the recipe's family learns or samples by them."""
    if {schema.LABELS, schema.BOXES} & {*recipe.columns} and not archive.findings:
        raise UserError(
            f"{archive.uri} has no labels, but family {recipe.family} learns from labels: use an archive that has "
            f"labels, or add them with --labels or --boxes"
        )
    sampling = sampling_of(recipe)
    if sampling and sampling.finding != schema.ANY_FINDING and sampling.finding not in archive.findings:
        raise UserError(
            f"{archive.uri} has no labels of {sampling.finding}, so its images cannot be sampled by it: its findings "
            f"are {', '.join(archive.findings) or 'none'}. Use another archive, or train without a positive fraction"
        )


def _check_masks(archives: Sequence[ShardInfo | RawArchive], recipe: Recipe) -> None:
    """Raise UserError if the recipe's family learns from masks and none of the archives, all of them raw, has one."""
    manifests = [archive.manifest.table for archive in archives if isinstance(archive, RawArchive)]
    if schema.PRED_MASK_RLE not in recipe.score_columns.names or len(manifests) < len(archives):
        return
    labels = [pc.struct_field(pc.list_flatten(table[schema.MASKS]), schema.LABEL) for table in manifests]
    if not any(pc.any(pc.equal(label, recipe.mask_label)).as_py() for label in labels):
        raise UserError(
            f"{_names(archives)} has no mask of {recipe.mask_label}, from which family {recipe.family} learns: use "
            f"an archive with such masks, or add them with --masks"
        )


def _check_boxes(archives: Sequence[ShardInfo | RawArchive], recipe: Recipe) -> None:
    """Raise UserError if the recipe's family learns from boxes only, and no image that it may train on has one."""
    learned = {schema.PRED_BOXES, schema.PROBABILITIES} & {*recipe.score_columns.names}
    if learned == {schema.PRED_BOXES} and not any(_has_boxes(archive) for archive in archives):
        raise UserError(
            f"{_names(archives)} has no boxes outside its test split, but family {recipe.family} learns from boxes: "
            f"use an archive that has boxes, or add them with --boxes"
        )


def _has_boxes(archive: ShardInfo | RawArchive) -> bool:
    """Whether an image has a box: for raw archives, one outside the test split, since folds may train on val."""
    if isinstance(archive, ShardInfo):
        return archive.most_boxes > 0
    table = archive.manifest.table
    boxes = pc.list_value_length(table[schema.BOXES].filter(pc.not_equal(table[schema.SPLIT], "test")))
    return (pc.max(boxes).as_py() or 0) > 0


def _names(archives: Sequence[ShardInfo | RawArchive]) -> str:
    return " and ".join(archive.uri for archive in archives)
