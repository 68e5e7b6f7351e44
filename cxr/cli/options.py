"""Options that jobs share. This module imports neither torch nor Ray, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self

import tyro

from cxr import storage
from cxr.cli.early_options import early_values
from cxr.cli.plan_options import PlanOptions
from cxr.errors import UserError, check_fraction, check_least
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, Labeling, ReadOptions
from cxr.training.options import RunOptions, SearchOptions


def check_described(archive: Sequence[str] | None, reading: ReadOptions, labeling: Labeling = SOURCE_LABELS) -> None:
    """Raise UserError if options describe an archive, but none is given, so that a phantom archive would be used."""
    described = [f"--{name}" for name in ("source", "select") if getattr(reading, name) != getattr(ALL_IMAGES, name)]
    described += [labeling.options()] if labeling else []
    if described and not archive:
        raise UserError(
            f"expected --archive with {', '.join(described)}, got none: add it, because these options do not "
            f"apply to phantoms"
        )


@dataclass(frozen=True, kw_only=True)
class ArchiveOptions:
    """Which X-rays to use, and how to read them."""

    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Archive or shards: a folder, s3://bucket/prefix or gs://bucket/prefix; a ZIP or TAR file; or a CSV or Parquet
    file that lists images. Repeat the option to use several archives together; findings that an archive does not have
    are unknown for its images. Default: a small phantom archive."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    stored_size: int = 256
    """Height and width, in pixels, of images in shards that are created from an archive."""
    stream: bool = False
    """Decode the archive in every epoch instead of writing shards to OUT/shards first."""
    max_rejects: float = 0.05
    """Fraction of unusable images above which the job fails."""
    phantoms: int = 160
    """Number of images in the phantom archive that is generated if no archive is given."""
    labeling: Labeling = field(default_factory=Labeling)

    def __post_init__(self) -> None:
        check_least(self, stored_size=1, phantoms=1)
        check_fraction(self, "max_rejects")

    def with_headers(self, out: str) -> ArchiveOptions:
        """The same options; headers of DICOM archives are stored in OUT/headers unless they say where."""
        return replace(self, reading=self.reading.with_headers(out))

    @property
    def uris(self) -> list[str]:
        """The archives' normalized URIs."""
        return [storage.normalize(archive) for archive in self.archive]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Options of every command that trains or searches. The parser takes the class of `recipe` from its default."""

    out: str
    """Folder or URI of the results."""
    preset: str = ""
    """Name of a preset from the list above to start from. Other options on the command line override it."""
    recipe_file: Annotated[str, tyro.conf.arg(name="recipe", metavar="FILE")] = ""
    """Recipe to start from: a JSON or YAML file, a result.json, or the folder of a checkpoint. Other options on the
    command line override it."""
    data: ArchiveOptions = field(default_factory=ArchiveOptions)
    recipe: Any
    run: RunOptions = field(default_factory=RunOptions)
    resume: bool = False
    """Continue the run in --out, which was killed, or which finished and is to be trained for more --epochs."""
    planning: PlanOptions = field(default_factory=PlanOptions)

    def starting_point(self, arguments: Sequence[str]) -> Self:
        """These options as changed by `--preset` or `--recipe`, before other arguments are applied.

        Raises:
            UserError: both are given, or they name no recipe of this family.
        """
        from cxr.families import presets

        recipe_type = type(self.recipe)
        names, files = early_values(arguments, "--preset", "--recipe")
        if names and files:
            raise UserError("expected --preset or --recipe, got both: use one of them")
        if files:
            return replace(self, recipe=presets.read_recipe(recipe_type, files[0]))
        if names:
            preset = presets.find_preset(recipe_type.family, names[0])
            return replace(
                self,
                recipe=presets.preset(recipe_type, names[0]),
                data=replace(self.data, **preset.archive),
                run=replace(self.run, **preset.run),
            )
        return self

    def presets_help(self) -> str:
        """The family's presets, one per line, for `--help`."""
        from cxr.families.presets import PRESETS, presets_help

        return presets_help(PRESETS[self.recipe.family])


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """Options of every command that trains."""

    members: int = 1
    """Number of networks to train, as many at a time as the cluster has room for. Several networks become an
    ensemble in a single checkpoint. Each has its own seed and, with --folds, the next fold in turn. If a member
    fails, the job continues without it. Several networks, also those of --folds, resume without --resume."""

    def __post_init__(self) -> None:
        check_least(self, members=1)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(RecipeOptions):
    """Options of every command that searches settings; the recipe has those that are not searched."""

    search: SearchOptions = field(default_factory=SearchOptions)
