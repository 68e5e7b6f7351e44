"""The files for kubectl: fields that Kubernetes and KubeRay know, the pools of cluster.yaml, and few rights.

With CXR_KUBERAY_CRDS, a folder with ray.io_rayclusters.yaml and ray.io_rayjobs.yaml of a version of KubeRay
(ray-operator/config/crd/bases in its repository), the files are also checked against these.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from cxr.runtime.cluster import POOL
from tests.cluster.kubernetes_schemas import BY_KIND
from tests.doc_commands import check
from tests.ray_private import kubernetes_node_types

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "cluster" / "kubernetes"
PART = {"app.kubernetes.io/part-of": "cxr"}
CRDS = os.environ.get("CXR_KUBERAY_CRDS", "")


def objects(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def kind(name: str) -> dict[str, Any]:
    """The only object of this kind in all files."""
    (found,) = [each for file in FOLDER.glob("*.yaml") for each in objects(file) if each["kind"] == name]
    return found


def ray_clusters() -> dict[str, dict[str, Any]]:
    return {"RayCluster": kind("RayCluster")["spec"], "RayJob": kind("RayJob")["spec"]["rayClusterSpec"]}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod templates of all files, with a name."""
    for name, cluster in ray_clusters().items():
        yield f"{name} head", cluster["headGroupSpec"]["template"]
        yield from ((f"{name} {group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"])
    yield "RayJob submitter", kind("RayJob")["spec"]["submitterPodTemplate"]
    yield "CronJob", kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_kubernetes_knows_all_fields(file: Path) -> None:
    for each in objects(file):
        schema = BY_KIND[each["kind"]]
        jsonschema.validate(each, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(each | {"sepc": {}}, schema)


@pytest.mark.skipif(not CRDS, reason="CXR_KUBERAY_CRDS does not name a folder of KubeRay's CRDs")
@pytest.mark.parametrize("name", ["RayCluster", "RayJob"])
def test_kuberay_knows_all_fields(name: str) -> None:
    crd = yaml.safe_load((Path(CRDS) / f"ray.io_{name.lower()}s.yaml").read_text())
    (version,) = [each for each in crd["spec"]["versions"] if each["name"] == "v1"]
    jsonschema.validate(kind(name), _closed(version["schema"]["openAPIV3Schema"]))


def _closed(schema: Any) -> Any:
    """The schema with every object restricted to the properties that it names."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(each) for name, each in schema.items()}
    if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.parametrize("name", ["RayCluster", "RayJob"])
def test_clusters_ask_for_the_token_and_have_the_pools_of_the_cloud(name: str) -> None:
    cluster = ray_clusters()[name]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["labels"] == {POOL: "head"}
    cloud = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())["available_node_types"]
    assert {group["groupName"] for group in cluster["workerGroupSpecs"]} == {"data", "train"}
    for group in cluster["workerGroupSpecs"]:
        assert group["labels"] == {POOL: group["groupName"]}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0))}
        assert resources == cloud[group["groupName"]]["resources"]


def test_ray_reads_the_pools_of_the_cluster() -> None:
    types = kubernetes_node_types(kind("RayCluster"))
    cloud = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())["available_node_types"]
    for name in ("data", "train"):
        assert types[name]["max_workers"] == cloud[name]["max_workers"] + cloud[f"{name}-spot"]["max_workers"]
        assert types[name]["labels"] == {POOL: name}
    assert (types["train"]["resources"]["GPU"], types["data"]["resources"]["CPU"]) == (1, 16)


def test_a_job_takes_its_cluster_with_it_and_waits_in_a_queue() -> None:
    job = kind("RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "cxr"}
    # Kueue admits a job as a whole: https://kueue.sigs.k8s.io/docs/tasks/run/rayjobs/
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    assert all(group["minReplicas"] == group["maxReplicas"] for group in ray_clusters()["RayJob"]["workerGroupSpecs"])


@pytest.mark.parametrize(("name", "pod"), [*pods()], ids=lambda value: value if isinstance(value, str) else "")
def test_pods_have_no_privileges_and_may_be_reached_by_each_other_alone(name: str, pod: dict[str, Any]) -> None:
    assert pod["metadata"]["labels"] == PART
    account = pod["spec"].get("serviceAccountName")
    assert account == (None if name == "RayCluster head" else "cxr-worker")  # its autoscaler talks to Kubernetes
    policy = kind("NetworkPolicy")["spec"]
    assert policy["podSelector"] == {"matchLabels": PART}
    anywhere = [rule for rule in policy["ingress"] if "ports" not in rule]
    assert [rule["from"] for rule in anywhere] == [[{"podSelector": {"matchLabels": PART}}]]
    assert kind("ServiceAccount")["automountServiceAccountToken"] is False


def test_kubernetes_does_not_run_the_command_of_the_image_before_ray() -> None:
    """KubeRay replaces the entrypoint, but runs a `command` or `args` of the pod before it starts Ray."""
    for name, pod in pods():
        (container,) = pod["spec"]["containers"]
        assert name == "CronJob" or not {"command", "args"} & set(container)


def test_cxr_accepts_the_commands(tmp_path: Path) -> None:
    check(kind("RayJob")["spec"]["entrypoint"], tmp_path)
    (container,) = kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    words = container["args"]
    check(shlex.join(["cxr", *words]), tmp_path)
    check(shlex.join(["cxr", *words[words.index("--") + 1 :]]), tmp_path)


def test_the_cronjob_submits_to_the_cluster_with_its_token() -> None:
    cluster = kind("RayCluster")["metadata"]["name"]
    (container,) = kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["args"][:4] == ["submit", "--address", f"http://{cluster}-head-svc:8265", "--"]
    (variable,) = container["env"]
    assert variable["name"] == "RAY_AUTH_TOKEN"
    assert variable["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}
