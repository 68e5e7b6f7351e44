"""S3 through boto3 only: one client resolves credentials, endpoint, proxy and certificates, and signs requests."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
from boto3.session import Session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from cxr.storage.uri import REQUESTER_PAYS, StorageError, is_anonymous

_CONNECT_S, _REQUEST_S, _ATTEMPTS, _CONNECTIONS = 5, 30, 3, 32
_TAIL = 1 << 16  # bytes at the end of a file that the first request reads: they contain most Parquet footers
_DELETE_THREADS = 8
# The environment variables that a client depends on.
_CLIENT_VARIABLES = re.compile(rf"AWS_.*|HOME|(https?|no|all)_proxy|{REQUESTER_PAYS}", re.IGNORECASE)
_BEYOND_END = {"InvalidRange", "416"}
_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}


def client(bucket: str) -> Any:
    """boto3's client for a bucket, which refreshes expiring credentials.

    It is created once per process, and again after the environment has changed.
    """
    environment = tuple(sorted(item for item in os.environ.items() if _CLIENT_VARIABLES.fullmatch(item[0])))
    return _client(environment, is_anonymous(bucket))


def forget_clients() -> None:
    """Make the next request reload the credentials from files, which may have changed."""
    _client.cache_clear()


def credentials_from() -> str | None:
    """Describe where the credentials come from; None if there are none."""
    credentials = Session().get_credentials()
    if credentials is None:
        return None
    profile = os.environ.get("AWS_PROFILE")
    origin = f"of AWS_PROFILE={profile}" if profile else f"found by {credentials.method}"
    return (
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if credentials.method == "env" else f"the credentials {origin}"
    )


def server(bucket: str) -> str:
    """The server's name in messages: its URL, or "Amazon S3"."""
    try:
        s3_client = client(bucket)
    except BotoCoreError:  # for example, an unknown profile
        return "S3"
    return "Amazon S3" if _is_amazon(s3_client) else s3_client.meta.endpoint_url.rstrip("/")


@lru_cache(maxsize=16)
def _client(environment: tuple[tuple[str, str], ...], anonymous: bool) -> Any:
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not Path(bundle).exists():
        raise StorageError(f"AWS_CA_BUNDLE={bundle} does not exist: correct the path, or unset it")
    settings: dict[str, Any] = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _REQUEST_S,
        "retries": {"mode": "standard", "max_attempts": _ATTEMPTS},
        "max_pool_connections": _CONNECTIONS,
        "signature_version": UNSIGNED if anonymous else None,
    }
    session = Session(region_name=os.environ.get("AWS_REGION") or None)
    s3_client = session.client("s3", config=Config(**settings))
    if not _is_amazon(s3_client):
        # boto3 appends a checksum to each body by default; some servers other than Amazon's store it as data.
        checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        s3_client = session.client("s3", config=Config(**settings, **checksums))
    if os.environ.get(REQUESTER_PAYS) and not anonymous:
        s3_client.meta.events.register("before-parameter-build.s3", _agree_to_pay)
    return s3_client


def _is_amazon(s3_client: Any) -> bool:
    return bool(re.search(r"\.amazonaws\.com(\.cn)?$", urlsplit(s3_client.meta.endpoint_url).hostname or ""))


def _agree_to_pay(params: dict[str, Any], model: Any, **_: Any) -> None:
    if "RequestPayer" in model.input_shape.members:
        params["RequestPayer"] = "requester"


def split(path: str) -> tuple[str, str]:
    """Bucket and key of "bucket/key"."""
    bucket, _, key = path.partition("/")
    return bucket, key


def open_object(path: str) -> tuple[BinaryIO, int]:
    """A stream of an object's bytes for one sequential read, and its size in bytes.

    Raises:
        FileNotFoundError: the bucket has no such key.
        ClientError, BotoCoreError: the request was denied, or failed.
    """
    bucket, key = split(path)
    response = _get(bucket, key)
    return response["Body"], response["ContentLength"]


def open_object_range(path: str, start: int, length: int) -> BinaryIO:
    """A stream of at most `length` bytes from `start`, empty beyond the end; raises like `open_object`."""
    bucket, key = split(path)
    try:
        return _get(bucket, key, Range=f"bytes={start}-{start + length - 1}")["Body"] if length else io.BytesIO()
    except ClientError as error:
        if _code(error) in _BEYOND_END:
            return io.BytesIO()
        raise


def read_start(path: str, size: int) -> tuple[bytes, int]:
    """The first `size` bytes of the object at "bucket/key", and the size of the whole; raises like `open_object`."""
    try:
        response = _get(*split(path), Range=f"bytes=0-{size - 1}")
    except ClientError as error:
        if _code(error) in _BEYOND_END:  # the object is empty
            return b"", 0
        raise
    data = response["Body"].read()
    total = response.get("ContentRange", "").rpartition("/")[2]
    return data, int(total) if total.isdigit() else len(data)


