"""What a recipe needs of an archive, and whether the archive can give it."""

from __future__ import annotations

from cxr.data.sampling import Fold, Sampling
from cxr.errors import UserError
from cxr.families.base import Recipe
from cxr.families.capabilities import PositiveSampling


def fold_of(recipe: Recipe) -> Fold | None:
    """The fold that a network of this recipe is validated on; None: the archive's own split.

    Raises:
        UserError: there are folds, and it is left open which one validates.
    """
    if recipe.folds and recipe.fold is None:
        raise UserError(
            f"folds={recipe.folds} without fold: only a train job trains all of them. Give --fold, from 0 to "
            f"{recipe.folds - 1}"
        )
    return Fold(recipe.fold, recipe.folds) if recipe.fold is not None else None


def sampling_of(recipe: Recipe) -> Sampling | None:
    """How images are sampled for each epoch of a recipe. None: every image once."""
    if not isinstance(recipe, PositiveSampling):
        return None
    fractions = [recipe.positive_fraction(epoch) for epoch in range(recipe.total_epochs)]
    given = tuple(fraction for fraction in fractions if fraction is not None)
    assert len(given) in (0, len(fractions)), "a fraction of positives in all epochs, or in none"
    return Sampling(recipe.sampled_finding, given) if given else None


def check_raw(recipe: Recipe, archive: str) -> None:
    """Raise UserError where a recipe wants what only shards allow, and `archive` is not shards."""
    if recipe.lung_crop:
        raise UserError(
            f"{archive} is no shards: images are cropped to the lungs when shards are made. Leave --stream out, or "
            f"run jobs/ingest_archive.py with --lung-crop {recipe.lung_crop} and give its --out as --archive"
        )
    if recipe.enhancement:
        raise UserError(
            f"{archive} is no shards: images are enhanced when shards are made. Leave --stream out, or run "
            f"jobs/ingest_archive.py with {recipe.enhancement} and give its --out as --archive"
        )
    if fold_of(recipe) or sampling_of(recipe):
        raise UserError(
            f"{archive} is no shards: folds, and a share of positives, need to know all images before the first is "
            f"decoded. Leave --stream out, or run jobs/ingest_archive.py and give its --out as --archive"
        )
