"""JSON schemas of the Kubernetes objects in cluster/kubernetes, with the fields that these files use and no others.

The fields are those of Kubernetes 1.27 and of KubeRay 1.6 and 1.7. A misspelled field, which Kubernetes would drop
with a warning at most, fails here.
"""

from __future__ import annotations

from typing import Any


def _object(required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object without other fields than these."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS, QUANTITIES = {"type": "object", "additionalProperties": TEXT}, {"type": "object", "additionalProperties": TEXT}
VARIABLE = _object(
    "name", name=TEXT, value=TEXT, valueFrom=_object("", secretKeyRef=_object("name key", name=TEXT, key=TEXT))
)
CONTAINER = _object(
    "name image resources securityContext",
    name=TEXT,
    image=TEXT,
    command=_list(TEXT),
    args=_list(TEXT),
    env=_list(VARIABLE),
    envFrom=_list(_object("secretRef", secretRef=_object("name", name=TEXT, optional=FLAG))),
    resources=_object("limits requests", limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=_list(_object("name mountPath", name=TEXT, mountPath=TEXT)),
    securityContext=_object(
        "allowPrivilegeEscalation capabilities",
        allowPrivilegeEscalation={"const": False},
        capabilities=_object("drop", drop={"const": ["ALL"]}),
    ),
)
POD = _object(
    "containers securityContext",
    restartPolicy={"enum": ["Never", "OnFailure"]},
    serviceAccountName=TEXT,
    containers=_list(CONTAINER),
    securityContext=_object(
        "runAsNonRoot runAsUser seccompProfile",
        runAsNonRoot={"const": True},
        runAsUser={"type": "integer", "minimum": 1},
        fsGroup=COUNT,
        seccompProfile=_object("type", type={"const": "RuntimeDefault"}),
    ),
    volumes=_list(_object("name emptyDir", name=TEXT, emptyDir=_object("", medium=TEXT, sizeLimit=TEXT))),
)
POD_TEMPLATE = _object("metadata spec", metadata=_object("labels", labels=TEXTS), spec=POD)


def _resource(api: str, kind: str, **fields: Any) -> dict[str, Any]:
    metadata = _object("", name=TEXT, generateName=TEXT, labels=TEXTS)
    return _object(
        " ".join(["apiVersion", "kind", "metadata", *fields]),
        apiVersion={"const": api},
        kind={"const": kind},
        metadata=metadata,
        **fields,
    )


SERVICE_ACCOUNT = _resource("v1", "ServiceAccount", automountServiceAccountToken=FLAG)

_SELECTOR = _object(
    "",
    matchLabels=TEXTS,
    matchExpressions=_list(
        _object("key operator", key=TEXT, operator={"enum": ["In", "NotIn", "Exists"]}, values=_list(TEXT))
    ),
)
NETWORK_POLICY = _resource(
    "networking.k8s.io/v1",
    "NetworkPolicy",
    spec=_object(
        "podSelector policyTypes ingress",
        podSelector=_SELECTOR,
        policyTypes=_list({"enum": ["Ingress", "Egress"]}),
        ingress=_list(
            _object(
                "from",
                **{"from": _list(_object("", podSelector=_SELECTOR, namespaceSelector=_SELECTOR))},
                ports=_list(_object("port", port=COUNT, protocol={"const": "TCP"})),
            )
        ),
    ),
)

_GROUP = {"labels": TEXTS, "rayStartParams": TEXTS, "template": POD_TEMPLATE}
_RAY_CLUSTER = _object(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=_object("mode", mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=_object("", version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    headGroupSpec=_object("rayStartParams template", **_GROUP),
    workerGroupSpecs=_list(
        _object(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            **_GROUP,
        )
    ),
)
RAY_CLUSTER = _resource("ray.io/v1", "RayCluster", spec=_RAY_CLUSTER)
RAY_JOB = _resource(
    "ray.io/v1",
    "RayJob",
    spec=_object(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        submitterPodTemplate=POD_TEMPLATE,
        rayClusterSpec=_RAY_CLUSTER,
    ),
)
CRON_JOB = _resource(
    "batch/v1",
    "CronJob",
    spec=_object(
        "schedule jobTemplate",
        schedule={"type": "string", "pattern": r"^[\d*/,-]+( [\d*/,-]+){4}$"},
        timeZone=TEXT,
        concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
        startingDeadlineSeconds=COUNT,
        successfulJobsHistoryLimit=COUNT,
        failedJobsHistoryLimit=COUNT,
        jobTemplate=_object("spec", spec=_object("template", template=POD_TEMPLATE, backoffLimit=COUNT)),
    ),
)
BY_KIND: dict[str, dict[str, Any]] = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (SERVICE_ACCOUNT, NETWORK_POLICY, RAY_CLUSTER, RAY_JOB, CRON_JOB)
}
