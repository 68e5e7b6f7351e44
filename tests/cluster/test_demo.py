"""`make demo`, made smaller: one job on one private cluster, and one page to open at the end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def test_the_demo_ends_with_one_page_and_hides_rays_output(tmp_path: Path) -> None:
    command = [sys.executable, "cluster/demo.py", "--out", str(tmp_path / "demo"), "--images", "40", "--trials", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    page = tmp_path / "demo" / "report.html"
    assert done.stdout.splitlines()[-1] == f"Open this page in a browser: {page}"
    assert len(re.findall(r"^\| rank ", done.stdout, re.MULTILINE)) == 1
    for text in ("core_worker", "raylet", "pid=", "Traceback", "╭"):
        assert text not in done.stdout + done.stderr
    text = page.read_text()
    assert text.count('src="data:image/') == 2
    assert ">Ranked trials</h2>" in text
    assert "scored all 40 images" in text
    rows = re.findall(r"<th[^>]*>([^<]+)</th>\s*<td[^>]*>([\d.]+)</td>\s*<td[^>]*>([\d.]+)</td>\s*</tr>", text)
    values = {name: (float(before), float(after)) for name, before, after in rows}
    assert values["mask iou"][1] > values["mask iou"][0]
