"""Every use of Ray's private API in this package, each read from Ray 2.60.0 at the place that it names.

Private names change without notice. `tests/runtime/test_ray_private.py` fails where one of them is gone or means
something else, and where the installed Ray is not the version that this file was read from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import _raylet
from ray._private import ray_constants, utils, worker
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray._private.state import state
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_put

if TYPE_CHECKING:  # ray.train imports torch, which most jobs' processes do not need
    from ray.train import DataConfig
    from ray.train.torch import TorchTrainer

READ_FROM = "2.60.0"
AUTOSCALER_EVENT = ray_constants.LOG_PREFIX_EVENT_SUMMARY  # prefix of the autoscaler's messages to the user
DATA_PROGRESS_LOGGER = "ray.data._internal.progress"  # data/_internal/progress: warns that progress bars are off
KUBERNETES_HEAD = "headgroup"  # how the autoscaler calls the head (autoscaler/_private/kuberay/autoscaling_config.py)
START_LOGGER = "ray._private.services"  # _private/services.py: logs the end of a failed process's log as an error


def start_options(ip_address: str, task_oom_retries: int) -> dict[str, Any]:
    """Options of `ray.init` that are not documented (_private/worker.py).

    Args:
        ip_address: the address that this node has for itself and others; else Ray asks the network for one.
        task_oom_retries: attempts for a task that the node killed because memory ran out; Ray's default is unlimited
            (src/ray/common/ray_config_def.h).
    """
    return {"_node_ip_address": ip_address, "_system_config": {"task_oom_retries": task_oom_retries}}


def keep_signal_handlers() -> None:
    """Keep this process's own signal handlers when Ray starts.

    Ray's would end a job with other exit codes: the Python one (_private/utils.py) with 15, the C++ one
    (_private/ray_constants.py) with a stack trace and SIGABRT.
    """
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    utils.set_sigterm_handler = lambda sigterm_handler: None


def stay_on_loopback() -> None:
    """Keep Ray from replacing 127.0.0.1 by the machine's address, here and in the processes that it starts.

    `resolve_ip_for_localhost` (_private/services.py) does so on Linux, but not where Ray supports no clusters.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def allow_another_runtime_environment() -> None:
    """Let `ray.init` take a runtime environment in a submitted job that has one already (_private/worker.py)."""
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"


def kubernetes_node_types() -> dict[str, dict[str, Any]]:
    """The groups of machines of this pod's RayCluster, as in a cluster file (autoscaler/_private/kuberay).

    KubeRay sets these variables in each pod; only the head's account may read the RayCluster.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    produce = AutoscalingConfigProducer(os.environ["RAY_CLUSTER_NAME"], os.environ["RAY_CLUSTER_NAMESPACE"])
    return produce()["available_node_types"]


def report_node_types(node_types: Mapping[str, Mapping[str, Any]], head: str) -> None:
    """Tell the cluster which machines its autoscaler may start; Ray's open-source autoscalers do not.

    `state.get_cluster_config` (_private/state.py) reads it, and thereby `largest_resources` and Ray Data.
    """
    config = autoscaler_pb2.ClusterConfig()  # pyright: ignore[reportAttributeAccessIssue]
    for name, node_type in node_types.items():
        resources = {key: int(count) for key, count in node_type.get("resources", {}).items()}
        count = 1 if name == head else node_type.get("max_workers", 0)
        config.node_group_configs.add(name=name, resources=resources, max_count=count)
    _internal_kv_put(
        _raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,  # pyright: ignore[reportAttributeAccessIssue]
        config.SerializeToString(),
        namespace=_raylet.GCS_AUTOSCALER_STATE_NAMESPACE,  # pyright: ignore[reportAttributeAccessIssue]
    )


def largest_resources() -> dict[str, float]:
    """The resources of a cluster that has started all the machines that it may start (_private/state.py).

    Empty for a cluster without an autoscaler.
    """
    return {name: float(count) for name, count in (state.get_max_resources_from_cluster_config() or {}).items()}


def machine_types() -> list[dict[str, float]]:
    """The resources of each type of machine that the cluster may start, empty without an autoscaler
    (_private/state.py)."""
    config = state.get_cluster_config()
    types = config.node_group_configs if config else ()
    return [dict(kind.resources) for kind in types if kind.max_count != 0]


def dashboard_url() -> str:
    """The address of the dashboard of this process's cluster, "" without one (_private/worker.py, node.py)."""
    node = worker._global_node
    return (node.webui_url or "") if node else ""


def spilled_bytes() -> int:
    """Bytes that the cluster's object store has written to disk because memory ran out (_private/internal_api.py).

    Without an address, Ray would ask the cluster that was started last on this machine.
    """
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.spilled_bytes_total


def is_worker_process() -> bool:
    """Whether Ray started this process to run tasks and actors (_private/worker.py)."""
    return worker.global_worker.mode == worker.WORKER_MODE


def show_worker_lines_with(show: Callable[[dict[str, Any]], None]) -> None:
    """Give to `show` what Ray would print of workers' output and of errors; call it before `ray.init`.

    A batch has the `lines` of one process, its `pid` ("raylet" and "autoscaler" among them) and mostly its `ip` and
    `actor_name` or `task_name` (print_to_stdstream in _private/worker.py).
    """
    worker.print_to_stdstream = lambda data, ignore_prefix: show(data)


def quiet_failed_starts() -> None:
    """Leave the end of a failed process's log out of this process's log; the exception quotes it."""
    logging.getLogger(START_LOGGER).addFilter(lambda record: record.levelno < logging.ERROR)


def execution_options(config: DataConfig, split: str) -> Any:
    """A copy of the execution options that a data configuration has for a split (train/_internal/data_config.py)."""
    return config._resolve_execution_options(split)


def wrapped_error(error: BaseException) -> BaseException | None:
    """The exception in Ray Train's wrapper of a worker's failure (train/v2/_internal/exceptions.py)."""
    return getattr(error, "_base_exc", None)


def torch_trainer(*arguments: Any, **options: Any) -> TorchTrainer:
    """A TorchTrainer that leaves Ctrl-C to the job: Ray's own handler would end it with exit code 0.

    Read from train/v2/api/data_parallel_trainer.py.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    return Trainer(*arguments, **options)
