"""How a URI is spelt, and the errors that name one."""

from __future__ import annotations

import hashlib
import os
import re
from urllib.parse import quote, unquote

from cxr.errors import UserError

REMOTE_SCHEMES = ("s3", "gs")
ANONYMOUS = "CXR_ANONYMOUS_BUCKETS"  # names of buckets that are read without credentials, or * for all
REQUESTER_PAYS = "CXR_REQUESTER_PAYS"  # set: S3 may charge the requests to whoever makes them
_NAME_BYTES = 160  # file systems take 255, of which endings and the marks of unfinished files need some

_LOGIN = re.compile(r"(?<=://)[^\s/@\"']+@")  # user:password@ before a host
_QUERY = re.compile(r"(://[^\s?\"']+)\?[^\s\"')]*")  # where signed URLs carry their signature


class StorageError(UserError):
    """A place that cannot be listed, read or written; its message shows no password and no signature."""

    def __init__(self, message: str) -> None:
        super().__init__(_QUERY.sub(r"\1", _LOGIN.sub("", message)))


class NotFoundError(StorageError):
    """Nothing lies at the URI, though its place is there."""


class UnreadableError(StorageError):
    """This one file cannot be had, though its place answers: its own rights, or it is no file."""


def normalize(uri: str | os.PathLike[str]) -> str:
    """The one spelling of a URI: local paths absolute, `file://` taken off, no slash at the end."""
    text = os.fspath(uri)
    if "\0" in text:
        raise StorageError(f"expected a path or URI, got {text!r}, which holds a NUL character: correct it")
    scheme, mark, rest = text.partition("://")
    if not mark and text:
        return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 (".." goes, links stay)
    if scheme == "file" and rest.startswith("/"):
        return os.path.abspath(unquote(rest, errors="surrogateescape"))  # noqa: PTH100
    if scheme not in REMOTE_SCHEMES or not rest.strip("/") or rest.startswith("/"):
        wanted = "a local path, file:///path, s3://bucket/key or gs://bucket/key"
        raise StorageError(f"{text!r} is no place where files can lie: give {wanted}")
    if scheme == "gs" and "//" in rest.rstrip("/"):
        raise StorageError(f"{text!r} has an empty folder name (//), which cannot be read on gs://: rename the files")
    return f"{scheme}://{rest.rstrip('/')}"


def check_no_empty_folder(uri: str) -> None:
    """Raise StorageError where results cannot be written to a URI: Ray takes two slashes for one."""
    if not is_local(uri) and "//" in normalize(uri).partition("://")[2]:
        raise StorageError(f"{uri} has an empty folder name (//): leave it out")


def is_local(uri: str) -> bool:
    return "://" not in normalize(uri)


def is_anonymous(bucket: str) -> bool:
    """Whether the bucket is read without credentials, as CXR_ANONYMOUS_BUCKETS says."""
    named = os.environ.get(ANONYMOUS, "").replace(",", " ").split()
    return "*" in named or bucket in named


def join(base: str, *parts: str) -> str:
    """`base` with `parts` below it: join("s3://b/a/", "x", "y.png") -> "s3://b/a/x/y.png"."""
    return "/".join([normalize(base).rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of a URI."""
    return normalize(uri).rpartition("/")[2]


def safe_path(identifier: str) -> str:
    """A relative path for any text: "a/b" -> "a/b". No two texts share one, and none leads out of its folder.

    Parts that would vanish or lead out are percent-encoded; parts too long for a file name end in their hash.
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
    """A local path as it is, or as file:// with % marks where its bytes are no UTF-8 text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path
