"""A long TMPDIR, as batch systems give it, is replaced by a short link to the same folder."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cxr.errors import UserError
from cxr.runtime import socket_paths
from tests.ray_private import dashboard_socket_names

Call = tuple[Callable[..., Any], tuple[Any, ...]]


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The functions registered for the end of the process, in the order of their calls."""
    calls: list[Call] = []
    register = SimpleNamespace(register=lambda call, *values, **_: calls.insert(0, (call, values)))
    monkeypatch.setattr(socket_paths, "atexit", register)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    return calls


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("length", [60, 100, 300])
def test_sockets_below_a_long_temporary_folder_can_be_bound(
    variable: str, length: int, at_exit: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 50) / ("y" * (length % 200))
    monkeypatch.setenv(variable, str(folder))
    socket_paths.shorten_temporary_folders(list)
    short = os.environ[variable]
    assert Path(short).resolve() == folder
    place = Path(short, socket_paths.LONGEST)
    assert len(str(place)) <= socket_paths.MOST_BYTES
    place.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(place))
    for call, values in at_exit:  # stops Ray, then removes the link; the contents of the folder remain
        call(*values)
    assert [call for call, _ in at_exit] == [list, shutil.rmtree]
    assert not Path(short).parent.exists()
    assert (folder / socket_paths.LONGEST).exists()


def test_short_folders_are_unchanged(at_exit: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    fits = "/" + "x" * (socket_paths.FOLDER_BYTES - 1)
    monkeypatch.setenv("TMPDIR", fits)
    monkeypatch.delenv("RAY_TMPDIR")
    socket_paths.shorten_temporary_folders(list)
    assert (os.environ["TMPDIR"], "RAY_TMPDIR" in os.environ, at_exit) == (fits, False, [])


def test_without_room_for_a_link_the_error_says_what_to_do(
    at_exit: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 60)))
    monkeypatch.setattr(socket_paths, "SHORT_FOLDERS", (str(tmp_path / "missing"),))
    with pytest.raises(UserError, match=r"set TMPDIR to a folder whose path has at most 32 characters"):
        socket_paths.shorten_temporary_folders(list)


def test_the_limit_is_that_of_the_installed_ray() -> None:
    """The names of Ray's sockets may change with its version."""
    names = dashboard_socket_names()
    assert len(names) > 3
    assert max(map(len, names)) == len(Path(socket_paths.LONGEST).name)
