"""The families by name; a new family adds one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cxr.errors import UserError
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import Recipe
from cxr.families.detect import DetectRecipe
from cxr.families.localize import LocalizeRecipe
from cxr.families.lungs import LungsRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe

RECIPES: dict[str, type[Recipe]] = {
    r.family: r
    for r in (AlignRecipe, AecnnRecipe, AttendRecipe, DetectRecipe, LocalizeRecipe, LungsRecipe, PneumothoraxRecipe)
}


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_dict` wrote.

    Raises:
        UserError: the family is not known here.
    """
    family = values.get("family")
    if family not in RECIPES:
        raise UserError(f"family {family!r} is not known here; known are {', '.join(RECIPES)}")
    return RECIPES[family].from_dict(values)