def etag(path: str) -> str:
    """The ETag of the object at "bucket/key", which changes with its content."""
    bucket, key = split(path)
    return client(bucket).head_object(Bucket=bucket, Key=key)["ETag"].strip('"')


def _get(bucket: str, key: str, **options: Any) -> dict[str, Any]:
    try:
        return client(bucket).get_object(Bucket=bucket, Key=key, **options)
    except ClientError as error:
        if _code(error) in ("NoSuchKey", "404"):
            raise FileNotFoundError(f"s3://{bucket}/{key}") from error
        raise


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def pages(bucket: str, **request: Any) -> Iterator[dict[str, Any]]:
    """The pages of a listing."""
    yield from client(bucket).get_paginator("list_objects_v2").paginate(Bucket=bucket, **request)


class S3Files(fs.FileSystemHandler):
    """The operations of a pyarrow file system that Ray and the Parquet reader need; paths are "bucket/key".

    S3 has no folders: a folder exists if a key starts with its name and a slash.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Files)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(S3Files)

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> fs.FileInfo:
        bucket, key = split(path.rstrip("/"))
        try:
            if key and (head := self._head(bucket, key)):
                return _file(path, head["ContentLength"], head["LastModified"])
            page = client(bucket).list_objects_v2(Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)
        except ClientError as error:
            if _code(error) in _MISSING:
                return fs.FileInfo(path, type=fs.FileType.NotFound)
            raise
        is_folder = not key or page.get("KeyCount", len(page.get("Contents", ())))
        return fs.FileInfo(path, type=fs.FileType.Directory if is_folder else fs.FileType.NotFound)

    def _head(self, bucket: str, key: str) -> dict[str, Any] | None:
        try:
            return client(bucket).head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        bucket, key = split(selector.base_dir.rstrip("/"))
        prefix, files, folders = f"{key}/" if key else "", list[fs.FileInfo](), dict[str, None]()
        for page in pages(bucket, Prefix=prefix, **({} if selector.recursive else {"Delimiter": "/"})):
            folders |= dict.fromkeys(item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", ()))
            for item in page.get("Contents", ()):
                parents = item["Key"].removeprefix(prefix).split("/")[:-1]
                folders |= dict.fromkeys(prefix + "/".join(parents[: n + 1]) for n in range(len(parents)))
                if not item["Key"].endswith("/"):  # else the marker of an empty folder
                    files.append(_file(f"{bucket}/{item['Key']}", item["Size"], item["LastModified"]))
        exists = files or folders or selector.allow_not_found
        if not exists and self._info(selector.base_dir).type != fs.FileType.Directory:
            raise FileNotFoundError(f"s3://{selector.base_dir}")
        return [fs.FileInfo(f"{bucket}/{name}", type=fs.FileType.Directory) for name in folders] + files

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        bucket, key = split(path.rstrip("/"))
        with ThreadPoolExecutor(_DELETE_THREADS) as pool:
            for page in pages(bucket, Prefix=f"{key}/"):
                # One at a time: servers differ in the checksum that they require of a request for several.
                keys = [item["Key"] for item in page.get("Contents", ())]
                list(pool.map(lambda key: client(bucket).delete_object(Bucket=bucket, Key=key), keys))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a bucket is never deleted")

    def delete_file(self, path: str) -> None:
        bucket, key = split(path)
        client(bucket).delete_object(Bucket=bucket, Key=key)

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        (bucket, key), (to_bucket, to_key) = split(src), split(dest)
        client(to_bucket).copy_object(Bucket=to_bucket, Key=to_key, CopySource={"Bucket": bucket, "Key": key})

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(RangeReader(*split(path)), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("S3Files does not write; use storage.write_bytes")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("S3Files does not write; use storage.write_bytes")


def _file(path: str, size: int, modified: Any) -> fs.FileInfo:
    return fs.FileInfo(path, type=fs.FileType.File, size=size, mtime=modified)


class RangeReader(io.RawIOBase):
    """A seekable object, read by range requests.

    Args:
        size: of the object in bytes. If it is not given, a first request reads it and the last _TAIL bytes.
    """

    def __init__(self, bucket: str, key: str, size: int | None = None) -> None:
        self._bucket, self._key, self._at = bucket, key, 0
        self._tail = b""
        if size is not None:
            self._size = size
            return
        try:
            response = _get(bucket, key, Range=f"bytes=-{_TAIL}")
        except ClientError as error:
            if _code(error) not in _BEYOND_END:  # the object is empty
                raise
            self._size = 0
            return
        self._tail = response["Body"].read()
        total = response.get("ContentRange", "").rpartition("/")[2]
        self._size = int(total) if total.isdigit() else len(self._tail)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        start, end = self._at, self._size if size < 0 else min(self._at + size, self._size)
        if start >= end:
            return b""
        self._at, tail_start = end, self._size - len(self._tail)
        if start >= tail_start:
            return self._tail[start - tail_start : end - tail_start]
        return _get(self._bucket, self._key, Range=f"bytes={start}-{end - 1}")["Body"].read()
