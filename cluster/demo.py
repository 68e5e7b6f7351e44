"""The whole chain on one machine, as `make demo` runs it; each command is printed, to be copied.

A private Ray head, an archive of made-up X-rays, a search that is submitted as a job and followed to its end,
its ranked trials. What was started is stopped, also on failure and Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from local_head import local_head

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for the best chest alignment on made-up X-rays.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "demo", help="emptied first")
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--trials", type=int, default=6)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.chdir(REPOSITORY)
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    archive, run = out / "archive", out / "run"
    shell("python", "jobs/make_phantom.py", "--out", archive, "--count", options.images, "--size", 256)
    job = ["python", "jobs/tune_align.py", "--archive", archive, "--out", run, "--trials", options.trials]
    job += ["--lung-phantoms", 300, "--lung-steps", 150]
    print("\n$ python cluster/local_head.py", flush=True)
    with local_head(out / "head.log") as variables:
        os.environ.update(variables)
        status = submit(job)
    print("\nThe Ray head is stopped.")
    if status == "SUCCEEDED":
        show(run / "result.json")
    return 0 if status == "SUCCEEDED" else 1


def shell(*command: object, quiet: bool = False) -> None:
    """Print a command and run it; `quiet` shows its output only where it fails. Raises CalledProcessError."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    done = subprocess.run(words, capture_output=quiet, text=True)
    if done.returncode and quiet:
        print(done.stdout, done.stderr)
    done.check_returncode()


def submit(job: Sequence[object]) -> str:
    """Submit the job, print its log until it has ended, give back the status it ended with."""
    from ray.job_submission import JobSubmissionClient  # now, since Ray reads its settings when imported

    name = f"demo-{secrets.token_hex(4)}"
    options = ["--submission-id", name, "--working-dir", ".", "--no-wait"]
    shell("ray", "job", "submit", *options, "--", *job, quiet=True)
    client, printed = JobSubmissionClient(), 0
    while True:
        info = client.get_job_info(name)  # polled: a followed log can end before its job does
        log = client.get_job_logs(name)
        print(log[printed:], end="", flush=True)
        printed = len(log)
        if info.status.is_terminal():
            print(f"\nThe job has ended: {info.status}", flush=True)
            return info.status.value
        time.sleep(2)


def show(result_json: Path) -> None:
    """Print what the search found, as its result.json says."""
    result = json.loads(result_json.read_text())
    print(f"\nTrials, best first ({result['trials']}):\n\n{Path(result['trials']).read_text()}")
    print(f"Best checkpoint  {result['checkpoint']}")
    for picture in result["pictures"]:
        print(f"Picture          {picture}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (subprocess.CalledProcessError, RuntimeError) as failure:
        sys.exit(f"error: {failure}")
