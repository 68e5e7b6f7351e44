"""Ways to preprocess images, which studies compare one by one with none: recipes and shards of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cxr import storage
from cxr.cli.options import ArchiveOptions
from cxr.cli.study_networks import check_names, check_originals
from cxr.cli.training_jobs import demo_lung_checkpoint, ensure_shards
from cxr.errors import UserError
from cxr.families import image_crop
from cxr.families.base import Recipe, SomeRecipe

NONE, LUNG_CROP = "none", "lung-crop"
VARIANTS: Mapping[str, Mapping[str, str]] = {
    NONE: {},
    "median": {"denoise": "median"},
    "nlm": {"denoise": "nlm"},
    "percentile": {"normalize": "percentile"},
    "clahe": {"equalize": "clahe"},
    LUNG_CROP: {},
}
"""Settings in which each variant's recipe differs from that of the job; that of `LUNG_CROP` is a checkpoint."""


def check_variants(names: Sequence[str], recipe: Recipe, archive: ArchiveOptions, lungs: str) -> None:
    """Raise UserError if variants are unknown, or the recipe, archive or lung checkpoint does not suit them."""
    check_names("--preprocessing", names, [name for name in VARIANTS if name != NONE])
    check_originals(archive)
    if recipe.enhancement or recipe.crop_setting:
        raise UserError(
            "expected none of --denoise, --normalize, --equalize, --lung-crop and --aligner, because the study "
            "preprocesses images: use --preprocessing"
        )
    if lungs and LUNG_CROP not in names:
        raise UserError(f"--lungs: expected nothing without the preprocessing {LUNG_CROP}, got {lungs}: omit it")
    if lungs:
        image_crop.by_lungs(lungs)  # raises if it is not a lung network
    if LUNG_CROP in names and archive.archive and not lungs:
        raise UserError(
            f"--lungs: expected a checkpoint of cxr train lungs for the preprocessing {LUNG_CROP}, got none: use "
            f"one, or omit {LUNG_CROP}"
        )


def variants(
    names: Sequence[str], recipe: SomeRecipe, archive: ArchiveOptions, lungs: str, out: str
) -> dict[str, SomeRecipe]:
    """The recipe of each variant, of which `NONE` is the first. Trains a small lung network on phantoms if needed."""
    recipes = {name: recipe.replace(**VARIANTS[name]) for name in (NONE, *names) if name != LUNG_CROP}
    if LUNG_CROP in names:
        crop = storage.normalize(lungs) if lungs else demo_lung_checkpoint(archive.uris[0], out)
        recipes[LUNG_CROP] = recipe.replace(lung_crop=crop)
    return recipes


def plain_shards(recipe: Recipe, archive: ArchiveOptions, out: str) -> str:
    """URI of the shards of images that are not preprocessed, which are made in OUT/none/shards."""
    return ensure_shards(archive, storage.join(out, NONE), recipe)


def shards_of_each(recipes: Mapping[str, Recipe], plain: str, archive: ArchiveOptions, out: str) -> dict[str, str]:
    """URIs of the shards of each recipe: `plain_shards`, and those that are made in OUT/NAME/shards."""
    others = {name: recipe for name, recipe in recipes.items() if name != NONE}
    made = {name: ensure_shards(archive, storage.join(out, name), recipe) for name, recipe in others.items()}
    return {NONE: plain, **made}
