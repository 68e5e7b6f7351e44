"""Joining a Ray cluster, or starting a private one on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

import ray
from ray._private import ray_constants, ray_logging
from ray._private.state import state

from cxr.errors import UserError
from cxr.socket_paths import shorten_temporary_folders
from cxr.storage import ANONYMOUS, REQUESTER_PAYS, is_local

LOOPBACK = "127.0.0.1"
STARTS = 3  # of a cluster on this machine, before it is given up
SLOW = "timed out during startup"  # what Ray says after 30 s, a limit that cannot be set
PROGRESS = re.compile(r" \d+/\d+  loss ")
NOISE = re.compile(
    "constructor arguments in the object store|worker processes have been started|Setting up process group|"
    "Checkpoint successfully created|Reporting training result|Requesting resources|Attempting to start|"
    "Detected that the Ray Train controller actor"
)


def connect(cpus: int | None = None) -> None:
    """Join the cluster this job was submitted to (RAY_ADDRESS), else start one on this machine.

    A cluster started here listens on loopback only, asks for a token, sends no usage statistics, and ends
    with this process. Its dashboard is on: without one, Tune cannot free the workers of stopped trials.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _filter_worker_logs()
    if os.environ.get("RAY_ADDRESS"):
        _join(os.environ["RAY_ADDRESS"])
        return
    _stay_on_loopback()
    shorten_temporary_folders(before_removal=ray.shutdown)
    for left in reversed(range(STARTS)):
        try:
            return _start(cpus)
        except Exception as error:  # Ray has no narrower one for this
            if not left or SLOW not in str(error):
                raise
            print("note: this machine is too busy for Ray to start within 30 s; trying again", flush=True)
            ray.shutdown()


def _start(cpus: int | None) -> None:
    port = _free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{LOOPBACK}:{port}"  # else found by a look at all processes
    ray.init(
        address="local",  # else Ray would join whatever it finds on this machine, or wait for one that has ended
        num_cpus=cpus,
        include_dashboard=True,
        dashboard_host=LOOPBACK,
        dashboard_port=port,
        _node_ip_address=LOOPBACK,
        logging_level=logging.WARNING,
    )


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "://" not in address:  # Ray itself would wait for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address="auto", runtime_env=_carried())
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start it, correct the address, or unset "
            f"RAY_ADDRESS to run on this machine alone"
        ) from error


def _carried() -> dict[str, Any]:
    """What this job's options say of buckets, for workers, whose environment is that of their machines."""
    carried = {name: os.environ[name] for name in (ANONYMOUS, REQUESTER_PAYS) if name in os.environ}
    if carried:  # they may come from the runtime environment the job was submitted with: Ray must not mind
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    return {"env_vars": carried} if carried else {}


def _filter_worker_logs() -> None:
    """Show every progress line, which Ray would merge as like ones, and leave out what no reader can act on."""
    for lines in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        lines.allow_re, lines.skip_re = PROGRESS, NOISE


def _stay_on_loopback() -> None:
    """Keep Ray from swapping 127.0.0.1 for the machine's address, as it does on Linux, here and in its processes."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return one.getsockname()[1]


def total(resource: str) -> float:
    """How much of "CPU" or "GPU" the cluster has, busy or not, machines counted that it may still start."""
    largest = state.get_max_resources_from_cluster_config() or {}
    return float(max(ray.cluster_resources().get(resource, 0), largest.get(resource, 0)))


def check_shared(uri: str) -> None:
    """Raise UserError where `uri` is a local path but the cluster has, or may start, several machines."""
    hosts = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    grows = total("CPU") > ray.cluster_resources().get("CPU", 0)
    if is_local(uri) and (len(hosts) > 1 or grows) and not os.environ.get("CXR_SHARED_FILESYSTEM"):
        raise UserError(
            f"{uri} is a local path, but this cluster has, or may start, several machines: give an s3:// or "
            f"gs:// URI, or set CXR_SHARED_FILESYSTEM=1 if that path is the same shared folder on all of them"
        )
