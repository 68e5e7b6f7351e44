"""docs/reference/scores.md lists every column of every family's scores, with its type, and no other."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest

from cxr import schema
from cxr.families import RECIPES, recipe_type
from tests.doc_commands import REPOSITORY

PAGE = (REPOSITORY / "docs" / "reference" / "scores.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])


def documented(section: str) -> dict[str, str]:
    """The type of each column in a section's table."""
    return dict(re.findall(r"^\| `([\w/]+)` \| (.*?) \| .+ \|$", SECTIONS[section], flags=re.MULTILINE))


def columns(fields: pa.Schema) -> dict[str, str]:
    """The type of each column, without the names that Arrow gives to the values of lists."""
    return {field.name: re.sub(r"(item|element): ", "", str(field.type)) for field in fields}


def test_the_columns_of_every_family_are_documented() -> None:
    assert documented("Columns of every family") == columns(schema.SCORES) | {schema.INCREMENT: "int32"}


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_the_columns_of_a_family_are_documented(family: str) -> None:
    (section,) = [name for name in SECTIONS if family in re.split(r"[ ,:]+", name.partition(":")[2])]
    assert documented(section) == columns(recipe_type(family).score_columns)


def test_the_version_is_documented() -> None:
    assert re.search(rf"version {schema.SCORES_VERSION} of these files", " ".join(PAGE.split()))
    assert f"`{schema.SCORES_VERSION_KEY.decode()}`" in PAGE
