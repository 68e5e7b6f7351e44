"""Decision thresholds in a file beside a checkpoint: re-chosen on a hospital's own labels, and used when scoring.

    {"cxr_thresholds": 1, "family": "classify", "checkpoint_sha256": "…", "criterion": "youden",
     "thresholds": {"Effusion": 0.31}, "made_from": {…}}

A threshold is a probability in [0, 1] for classifiers, a box's score for detectors, and for segmentation models the
area of a mask as a share of the image, below which the mask is emptied. Findings that are not listed keep the
checkpoint's own decisions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cxr import schema, storage
from cxr.data.run_ledger import family_of
from cxr.errors import UserError
from cxr.families.base import Recipe
from cxr.families.checkpoint import Checkpoint

VERSION = 1
FILE = "thresholds.json"
_FORMAT = "cxr_thresholds"


@dataclass(frozen=True)
class ThresholdsFile:
    """The contents of a file of thresholds."""

    family: str
    checkpoint_sha256: str
    criterion: str
    thresholds: Mapping[str, float]
    made_from: Mapping[str, Any] = field(default_factory=dict)
    """Counts of the images and patients, and intervals, by finding."""

    def write(self, uri: str) -> None:
        storage.write_json(uri, {_FORMAT: VERSION, **{name: getattr(self, name) for name in _FIELDS}})

    @classmethod
    def read(cls, uri: str) -> ThresholdsFile:
        """The file at a URI, or in a folder.

        Raises:
            UserError: it does not exist, or is not such a file.
        """
        within = storage.join(uri, FILE)
        try:
            values = json.loads(storage.read_bytes(within if storage.exists(within) else uri))
        except ValueError as error:
            raise UserError(
                f"{uri}: expected a file that cxr thresholds wrote, got no JSON ({error}): write it again with cxr "
                "thresholds"
            ) from error
        if not isinstance(values, dict) or _FORMAT not in values:
            raise UserError(
                f"{uri}: expected a file that cxr thresholds wrote, got other JSON: name the thresholds.json that it "
                "wrote"
            )
        if values[_FORMAT] != VERSION:
            raise UserError(
                f"{uri}: expected thresholds of version {VERSION}, got {values[_FORMAT]}: use the version of cxr "
                f"that wrote them"
            )
        if missing := {"family", "checkpoint_sha256", "criterion", "thresholds"} - set(values):
            raise UserError(
                f"{uri}: expected {', '.join(sorted(missing))}, got none: use a file that cxr thresholds wrote"
            )
        thresholds = values["thresholds"]
        if not isinstance(thresholds, dict) or not all(map(_is_share, thresholds.values())):
            raise UserError(
                f"{uri}: expected a number from 0 to 1 for each finding in `thresholds`, got other values: write it "
                "again with cxr thresholds"
            )
        return cls(**{name: values[name] for name in _FIELDS if name in values})


_FIELDS = ("family", "checkpoint_sha256", "criterion", "thresholds", "made_from")


def _is_share(value: object) -> bool:
    """Slightly more than 1 is allowed: nothing is positive then."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(0 <= value < 1.1)


def with_thresholds(
    models: Mapping[str, Checkpoint], uris: Sequence[str], own: Mapping[str, str] | None = None
) -> dict[str, Checkpoint]:
    """Checkpoints by name, each with the thresholds of the file that was made for it, if there is one.

    Args:
        uris: of files, each for all checkpoints with its SHA-256.
        own: URIs of files by the name of the checkpoint that they are for.

    Raises:
        UserError: a file is for none of these checkpoints, two are for the same one, or one does not fit.
    """
    files = [(uri, [*models]) for uri in uris] + [(uri, [name]) for name, uri in (own or {}).items()]
    changed = dict(models)
    for uri, names in files:
        file = ThresholdsFile.read(uri)
        named = [name for name in names if models[name].about["sha256"] == file.checkpoint_sha256]
        if not named:
            given = ", ".join(f"{models[name].uri} ({models[name].about['sha256'][:12]})" for name in names)
            raise UserError(
                f"{uri}: expected thresholds of {given}, got those of another checkpoint, with SHA-256 "
                f"{file.checkpoint_sha256[:12]}: use that checkpoint, or choose thresholds for this one with "
                f"cxr thresholds"
            )
        for name in named:
            if changed[name].thresholds:
                raise UserError(
                    f"expected one file of thresholds for {models[name].uri}, got a second one, {uri}: omit one"
                )
            changed[name] = _applied(models[name], file, uri)
    return changed


def _applied(model: Checkpoint, file: ThresholdsFile, uri: str) -> Checkpoint:
    family = family_of(model.recipe.to_dict())
    if file.family != family:
        raise UserError(
            f"{uri}: expected thresholds of family {family}, got {file.family}: use the file made for this checkpoint"
        )
    known = decided_names(model.recipe, model.findings)
    if unknown := set(file.thresholds) - set(known):
        raise UserError(
            f"{uri}: expected thresholds of {', '.join(known) or 'nothing'}, got {', '.join(sorted(unknown))}: use "
            f"the file made for this checkpoint"
        )
    return replace(model, thresholds={name: float(value) for name, value in file.thresholds.items()})


def decided_names(recipe: Recipe, findings: Sequence[str]) -> tuple[str, ...]:
    """What a checkpoint decides about an image: its findings, or the label of its mask."""
    return (recipe.mask_label,) if schema.PRED_MASK_RLE in recipe.score_columns.names else tuple(findings)
