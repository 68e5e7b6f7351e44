"""The systemd units of docs/how-to/nightly.md."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doc_commands import check

CLUSTER = Path(__file__).parents[2] / "cluster"
NIGHTLY = CLUSTER / "nightly"
SYSTEMD = shutil.which("systemd-analyze")


def command_of_the_service() -> str:
    (command,) = re.findall(r"^ExecStart=(.+)$", (NIGHTLY / "cxr-score.service").read_text(), re.MULTILINE)
    return command


def verify(folder: Path, old: str, new: str) -> subprocess.CompletedProcess[str]:
    """Check the units with systemd after replacing a text of the service."""
    for name in ("cxr-score.service", "cxr-score.timer"):
        text = (NIGHTLY / name).read_text()
        (folder / name).write_text(text.replace(old, new) if name.endswith(".service") else text)
    assert SYSTEMD
    command = [SYSTEMD, "verify", "--man=no", "--recursive-errors=no", str(folder / "cxr-score.timer")]
    return subprocess.run([*command, str(folder / "cxr-score.service")], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(SYSTEMD is None, reason="no systemd-analyze on this machine: apt-get install systemd")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    program = command_of_the_service().split()[0]
    good = verify(tmp_path, program, sys.executable)
    assert (good.returncode, good.stderr) == (0, "")
    assert "KilMode" in verify(tmp_path, "KillMode", "KilMode").stderr
    assert "is not executable" in verify(tmp_path, "", "").stderr  # its program is not on this machine


@pytest.mark.skipif(SYSTEMD is None, reason="no systemd-analyze on this machine: apt-get install systemd")
def test_the_timer_elapses_every_evening() -> None:
    (moment,) = re.findall(r"^OnCalendar=(.+)$", (NIGHTLY / "cxr-score.timer").read_text(), re.MULTILINE)
    assert SYSTEMD
    shown = subprocess.run(
        [SYSTEMD, "calendar", "--iterations=2", moment], capture_output=True, text=True, check=True
    )
    assert shown.stdout.count(" 20:00:00") >= 2


def test_cxr_accepts_the_command(tmp_path: Path) -> None:
    program, *arguments = shlex.split(command_of_the_service())
    assert Path(program).name == "cxr"
    check(shlex.join(["cxr", *arguments]), tmp_path)
