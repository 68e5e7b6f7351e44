"""The clients of S3 and Google Cloud Storage, one a process and place, set up from the environment."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import lru_cache
from typing import Any

from boto3.session import Session
from botocore.config import Config
from pyarrow import fs

from cxr.storage.uri import normalise

_CONNECT_S, _REQUEST_S, _ATTEMPTS = 5, 30, 3


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem for a URI, and the path in it."""
    scheme, mark, path = normalise(uri).partition("://")
    if not mark:
        return fs.LocalFileSystem(), scheme
    if scheme == "gs":
        return _gcs(), path
    return _s3(path.partition("/")[0], s3_endpoint(), _s3_region()), path


def file_info(uri: str) -> fs.FileInfo:
    """Type and size of what lies at the URI; type NotFound where nothing does."""
    filesystem_, path = filesystem(uri)
    info = filesystem_.get_file_info(path)
    assert isinstance(info, fs.FileInfo)
    return info


def s3_client() -> Any:
    """boto3's client for the same endpoint and credentials: it lists page by page."""
    return _s3_client(s3_endpoint(), _s3_region())


def s3_endpoint() -> str | None:
    """The S3 server's URL; None is Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _s3_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


@lru_cache(maxsize=64)
def _s3(bucket: str, endpoint: str | None, region: str | None) -> fs.S3FileSystem:
    if region is None and endpoint is None:
        region = _amazon_region(bucket)
    scheme, _, host = (endpoint or "https://").partition("://")
    return fs.S3FileSystem(
        region=region,
        scheme=scheme,
        endpoint_override=host.rstrip("/") or None,
        connect_timeout=_CONNECT_S,
        request_timeout=_REQUEST_S,
        allow_delayed_open=True,  # a small file is then one PUT
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def _amazon_region(bucket: str) -> str | None:
    try:
        return fs.resolve_s3_region(bucket)
    except OSError:  # told when the bucket is used
        return None


@lru_cache(maxsize=8)
def _s3_client(endpoint: str | None, region: str | None) -> Any:
    retries: Any = {"mode": "standard", "max_attempts": _ATTEMPTS}
    # Checksums that trail a body, boto3's default, are Amazon's own: some other servers store them as data.
    sums: Any = "when_required" if endpoint else None
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_REQUEST_S,
        retries=retries,
        max_pool_connections=32,
        request_checksum_calculation=sums,
        response_checksum_validation=sums,
    )
    return Session(region_name=region).client("s3", endpoint_url=endpoint, config=config)


@lru_cache(maxsize=1)
def _gcs() -> fs.GcsFileSystem:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=15))
