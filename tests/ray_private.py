"""The tests' own uses of Ray's private API, read from Ray 2.60.0; the package's are in
`cxr/runtime/ray_private.py`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


def cluster_schema() -> dict[str, Any]:
    """The JSON schema of a cluster file (autoscaler/ray-schema.json)."""
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def prepared_cluster(config: dict[str, Any]) -> dict[str, Any]:
    """A cluster file with Ray's defaults filled in (autoscaler/_private/util.py)."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(config)


def validate_cluster(config: dict[str, Any]) -> None:
    """Ray's own check of a prepared cluster file (autoscaler/_private/util.py)."""
    from ray.autoscaler._private.util import validate_config

    validate_config(config)


def aws_cluster(config: dict[str, Any]) -> dict[str, Any]:
    """A cluster file whose AWS resources have been looked up or created (autoscaler/_private/aws/config.py)."""
    from ray.autoscaler._private.aws.config import bootstrap_aws

    return bootstrap_aws(config)


def aws_machines(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Start a machine of each type and return what AWS says of it (autoscaler/_private/aws/node_provider.py)."""
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    provider, ec2 = AWSNodeProvider(config["provider"], config["cluster_name"]), boto3.client("ec2")
    machines = {}
    for name, kind in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_NAME: name, TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_CLUSTER_NAME: config["cluster_name"]}
        (started,) = provider.create_node(kind["node_config"], tags, 1)
        (reservation,) = ec2.describe_instances(InstanceIds=[started])["Reservations"]
        machines[name] = reservation["Instances"][0]
    return machines


def machines_started_for(
    config: dict[str, Any], demands: list[tuple[dict[str, float], dict[str, str]]], scarce: tuple[str, ...] = ()
) -> dict[str, int]:
    """What the autoscaler starts for tasks, given as resources and label selectors (autoscaler/v2/scheduler.py).

    Args:
        scarce: types of machines of which the cloud has recently had none.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LABEL_OPERATOR_IN  # pyright: ignore[reportAttributeAccessIssue]

    types = AutoscalingConfig(config, skip_content_hash=True)
    requests = [
        ResourceRequestUtil.make(
            resources, label_selectors=[[(key, LABEL_OPERATOR_IN, [value]) for key, value in labels.items()]]
        )
        for resources, labels in demands
    ]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types.get_node_type_configs(),
            max_num_nodes=types.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
            recoverable_resource_availabilities=dict.fromkeys(scarce, 0.0),
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def azure_machine_parameters() -> set[str]:
    """The names of the settings of a machine on Azure (autoscaler/_private/_azure)."""
    import ray.autoscaler

    folder = Path(ray.autoscaler.__file__).parent / "_private" / "_azure"
    return set(json.loads((folder / "azure-vm-template.json").read_text())["parameters"])


def write_no_address_file() -> None:
    """Keep a cluster to itself: `cluster_utils` leaves its address in a file that other programs' Ray would join."""
    from ray._private import utils

    utils.write_ray_address = lambda *_: None


def announce_loss(address: str, node_id: str, seconds: int) -> None:
    """Tell a cluster that a machine will be lost, as for a spot instance (`drain_node` in scripts/scripts.py)."""
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # pyright: ignore[reportAttributeAccessIssue]
    deadline_ms = round((time.time() + seconds) * 1000)
    client: Any = _raylet.GcsClient(address=address)  # pyright: ignore[reportAttributeAccessIssue]
    accepted, why_not = client.drain_node(node_id, reason, "the provider takes it back", deadline_ms)
    assert accepted, why_not


def dashboard_socket_names() -> list[str]:
    """Names of the dashboard's sockets in a session's folder (dashboard/subprocesses/module.py)."""
    import ray

    modules = Path(ray.__file__).parent.glob("dashboard/modules/*/*_head.py")
    return [
        "dash_" + line.split("(")[0].removeprefix("class ")
        for path in modules
        for line in path.read_text().splitlines()
        if "(SubprocessModule)" in line
    ]


def trial_values(searcher_state: dict[str, Any]) -> list[list[float]]:
    """What Optuna was given for each trial, in a state that OptunaSearch saved (tune/search/optuna)."""
    return [trial.values for trial in searcher_state["_ot_study"].trials]


def kubernetes_node_types(ray_cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What Ray's autoscaler reads from a RayCluster (autoscaler/_private/kuberay/autoscaling_config.py)."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    cluster = ray_cluster | {"metadata": ray_cluster["metadata"] | {"namespace": "default"}}
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
