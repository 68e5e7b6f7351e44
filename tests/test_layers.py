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

MAY_IMPORT_RAY = {"train", "tune", "score", "ingest", "dataset", "cluster", "speed", "study"}
BASE = {"cxr.schema", "cxr.errors", "cxr.precision"}
# A part of cxr -> what it may import of cxr besides itself. The parts not named here are the chain: they
# stand above all of these, and know recipes.base, never a family. (workflow.py, above it, is the jobs' own.)
MAY_IMPORT = {
    "errors": set(),
    "schema": set(),
    "storage": {"cxr.errors"},
    "boxes": {"cxr.errors"},
    "batches": BASE | {"cxr.imaging"},
    "precision": set(),
    "state_dicts": set(),
    "models": {"cxr.precision", "cxr.state_dicts"},
    "metrics": BASE | {"cxr.boxes", "cxr.models"},
    "imaging": BASE,
    "decode_worker": BASE | {"cxr.imaging"},
    "memory_budget": set(),
    "decode_pool": BASE | {"cxr.imaging", "cxr.decode_worker", "cxr.memory_budget"},
    "sources": BASE | {"cxr.storage", "cxr.imaging", "cxr.boxes"},
    "phantom": BASE | {"cxr.storage", "cxr.imaging", "cxr.sources"},
    "report": BASE | {"cxr.storage", "cxr.metrics"},
    "judge": BASE
    | {
        f"cxr.{name}"
        for name in (
            "boxes",
            "storage",
            "imaging",
            "sources",
            "decode_pool",
            "rows",
            "shards",
            "ledger",
            "metrics",
            "report",
        )
    },
    "recipes": BASE
    | {"cxr.state_dicts"}
    | {
        f"cxr.{name}"
        for name in ("boxes", "storage", "sources", "batches", "models", "metrics", "imaging", "phantom", "report")
    },
    "benchmark": BASE
    | {f"cxr.{name}" for name in ("storage", "sources", "rows", "batches", "models", "metrics", "report")}
    | {"cxr.recipes.base", "cxr.checkpoint", "cxr.shards", "cxr.latents", "cxr.lung_crop"},
}


def part(path: Path) -> str:
    """The part of cxr that a file belongs to: `train` for cxr/train.py and for cxr/train/fit.py."""
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


def test_names_are_told_apart() -> None:
    assert within("cxr.models.unet", {"cxr.models"})
    assert not within("cxr.modelsx", {"cxr.models"})
    assert "ray.train" in set(imports(REPOSITORY / "cxr" / "train" / "fit.py"))


def test_first_line_says_what_lives_there() -> None:
    first = {path: (ast.get_docstring(parsed(path)) or "").partition("\n")[0] for path in MODULES}
    assert [str(path) for path, line in first.items() if len(line) < 20 or line[-1] not in ".:"] == []


def test_no_module_grows_too_long() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_ray_stays_in_its_rooms() -> None:
    outside = [path for path in IN_CXR if part(path) not in MAY_IMPORT_RAY]
    assert [str(path) for path in outside if any(within(name, {"ray"}) for name in imports(path))] == []


def test_lower_rooms_import_nothing_above() -> None:
    upward = []
    for path in IN_CXR:
        allowed = MAY_IMPORT.get(part(path), {"cxr"}) | {f"cxr.{part(path)}"}
        ours = (name for name in imports(path) if within(name, {"cxr"}))
        upward += [f"{path.relative_to(REPOSITORY)} imports {name}" for name in ours if not within(name, allowed)]
    assert upward == []


def test_the_chain_knows_no_family() -> None:
    recipes = {path.stem for path in (REPOSITORY / "cxr" / "recipes").glob("*.py")} - {"base", "__init__"}
    families = {f"cxr.recipes.{name}" for name in recipes} | {"cxr.models"}
    chain = [path for path in IN_CXR if part(path) not in MAY_IMPORT and part(path) != "workflow"]
    assert [str(path) for path in chain if any(within(name, families) for name in imports(path))] == []


def test_nothing_imports_what_only_jobs_use() -> None:
    above = {"cxr.workflow", "jobs", "tests", "local_head", "demo"}
    assert [str(path) for path in IN_CXR if any(within(name, above) for name in imports(path))] == []
