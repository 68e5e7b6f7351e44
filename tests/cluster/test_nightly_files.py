"""The files of docs/how-to/nightly.md: units that systemd accepts, and a CronJob whose fields Kubernetes knows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

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


def test_cxr_accepts_the_commands(tmp_path: Path) -> None:
    program, *arguments = shlex.split(command_of_the_service())
    assert Path(program).name == "cxr"
    check(shlex.join(["cxr", *arguments]), tmp_path)
    (container,) = cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    check(shlex.join(container["args"]), tmp_path)


# ---- CronJob


def cronjob() -> dict[str, Any]:
    return yaml.safe_load((NIGHTLY / "cronjob.yaml").read_text())


def _object(required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object without other fields than these."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_TEXTS = {"type": "array", "items": _TEXT}
_VARIABLE = _object(
    "name", name=_TEXT, value=_TEXT, valueFrom=_object("", secretKeyRef=_object("name key", name=_TEXT, key=_TEXT))
)
_CONTAINER = _object(
    "name image",
    **dict.fromkeys(("name", "image"), _TEXT),
    **dict.fromkeys(("command", "args"), _TEXTS),
    env={"type": "array", "items": _VARIABLE},
    resources=_object("", limits={"type": "object"}, requests={"type": "object"}),
)
_POD = _object(
    "restartPolicy containers",
    restartPolicy={"enum": ["Never", "OnFailure"]},
    containers={"type": "array", "items": _CONTAINER},
)
_JOB = _object("template", template=_object("spec", spec=_POD), backoffLimit=_COUNT)
CRON_JOB = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "batch/v1"},
    kind={"const": "CronJob"},
    metadata=_object("name", name=_TEXT),
    spec=_object(
        "schedule jobTemplate",
        schedule={"type": "string", "pattern": r"^[\d*/,-]+( [\d*/,-]+){4}$"},
        timeZone=_TEXT,
        concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
        startingDeadlineSeconds=_COUNT,
        successfulJobsHistoryLimit=_COUNT,
        failedJobsHistoryLimit=_COUNT,
        jobTemplate=_object("spec", spec=_JOB),
    ),
)
"""The fields of batch/v1 CronJob (Kubernetes 1.27 or newer, for `timeZone`) that the file uses."""


def test_the_cronjob_has_only_fields_that_kubernetes_knows() -> None:
    jsonschema.validate(cronjob(), CRON_JOB)
    misspelled = cronjob()
    misspelled["spec"]["timezone"] = misspelled["spec"].pop("timeZone")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misspelled, CRON_JOB)


def test_the_cronjob_submits_to_the_cluster_of_kuberay_with_its_token() -> None:
    from ray.dashboard.modules.job.cli import submit

    cluster = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())["metadata"]["name"]
    (container,) = cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    ray, job, submits, *arguments = container["command"]
    assert [ray, job, submits] == ["ray", "job", "submit"]
    parsed = submit.make_context("submit", [*arguments, *container["args"]])
    assert parsed.params["address"] == f"http://{cluster}-head-svc:8265"
    assert list(parsed.params["entrypoint"]) == container["args"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}
