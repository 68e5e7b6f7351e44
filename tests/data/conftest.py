"""Fixtures of tests that ingest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cxr.data import ingest
from cxr.data.manifest_files import StoredPart
from cxr.runtime import cluster


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingest in this process."""

    def serial(parts: Sequence[StoredPart], make: Any, args: Sequence[Any] = ()) -> list[dict[str, Any]]:
        work = make(*args)
        return [work(part.read()) for part in parts]

    monkeypatch.setattr(ingest, "map_parts", serial)
    monkeypatch.setattr(cluster, "check_shared", lambda uri: None)
