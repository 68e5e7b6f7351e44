"""Following a job on a Ray cluster until it ends, also across dropped connections."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from cxr.errors import ClusterError, UserError
from cxr.runtime import console

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = (
    "http://127.0.0.1:8265"  # where `ray dashboard` and `kubectl port-forward` bring a cluster's dashboard
)
STOPPED = 143  # exit code of a job that was ended by SIGTERM
_TOKEN_FILE = Path("~/.ray/auth_token")
# What Ray's job supervisor writes at the head of each log (dashboard/modules/job/job_supervisor.py).
_SUPERVISOR = re.compile(
    r"^(?:[-\d]+ [:,\d]+\s+INFO job_manager\.py:\d+ -- .*|Running entrypoint for job .*)\n", re.M
)
_PAUSES_S = (0.5, 1, 2, 5)  # before each new attempt to connect; the last one is repeated


def connect(address: str = "") -> JobSubmissionClient:
    """A client of the cluster at `address`, else at RAY_API_SERVER_ADDRESS, else on this machine.

    If there is a token, it is presented, whether or not RAY_AUTH_MODE is set.

    Raises:
        UserError: no cluster answers there, or it rejects the token.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if "://" not in address:
        raise UserError(
            f"expected the address of a dashboard, such as {DEFAULT_ADDRESS}, got {address}: begin it "
            "with http:// or https://"
        )
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.exceptions import RayError  # only now, since Ray reads its settings when it is imported
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk"):  # which has a level of its own
        logging.getLogger(name).setLevel(logging.WARNING)  # they report each connection that ends
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(
            f"no Ray cluster answers at {address}: start one, open a tunnel to it (`ray dashboard cluster.yaml`), or "
            f"name its address with --address or RAY_API_SERVER_ADDRESS"
        ) from error
    except (RuntimeError, RayError) as error:  # RayError: the token is missing or wrong
        raise UserError(f"the Ray cluster at {address} did not accept the connection: {error}") from error


def _has_token() -> bool:
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return any(os.environ.get(name) for name in variables) or _TOKEN_FILE.expanduser().exists()


@dataclass
class Follower:
    """Writes the log of a job, each character once, although connections may drop.

    Each connection sends the log from its beginning; what has been written before is skipped.

    Attributes:
        write: gets pieces of the log, without the lines that Ray itself adds.
        patience_s: seconds without an answer from the cluster after which following ends with an error.
        seen: characters of the log that have been received.
    """

    client: JobSubmissionClient
    job: str
    write: Callable[[str], object]
    patience_s: float = 600
    seen: int = 0

    def follow(self) -> JobDetails:
        """Write the log until the job has ended, and return what the cluster says of the job then.

        Raises:
            UserError: the cluster does not know the job.
            ClusterError: the cluster has not answered for `patience_s`.
        """
        attempts, answered = 0, time.monotonic()
        while True:
            received = self.seen
            try:
                asyncio.run(self._tail())
                info = self.client.get_job_info(self.job)
                if info.status.is_terminal():
                    self._take(self.client.get_job_logs(self.job), 0)  # a followed log can end before its job does
                    return info
                attempts, answered, lost = 0, time.monotonic(), None
            except Exception as error:  # requests, aiohttp and Ray raise their own for a connection that is lost
                lost = error
            if self.seen > received:
                attempts, answered = 0, time.monotonic()
            if lost and "does not exist" in str(lost):
                raise UserError(f"the cluster does not know the job {self.job}: it may have been restarted") from lost
            if time.monotonic() - answered > self.patience_s:
                raise ClusterError(f"the cluster has not answered for {self.patience_s:g} s ({lost})") from lost
            if lost and attempts == 1:  # the second attempt in a row has failed as well
                console.note(f"the connection to the cluster is lost ({type(lost).__name__}); trying again")
            time.sleep(_PAUSES_S[min(attempts, len(_PAUSES_S) - 1)])
            attempts += 1

    async def _tail(self) -> None:
        received = 0
        async for text in self.client.tail_job_logs(self.job):
            self._take(text, received)
            received += len(text)

    def _take(self, text: str, start: int) -> None:
        """Write what is new in a piece of the log that begins at character `start`."""
        new = text[max(0, self.seen - start) :]
        if new:
            self.seen = start + len(text)
            self.write(_SUPERVISOR.sub("", new))


def exit_code(info: JobDetails) -> int:
    """The exit code of a job that has ended: that of its command, if it ran."""
    if info.status.value == "STOPPED":
        return STOPPED
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    return 0 if info.status.value == "SUCCEEDED" else 1
