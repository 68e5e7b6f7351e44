"""The families by name; a new family adds one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cxr.errors import UserError
from cxr.recipes.aecnn import AecnnRecipe
from cxr.recipes.align import AlignRecipe
from cxr.recipes.attend import AttendRecipe
from cxr.recipes.base import Recipe
from cxr.recipes.detect import DetectRecipe
from cxr.recipes.localize import LocalizeRecipe
from cxr.recipes.lungs import LungsRecipe
from cxr.recipes.pneumothorax import PneumothoraxRecipe

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
