"""Normal form of URIs, safe file names, and the errors that name a URI."""

from __future__ import annotations

import hashlib
import os
import re
from urllib.parse import quote, unquote

from cxr.errors import UserError

REMOTE_SCHEMES = ("s3", "gs")
ANONYMOUS = "CXR_ANONYMOUS_BUCKETS"  # buckets to read without credentials, or * for all
REQUESTER_PAYS = "CXR_REQUESTER_PAYS"  # if set, accept requester-pays charges
_NAME_BYTES = 160  # file systems allow 255; suffixes and the marks of partial files need some of them

_LOGIN = re.compile(r"(?<=://)[^\s/@\"']+@")  # user:password@ before a host
_QUERY = re.compile(r"(://[^\s?\"']+)\?[^\s\"')]*")  # contains the signature of a signed URL


class StorageError(UserError):
    """A file, folder or bucket cannot be listed, read or written; passwords and signatures are removed."""

    def __init__(self, message: str) -> None:
        super().__init__(_QUERY.sub(r"\1", _LOGIN.sub("", message)))


class NotFoundError(StorageError):
    """The URI does not exist, although its disk or bucket does."""


class UnreadableError(StorageError):
    """Only this file cannot be read, because of its permissions or because it is not a regular file."""


def normalize(uri: str | os.PathLike[str]) -> str:
    """The normal form of a URI: local paths absolute, `file://` removed, no slash at the end."""
    text = os.fspath(uri)
    if "\0" in text:
        raise StorageError(f"expected a path or URI, got {text!r}, which contains a NUL character: correct it")
    scheme, mark, rest = text.partition("://")
    if not mark and text:
        return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 (resolves "..", keeps links)
    if scheme == "file" and rest.startswith("/"):
        return os.path.abspath(unquote(rest, errors="surrogateescape"))  # noqa: PTH100
    if scheme not in REMOTE_SCHEMES or not rest.strip("/") or rest.startswith("/"):
        raise StorageError(
            f"expected a local path, file:///path, s3://bucket/key or gs://bucket/key, got {text!r}: correct it"
        )
    if scheme == "gs" and "//" in rest.rstrip("/"):
        raise StorageError(
            f"{text!r} has an empty folder name (//), which is not supported on gs://: rename the files"
        )
    return f"{scheme}://{rest.rstrip('/')}"


def check_no_empty_folder(uri: str) -> None:
    """Raise StorageError if a URI for results has an empty folder name: Ray merges two slashes into one."""
    if not is_local(uri) and "//" in normalize(uri).partition("://")[2]:
        raise StorageError(f"{uri} has an empty folder name (//): remove it")


def is_local(uri: str) -> bool:
    return "://" not in normalize(uri)


def is_anonymous(bucket: str) -> bool:
    """Whether CXR_ANONYMOUS_BUCKETS says to read the bucket without credentials."""
    buckets = os.environ.get(ANONYMOUS, "").replace(",", " ").split()
    return "*" in buckets or bucket in buckets


def join(base: str, *parts: str) -> str:
    """Append `parts` to `base`: join("s3://b/a/", "x", "y.png") -> "s3://b/a/x/y.png"."""
    return "/".join([normalize(base).rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of a URI."""
    return normalize(uri).rpartition("/")[2]


def safe_path(identifier: str) -> str:
    """An injective map from any text to a relative path inside its folder: "a/b" -> "a/b".

    Empty parts, "." and ".." are percent-encoded; parts too long for a file name are truncated and end in their hash.
    """
    return "/".join(_safe_name(part) for part in identifier.split("/"))


def _safe_name(part: str) -> str:
    if part in ("", ".", ".."):
        return "%" + part.replace(".", "%2E")
    name = part.replace("%", "%25").encode(errors="surrogateescape")
    if len(name) > _NAME_BYTES:
        name = name[: _NAME_BYTES // 2] + b"~" + hashlib.sha256(name).hexdigest()[:32].encode()
    return name.decode(errors="ignore")


def local_uri(path: str) -> str:
    """A local path unchanged, or percent-encoded as file:// if its bytes are not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path
