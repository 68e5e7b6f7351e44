"""Jobs that tests disturb: how they are started, watched while they write results, and compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema
from cxr.families import checkpoint
from cxr.training.run_log import read_metrics
from tests.conftest import REPOSITORY


def alone() -> dict[str, str]:
    """The environment of a job that starts its own Ray."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def command(job: str, **options: object) -> list[str]:
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, f"jobs/{job}.py", *given, *["--no-lungs"] * job.endswith("_align")]


def run(job: list[str], code: int = 0, variables: Mapping[str, str] | None = None) -> str:
    """What a job says that exits with `code`."""
    environment = variables or alone()
    done = subprocess.run(job, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stderr


@dataclass
class Job:
    """A job at work.

    Args:
        results: counts the results that it has written.
    """

    command: list[str]
    variables: Mapping[str, str]
    log: Path
    results: Callable[[], int]

    def __enter__(self) -> Job:
        self._file: IO[bytes] = self.log.open("wb")
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            self.command, cwd=REPOSITORY, stdout=self._file, stderr=self._file, env=self.variables
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._file.close()

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.begun

    def wait_for(self, results: int) -> float:
        """Wait until there are so many results; the seconds since the job's start."""
        while self.results() < results:
            assert self.process.poll() is None, self.said[-3000:]
            time.sleep(0.02)
        return self.seconds

    def finish(self) -> float:
        """Wait until it succeeds; the seconds that it took."""
        self.longest_pause()
        return self.seconds

    def kill(self) -> None:
        """Kill the job's own process, and wait until its workers, which end a moment after it, have done so."""
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, self.said[-3000:]
        time.sleep(5)

    def longest_pause(self, code: int = 0) -> float:
        """Wait until it exits with `code`; the longest time from now until then without a new result, seconds."""
        longest, last, count = 0.0, time.monotonic(), self.results()
        while self.process.poll() is None:
            time.sleep(0.05)
            if (now := self.results()) != count:
                count, last = now, time.monotonic()
            longest = max(longest, time.monotonic() - last)
        assert self.process.returncode == code, self.said[-3000:]
        return longest


def rows(out: Path, pattern: str) -> pa.Table:
    files = sorted(out.glob(pattern))
    return pa.concat_tables([pq.read_table(file) for file in files]).sort_by(schema.IMAGE_ID)


def same_weights(first: Path, second: Path) -> bool:
    """Whether the checkpoints of two runs agree within rounding."""
    one, other = (checkpoint.load(str(out / "checkpoint")).network.state_dict() for out in (first, second))
    return max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4


def epochs(out: Path) -> list[int]:
    return [row["epoch"] for row in read_metrics(str(out))]
