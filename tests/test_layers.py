"""The shape of the tree: imports run one way, every module says what lives there, none grows too long."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
IN_CXR = sorted((REPOSITORY / "cxr").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("jobs", "cluster") for path in (REPOSITORY / folder).glob("*.py"))
MODULES = [*IN_CXR, *SCRIPTS]

# The packages of cxr from bottom to top, each with the earlier packages that it may import.
MAY_IMPORT = {
    "errors": "",
    "wording": "",
    "schema": "",
    "precision": "",
    "storage": "errors",
    "imaging": "errors",
    "boxes": "errors wording schema imaging",
    "augment": "precision schema",
    "sources": "errors wording schema storage imaging boxes",
    "phantom": "errors schema storage sources",
    "runtime": "errors storage",
    "data": "errors wording schema storage imaging sources runtime",
    "models": "errors precision storage",
    "metrics": "schema boxes models",
    "reporting": "wording schema storage metrics",
    "families": "errors schema precision storage imaging boxes augment "
    "sources phantom runtime data models metrics reporting",
    "training": "errors schema storage sources runtime data reporting families",
    "inference": "errors schema storage imaging sources runtime data reporting families",  # reporting: `show`
    "evaluation": "errors wording schema storage imaging boxes sources runtime "
    "data models metrics reporting inference",
    "export": "errors wording schema storage imaging boxes sources runtime "
    "data models metrics reporting families evaluation",
    "benchmarks": "errors wording schema storage imaging boxes sources phantom runtime "
    "data models metrics reporting families training inference evaluation export",
    "cli": "errors wording schema storage imaging boxes sources phantom runtime "
    "data models metrics reporting families training inference evaluation export benchmarks",
}
MAY_IMPORT_RAY = (  # folders and files
    "runtime/",
    "data/ingest.py",
    "data/ray_data.py",
    "data/ray_input.py",
    "training/",
    "inference/score_parts.py",
    "benchmarks/throughput/",
)
KNOW_NO_FAMILY = {"data", "training", "inference"}  # they work with any recipe and task


def part(path: Path) -> str:
    """The part of cxr that a file belongs to: `training` for cxr/training/fit.py."""
    return path.relative_to(REPOSITORY / "cxr").parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, wherever in it; `from cxr import schema` gives `cxr.schema`."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_names_are_distinguished() -> None:
    assert within("cxr.models.unet", {"cxr.models"})
    assert not within("cxr.modelsx", {"cxr.models"})
    assert "ray.train" in set(imports(REPOSITORY / "cxr" / "training" / "fit.py"))


def test_first_line_says_what_lives_there() -> None:
    first = {path: (ast.get_docstring(parsed(path)) or "").partition("\n")[0] for path in MODULES}
    assert [str(path) for path, line in first.items() if len(line) < 20 or line[-1] not in ".:"] == []


def test_no_module_grows_too_long() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > 600} == {}


def test_ray_is_imported_only_where_it_may_be() -> None:
    outside = [path for path in IN_CXR if not str(path.relative_to(REPOSITORY / "cxr")).startswith(MAY_IMPORT_RAY)]
    assert [str(path) for path in outside if any(within(name, {"ray"}) for name in imports(path))] == []


def test_the_parts_are_listed_from_bottom_to_top() -> None:
    parts = list(MAY_IMPORT)
    for number, name in enumerate(parts):
        assert set(MAY_IMPORT[name].split()) <= set(parts[:number]), name


def test_no_part_imports_what_it_may_not() -> None:
    wrong = []
    for path in IN_CXR:
        if part(path) == "__init__":
            continue
        allowed = {f"cxr.{name}" for name in (part(path), *MAY_IMPORT[part(path)].split())}
        ours = [name for name in imports(path) if within(name, {"cxr", "jobs", "tests", "cluster"}) and name != "cxr"]
        wrong += [f"{path.relative_to(REPOSITORY)} imports {name}" for name in ours if not within(name, allowed)]
    assert wrong == []


def test_training_and_scoring_know_no_family() -> None:
    shared = {
        "__init__",
        "base",
        "capabilities",
        "checkpoint",
        "checkpoint_files",
        "model_card",
        "compatibility",
        "image_crop",
        "presets",
        "thresholds_file",
    }
    names = {path.stem for path in (REPOSITORY / "cxr" / "families").glob("*.py")} - shared
    families = {f"cxr.families.{name}" for name in names} | {"cxr.models"}
    general = [path for path in IN_CXR if part(path) in KNOW_NO_FAMILY]
    assert [str(path) for path in general if any(within(name, families) for name in imports(path))] == []
