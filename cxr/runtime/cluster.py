"""Joining a Ray cluster, or starting a private one on this machine."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from cxr.errors import ClusterError, UserError
from cxr.runtime import console, ray_private
from cxr.runtime.socket_paths import shorten_temporary_folders
from cxr.storage import ANONYMOUS, REQUESTER_PAYS, is_local

LOOPBACK = "127.0.0.1"
HIDES_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"  # else work that reserves no GPU sees all GPUs of its machine
PASSED_ON = (  # variables for workers, whose environment is that of their machines
    HIDES_GPUS,
    ANONYMOUS,
    REQUESTER_PAYS,
    "CXR_STORAGE_PATIENCE_S",
    "CXR_DECODE_SECONDS",
    "CXR_DECODE_MEMORY_GIB",
    "CXR_STALL_WARNING_S",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
)
POOL = "cxr-pool"  # label of machines in the files of cluster/, with one of the values head, data and train
RAY_UP_CONFIG = Path("~/ray_bootstrap_config.yaml")  # the cluster file, where `ray up` puts it on the head
KUBERNETES_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")  # of pods that may ask Kubernetes
OOM_RETRIES = 5  # attempts for a task that the node killed because memory ran out; Ray itself sets no limit
STARTS = 3  # attempts to start a cluster on this machine


def connect(cpus: int | None = None) -> None:
    """Join the cluster this job was submitted to (RAY_ADDRESS), else start one on this machine.

    A cluster started here listens on loopback only, asks for a token, sends no usage statistics, and ends
    with this process. Its dashboard is on: without one, Tune cannot free the workers of stopped trials.

    From then on workers show what they `say` (`console`); their other lines go to the job's log, or, without a job,
    only to Ray's own folder of logs.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ[HIDES_GPUS] = "1"
    ray_private.keep_signal_handlers()
    ray_private.show_worker_lines_with(_show_worker_lines)
    console.current().divert_ray()
    if os.environ.get("RAY_ADDRESS"):
        _join(os.environ["RAY_ADDRESS"])
    else:
        ray_private.stay_on_loopback()
        shorten_temporary_folders(before_removal=ray.shutdown)
        _start_here(cpus)


def _show_worker_lines(batch: dict[str, Any]) -> None:
    """Show our events, and machines that are added or removed; drop the autoscaler's periodic status."""
    if batch.get("pid") != "autoscaler":
        console.show_worker_lines(batch)
        return
    for line in batch["lines"]:
        _, mark, text = line.partition(ray_private.AUTOSCALER_EVENT)
        if mark:
            console.note(text)


def _start_here(cpus: int | None) -> None:
    """Start a cluster. On a busy machine Ray's processes may exceed its timeouts of 30 or 60 s, or another takes a
    port.

    Raises:
        ClusterError: it failed several times.
    """
    ray_private.quiet_failed_starts()
    reason = ""
    for number in range(1, STARTS + 1):
        running = set(psutil.Process().children(recursive=True))
        try:
            return _start(cpus)
        except Exception as error:  # Ray raises no narrower type here
            ray.shutdown()
            _kill(set(psutil.Process().children(recursive=True)) - running)
            reason = _last_line(error)
        if number < STARTS:
            console.note(f"Ray did not start on this machine ({reason}); trying again")
    raise ClusterError(
        f"Ray did not start on this machine in {STARTS} attempts, the last time for this reason: {reason}. The "
        f"machine may be overloaded, or out of memory, processes or disk space: free some and run the same command "
        f"again, or set RAY_ADDRESS to join a cluster"
    )


def _kill(processes: set[psutil.Process]) -> None:
    """Kill the processes that a failed start left running."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _last_line(error: Exception) -> str:
    """The reason in Ray's message about a failed start, which ends with the last line of the failed process's log."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


