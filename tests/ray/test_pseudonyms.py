"""`cxr score --pseudonymize` as a user runs it: no output, log, picture name or message names a patient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cxr import storage
from cxr.families.localize import LocalizeRecipe
from cxr.runtime import audit
from tests import planted
from tests.conftest import REPOSITORY
from tests.saved_checkpoint import save_untrained

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Invalid value for VR CS"),
]
SECRET = "a secret of at least sixteen bytes"


def cxr(*words: str, code: int = 0) -> str:
    """What the command prints, errors included."""
    program = [sys.executable, "-c", "from cxr.cli.main import main; main()", *words]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_no_output_of_a_command_names_a_patient(tmp_path: Path) -> None:
    archive, out, key = tmp_path / "archive", tmp_path / "out", tmp_path / "secret" / "key.txt"
    count = planted.write_archive(archive)
    storage.write_bytes(str(key), SECRET.encode())
    model = save_untrained(tmp_path / "model", LocalizeRecipe(size=64, backbone="resnet18"))
    scoring = ["score", "--archive", str(archive), "--source", "dicom", "--checkpoint", model, "--out", str(out)]
    scoring += ["--pseudonymize", str(key), "--save-images", "--export", "csv", "--export", "coco"]
    shown = cxr(*scoring, "--max-rejects", "0.2", code=2)  # too many are broken
    assert "could not be read, more than --max-rejects" in shown
    shown += cxr(*scoring, "--max-rejects", "0.9")  # finds everything scored
    for per in ("study", "patient"):
        shown += cxr("export", "csv", "--run", str(out), "--per", per, "--out", str(tmp_path / "export"))
    shown += cxr("report", "--run", str(out), "--out", str(tmp_path / "report"))
    exports = {path.name for path in [*(out / "exports").iterdir(), *(tmp_path / "export").iterdir()]}
    assert {"scores.csv", "coco.json", "studies.csv", "patients.csv"} <= exports
    assert (out / "ray.log").exists()
    assert len([*out.rglob("*.png")]) >= 5
    assert planted.leaks(out, tmp_path / "export", tmp_path / "report", text=shown) == []
    assert not [path for path in out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]

    failed, done = [entry for entry in audit.read(str(out)) if entry["event"] == "end"]
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert (failed["images"], failed["rejects"]) == (count, count - 5)
    assert sum(failed["reasons"].values()) == count - 5
    assert set(failed["files"]) == {str(path.relative_to(out)) for path in (out / "scores").glob("*.parquet")}
    assert done["files"] == {}
    start = audit.read(str(out))[0]
    assert start["members"][0]["sha256"] == json.loads(Path(model, "checkpoint.json").read_text())["sha256"]
    assert str(key) not in str(start["options"])
