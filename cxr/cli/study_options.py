"""The option `--preset` of studies: the full protocol of a paper. Without torch, for a quick `--help`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from cxr.cli.early_options import early_values
from cxr.errors import UserError
from cxr.families.presets import Preset, presets_help


@dataclass(frozen=True)
class StudyPreset(Preset):
    """Settings in which a study's networks differ from their family's defaults, and options that go with them."""

    study: Mapping[str, Any] = field(default_factory=dict)
    """Options of the study itself."""

    @classmethod
    def of(cls, preset: Preset, description: str, *, study: Mapping[str, Any], cost: str) -> Self:
        """A study of networks that are trained with the settings of a family's preset.

        Args:
            description: replaces the preset's.
            study: options of the study itself.
            cost: a sentence on how long the study takes, which follows the preset's protocol.
        """
        kept = {"settings": preset.settings, "archive": preset.archive, "run": preset.run}
        protocol = f"{preset.protocol} {cost}"
        return cls(description, **kept, protocol=protocol, differences=preset.differences, study=study)


@dataclass(frozen=True, kw_only=True)
class SegmentationNetworks:
    """Options of the studies of segmentation networks."""

    networks: tuple[str, ...] = ()
    """Networks to compare: small_unet, unet-BACKBONE, unet-BACKBONE-scse (resnet18, resnet34), fcn32s-BACKBONE,
    fcn16s-BACKBONE, fcn8s-BACKBONE (alexnet, vgg16, googlenet, resnet18, resnet34, resnet50). Default: all of
    them."""
    seeds: int = 1
    """Number of networks per kind, each with its own seed."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a study that has presets; it also has `recipe`, `data` and `run`."""

    PRESETS: ClassVar[Mapping[str, StudyPreset]]

    preset: str = ""
    """Name of a preset from the list above to start from. Other options on the command line override it."""

    def starting_point(self, arguments: Sequence[str]) -> Self:
        """These options as changed by `--preset`, before other arguments are applied.

        Raises:
            UserError: there is no such preset.
        """
        (names,) = early_values(arguments, "--preset")
        if not names:
            return self
        name = names[0]
        if name not in self.PRESETS:
            raise UserError(f"--preset: expected one of {', '.join(self.PRESETS)}, got {name}")
        preset, options = self.PRESETS[name], vars(self)
        changed = {
            "recipe": type(options["recipe"])(**preset.settings),
            "data": replace(options["data"], **preset.archive),
            "run": replace(options["run"], **preset.run),
        }
        return replace(self, **changed, **preset.study)

    def presets_help(self) -> str:
        """The study's presets, for `--help`."""
        return presets_help(self.PRESETS)