def _start(cpus: int | None) -> None:
    port = free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{LOOPBACK}:{port}"  # else Ray searches all processes for it
    ray.init(
        address="local",  # else Ray joins any cluster of this machine, or waits for one that has ended
        num_cpus=cpus,
        include_dashboard=True,
        dashboard_host=LOOPBACK,
        dashboard_port=port,
        **ray_private.start_options(LOOPBACK, OOM_RETRIES),
    )


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "://" not in address:  # Ray itself waits for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address="auto", runtime_env=_runtime_environment())
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start it, correct the address, or unset "
            f"RAY_ADDRESS to run on this machine alone"
        ) from error
    _report_node_types()


def _report_node_types() -> None:
    """Tell the cluster which machines its autoscaler may start, if this process is on the head and can know it.

    Otherwise jobs would take a cluster whose pools are still empty for one without GPUs.
    """
    file = RAY_UP_CONFIG.expanduser()
    if file.exists():
        config = yaml.safe_load(file.read_text())
        ray_private.report_node_types(config.get("available_node_types", {}), config.get("head_node_type", ""))
    elif "RAY_CLUSTER_NAME" in os.environ and KUBERNETES_TOKEN.exists():
        try:
            ray_private.report_node_types(ray_private.kubernetes_node_types(), ray_private.KUBERNETES_HEAD)
        except OSError as error:  # of which the errors of requests are a kind
            console.note(f"cannot read from Kubernetes which machines this cluster may start ({error})")


def _runtime_environment() -> dict[str, Any]:
    """The runtime environment that passes this job's variables to workers on other machines."""
    ray_private.allow_another_runtime_environment()  # the job may have been submitted with one that holds them too
    return {"env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def total(resource: str) -> float:
    """The cluster's CPUs or GPUs (`resource`), busy or free, including machines that it may still start."""
    return max(ray.cluster_resources().get(resource, 0.0), ray_private.largest_resources().get(resource, 0.0))


def data_machines() -> dict[str, str]:
    """A label selector that keeps tasks without a GPU off machines that have one.

    Empty for clusters whose machines are not labeled with their pool: there, Ray only prefers machines without GPUs.
    """
    labeled = any(POOL in node["Labels"] for node in ray.nodes() if node["Alive"])
    return {POOL: "data"} if labeled else {}


def has_machine_for(needed: Mapping[str, float]) -> bool:
    """Whether a machine of the cluster, or one that it may start, has these resources, busy or free."""
    return any(all(machine.get(name, 0.0) >= count for name, count in needed.items()) for machine in _machines())


def smallest(resource: str) -> float:
    """The CPUs or GPUs (`resource`), busy or free, of the machine that has the fewest, of all that have any; infinite
    while there is none."""
    return min((machine[resource] for machine in _machines() if machine.get(resource)), default=math.inf)


def _machines() -> list[dict[str, float]]:
    """The resources of each machine of the cluster, and of each type of machine that it may start."""
    return [*(node["Resources"] for node in ray.nodes() if node["Alive"]), *ray_private.machine_types()]


def free() -> str:
    """A sentence about the free resources of the cluster, such as "0 of 2 CPUs are free"."""
    available, whole = ray.available_resources(), ray.cluster_resources()
    shown = [f"{available.get(name, 0):g} of {whole[name]:g} {name}s" for name in ("CPU", "GPU") if whole.get(name)]
    return f"{' and '.join(shown) or '0 CPUs'} are free"


def check_shared(uri: str) -> None:
    """Raise UserError if `uri` is a local path but the cluster has, or may start, several machines."""
    hosts = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    grows = total("CPU") > ray.cluster_resources().get("CPU", 0)
    if is_local(uri) and (len(hosts) > 1 or grows) and not os.environ.get("CXR_SHARED_FILESYSTEM"):
        raise UserError(
            f"{uri} is a local path, but this cluster has, or may start, several machines: use an s3:// or "
            f"gs:// URI, or set CXR_SHARED_FILESYSTEM=1 if all of them share that folder"
        )
