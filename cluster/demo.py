"""The whole pipeline on one machine, for `make demo`; each command is printed and can be copied.

Starts a private Ray head, generates synthetic X-rays, and submits one job that searches for the best aligner, scores
the X-rays with it and writes an HTML page. At the end, it stops everything, also after a failure or Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from local_head import local_head

from cxr.runtime.submission import Follower, connect

PAGE = "report.html"
REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for the best aligner of chest X-rays, on synthetic images.")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "runs" / "demo", help="Output folder; emptied first."
    )
    parser.add_argument("--images", type=int, default=100, help="Number of synthetic X-rays.")
    parser.add_argument("--trials", type=int, default=4, help="Number of trials of the search.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.chdir(REPOSITORY)
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    archive = out / "archive"
    phantoms = [
        "python",
        "jobs/make_phantom.py",
        "--out",
        archive,
        "--count",
        options.images,
        "--size",
        256,
        "--quiet",
    ]
    job = ["python", "cluster/demo_job.py", "--archive", archive, "--out", out, "--trials", options.trials]
    print("$ python cluster/local_head.py", flush=True)
    with started(phantoms) as made, local_head(out / "head.log") as variables:  # both take seconds, on a core each
        if made.wait():
            raise subprocess.CalledProcessError(made.returncode, "jobs/make_phantom.py")
        os.environ.update(variables)
        status = submit(job)
        print("\nStopping the Ray head.", flush=True)
    if status == "SUCCEEDED":
        print(f"\nOpen this page in a browser: {out / PAGE}")
    return 0 if status == "SUCCEEDED" else 1


@contextlib.contextmanager
def started(command: Sequence[object]) -> Iterator[subprocess.Popen[bytes]]:
    """Print a command and run it beside the block, which should wait for it."""
    words = [str(word) for word in command]
    print(f"$ {shlex.join(words)}", flush=True)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


def shell(*command: object, quiet: bool = False) -> None:
    """Print a command and run it; with `quiet`, its output is shown only if it fails. Raises CalledProcessError."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    done = subprocess.run(words, capture_output=quiet, text=True)
    if done.returncode and quiet:
        print(done.stdout, done.stderr)
    done.check_returncode()


def submit(job: Sequence[object]) -> str:
    """Submit the job, print its log until it has ended, and return the status it ended with."""
    name = f"demo-{secrets.token_hex(4)}"
    options = ["--submission-id", name, "--working-dir", ".", "--no-wait"]
    shell("ray", "job", "submit", *options, "--", *job, quiet=True)
    return Follower(connect(), name, partial(print, end="", flush=True)).follow().status.value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (subprocess.CalledProcessError, RuntimeError) as failure:
        sys.exit(f"error: {failure}")
