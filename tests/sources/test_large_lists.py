"""Memory that the manifests of large archives take, from synthetic lists."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.sources.large_lists import MAKERS

ROWS = 300_000
MOST_GIB = {"folder": 0.4, "chestxray14": 0.8, "siim": 0.7, "vinbigdata": 1.5, "csv_list": 0.7, "parquet_list": 0.7}
"""Peak memory of the process, of which its imports take 0.2 GiB."""


@pytest.mark.slow
@pytest.mark.parametrize("source", MAKERS)
def test_manifests_of_large_archives_fit_in_memory(source: str) -> None:
    command = [sys.executable, "-m", "tests.sources.large_lists", source, str(ROWS)]
    result = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    print(source, result)
    assert result["rows"] == ROWS
    assert result["peak_gib"] < MOST_GIB.get(source, 1.0)
