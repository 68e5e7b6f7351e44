"""The families by name; a new family adds one line. A family's module is imported when it is first needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cxr.errors import UserError

if TYPE_CHECKING:
    from cxr.families.base import Recipe

RECIPES = {
    "align": "cxr.families.align.AlignRecipe",
    "aecnn": "cxr.families.aecnn.AecnnRecipe",
    "attend": "cxr.families.attend.AttendRecipe",
    "classify": "cxr.families.classify.ClassifyRecipe",
    "detect": "cxr.families.detect.DetectRecipe",
    "localize": "cxr.families.localize.LocalizeRecipe",
    "lungs": "cxr.families.lungs.LungsRecipe",
    "pneumothorax": "cxr.families.pneumothorax.PneumothoraxRecipe",
}

ENSEMBLES = {  # not trained, but joined from trained networks
    "ensemble": "cxr.families.ensemble.EnsembleRecipe",
    "fused": "cxr.families.fused_features.FusedFeaturesRecipe",
}


def recipe_type(family: str) -> type[Recipe]:
    """The recipe's class of a family.

    Raises:
        UserError: the family is not one of `RECIPES`.
    """
    if family not in RECIPES | ENSEMBLES:
        raise UserError(f"unknown family {family!r}: expected one of {', '.join(RECIPES)}")
    module, _, name = (RECIPES | ENSEMBLES)[family].rpartition(".")
    return getattr(importlib.import_module(module), name)


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_dict` wrote.

    Raises:
        UserError: the family is unknown.
    """
    return recipe_type(values.get("family", "")).from_dict(values)
