"""The commit that result.json and checkpoints name."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import cxr
from cxr.runtime import provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that the package seems to be imported from."""
    monkeypatch.delenv("CXR_COMMIT", raising=False)
    monkeypatch.setattr(cxr, "__file__", str(tmp_path / "cxr" / "__init__.py"))
    provenance.commit.cache_clear()
    yield tmp_path
    provenance.commit.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=name", "-c", "user.email=name@localhost"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_of_the_checkout_says_whether_files_were_edited(checkout: Path) -> None:
    git(checkout, "init")
    (checkout / "file").write_text("as committed")
    git(checkout, "add", "file")
    git(checkout, "commit", "-m", "first")
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.commit() == head
    provenance.commit.cache_clear()
    (checkout / "file").write_text("edited")
    assert provenance.commit() == f"{head}+changes"


def test_commit_outside_a_checkout_comes_from_the_environment(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance.commit() == ""
    provenance.commit.cache_clear()
    monkeypatch.setenv("CXR_COMMIT", "0123abc")
    assert provenance.commit() == "0123abc"
