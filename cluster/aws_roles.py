"""Create the IAM roles for the machines of cluster.yaml, once per AWS account; running it again updates them.

    python cluster/aws_roles.py --bucket my-xrays [--bucket my-results]

cxr-worker may only read and write the buckets; cxr-head may also start machines, and stop those of this cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from typing import Any

import boto3

HEAD, WORKER = "cxr-head", "cxr-worker"


def main() -> None:
    parser = argparse.ArgumentParser(description="Create the IAM roles cxr-head and cxr-worker.")
    parser.add_argument("--bucket", action="append", required=True, help="bucket that jobs may use (repeatable)")
    buckets = parser.parse_args().bucket
    account = boto3.client("sts").get_caller_identity()["Account"]
    make_role(WORKER, use_buckets(buckets))
    make_role(HEAD, use_buckets(buckets) + run_machines(account))
    allow_spot_machines()
    print(f"{HEAD} and {WORKER} may use {', '.join(buckets)}. Next: ray up cluster.yaml")


def make_role(name: str, statements: Sequence[dict[str, Any]]) -> None:
    """A role for EC2 machines and the instance profile of the same name that carries it."""
    iam = boto3.client("iam")
    trust = allow(["sts:AssumeRole"], None) | {"Principal": {"Service": "ec2.amazonaws.com"}}
    with contextlib.suppress(iam.exceptions.EntityAlreadyExistsException):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=policy([trust]))
    iam.put_role_policy(RoleName=name, PolicyName="cxr", PolicyDocument=policy(statements))
    with contextlib.suppress(iam.exceptions.EntityAlreadyExistsException):
        iam.create_instance_profile(InstanceProfileName=name)
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def allow_spot_machines() -> None:
    """Make the role with which EC2 itself starts spot machines; an account has it once it has used any."""
    iam = boto3.client("iam")
    with contextlib.suppress(iam.exceptions.InvalidInputException, iam.exceptions.EntityAlreadyExistsException):
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")


def use_buckets(buckets: Sequence[str]) -> list[dict[str, Any]]:
    names = [f"arn:aws:s3:::{bucket}" for bucket in buckets]
    objects = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        allow(["s3:ListBucket", "s3:GetBucketLocation"], names),
        allow(objects, [f"{name}/*" for name in names]),
    ]


def run_machines(account: str) -> list[dict[str, Any]]:
    ours = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "cxr"}}
    return [
        allow(["ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags", "ssm:GetParameters"], ["*"]),
        allow(["ec2:TerminateInstances", "ec2:StopInstances"], ["*"]) | {"Condition": ours},
        allow(["iam:PassRole"], [f"arn:aws:iam::{account}:role/{WORKER}"]),
    ]


def allow(actions: Sequence[str], resources: Sequence[str] | None) -> dict[str, Any]:
    statement = {"Effect": "Allow", "Action": list(actions)}
    return statement | ({"Resource": list(resources)} if resources else {})


def policy(statements: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


if __name__ == "__main__":
    main()
