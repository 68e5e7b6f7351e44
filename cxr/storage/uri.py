"""Normal form of URIs, members of containers, safe file names, and the errors that name a URI.

`CONTAINER!/MEMBER`, such as `s3://bucket/a.zip!/images/1.dcm`, is a file in a ZIP or TAR file, as in the URIs of
Apache Commons VFS, Java and rasterio; `CONTAINER!` is the folder of all its members. Member names follow the
container's, so that a URI is joined, shortened and compared in the same way inside a container as outside.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from typing import NoReturn
from urllib.parse import quote, unquote

from cxr.errors import UserError

REMOTE_SCHEMES = ("s3", "gs")
ANONYMOUS = "CXR_ANONYMOUS_BUCKETS"  # buckets to read without credentials, or * for all
REQUESTER_PAYS = "CXR_REQUESTER_PAYS"  # if set, accept requester-pays charges
_NAME_BYTES = 160  # file systems allow 255; suffixes and the marks of partial files need some of them
_PATH_BYTES = 500  # keys of object stores have at most 1,024, and paths of some file systems even fewer
_UNSAFE = re.compile(
    r"""[\x00-\x1f\x7f%"*:<>?\\|] | [. ]\Z | \A(?=(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|\Z)). """,
    re.IGNORECASE | re.VERBOSE,
)
"""Characters and endings that file systems reject or drop, "." and "..", and the first letter of device names."""

_LOGIN = re.compile(r"(?<=://)[^\s/@\"']+@")  # user:password@ before a host
_MEMBER = re.compile(r"(?P<container>.*?\.(?:zip|tar|tar\.gz|tgz))!(?:/(?P<member>.*))?", re.IGNORECASE | re.DOTALL)
_QUERY = re.compile(r"(://[^\s?\"']+)\?[^\s\"')]*")  # contains the signature of a signed URL


class StorageError(UserError):
    """A file, folder or bucket cannot be listed, read or written; passwords and signatures are removed."""

    def __init__(self, message: str) -> None:
        super().__init__(_QUERY.sub(r"\1", _LOGIN.sub("", message)))


class NotFoundError(StorageError):
    """The URI does not exist, although its disk or bucket does."""


class UnreadableError(StorageError):
    """Only this file cannot be read, because of its permissions or because it is not a regular file."""


class DamagedError(UnreadableError):
    """A compressed file, a container or one of its members is damaged, unsafe or of an unsupported kind."""


def reject_damaged(uri: str, reason: str) -> NoReturn:
    """Raise DamagedError; its cause contains the reason, as for other unreadable files."""
    cause = OSError(errno.EINVAL, reason)
    raise DamagedError(f"{uri} cannot be read: {reason}: repair, repack or remove it") from cause


def normalize(uri: str | os.PathLike[str]) -> str:
    """The normal form of a URI: local paths absolute, `file://` removed, no slash at the end."""
    text = os.fspath(uri)
    if "\0" in text:
        raise StorageError(f"expected a path or URI, got {text!r}, which contains a NUL character: remove it")
    scheme, mark, rest = text.partition("://")
    if not mark and text:
        return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 (resolves "..", keeps links)
    if scheme == "file" and rest.startswith("/"):
        return os.path.abspath(unquote(rest, errors="surrogateescape"))  # noqa: PTH100
    if scheme not in REMOTE_SCHEMES or not rest.strip("/") or rest.startswith("/"):
        raise StorageError(
            f"expected a local path, file:///path, s3://bucket/key or gs://bucket/key, got {text!r}: use one of "
            "these forms"
        )
    if scheme == "gs" and "//" in rest.rstrip("/"):
        raise StorageError(
            f"{text!r} has an empty folder name (//), which is not supported on gs://: rename the files"
        )
    return f"{scheme}://{rest.rstrip('/')}"


def check_writable_uri(uri: str) -> None:
    """Raise StorageError if results cannot be written below a URI, whatever its permissions.

    Containers are only read; Ray merges the two slashes of an empty folder name into one; and records of a run
    contain the name of its folder as UTF-8.
    """
    check_utf8(normalize(uri))
    if split_member(normalize(uri)):
        raise StorageError(f"{uri} is in a ZIP or TAR file, which is only read: choose a folder")
    if not is_local(uri) and "//" in normalize(uri).partition("://")[2]:
        raise StorageError(f"{uri} has an empty folder name (//): remove it")


def check_utf8(path: str) -> None:
    """Raise UnreadableError for a path whose bytes are not valid UTF-8, which pyarrow cannot open."""
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UnreadableError(
            f"expected a path in UTF-8, got {shown}: rename the files or folders with \\x in it"
        ) from None


def is_local(uri: str) -> bool:
    return "://" not in normalize(uri)


def split_member(uri: str) -> tuple[str, str] | None:
    """Container and member of a normalized `CONTAINER!/MEMBER`; the member of `CONTAINER!` is empty.

    None if the URI is not in a container. Only the name decides, so a real folder with a name like "a.zip!" cannot be
    read; listings skip and count its files.
    """
    if "!" not in uri or not (match := _MEMBER.fullmatch(uri)):
        return None
    return match["container"], match["member"] or ""


def is_container(uri: str) -> bool:
    """Whether the file's name has the extension of a ZIP or TAR file."""
    return uri.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))


def is_anonymous(bucket: str) -> bool:
    """Whether CXR_ANONYMOUS_BUCKETS says to read the bucket without credentials."""
    buckets = os.environ.get(ANONYMOUS, "").replace(",", " ").split()
    return "*" in buckets or bucket in buckets


def join(base: str, *parts: str) -> str:
    """Append `parts` to `base`: join("s3://b/a/", "x", "y.png") -> "s3://b/a/x/y.png"."""
    return "/".join([normalize(base).rstrip("/"), *(part.strip("/") for part in parts)])


def resolve(entry: str, folder: str) -> str:
    """The normal form, without "." and "..", of a URI or path that may be relative to `folder`.

    It may lead out of the folder: check with `is_inside` unless the user wrote it.
    """
    uri = normalize(entry if "://" in entry or entry.startswith("/") else f"{normalize(folder)}/{entry}")
    scheme, mark, rest = uri.partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}" if mark else uri


def is_inside(uri: str, folder: str) -> bool:
    """Whether a URI without ".." is below a folder."""
    return uri.startswith(f"{normalize(folder).rstrip('/')}/")


def name(uri: str) -> str:
    """The last part of a URI."""
    return normalize(uri).rpartition("/")[2]


def safe_path(identifier: str, suffix: str) -> str:
    """The relative path of a file for any text, different for each text: "a/b" and ".png" -> "a/b.png".

    The path stays in its folder, and Linux, macOS, Windows and object stores accept it. Characters and names that one
    of them does not accept are percent-encoded, and long names and paths end in their hash instead of being complete.
    Letter case is kept, so file systems that ignore it may take two texts for the same.

    Args:
        suffix: of the file's name, such as ".png". No folder of the path ends in it, because a file could be there.
    """
    *folders, file = (_UNSAFE.sub(_percent_encoded, part) or "%" for part in identifier.split("/"))
    folders = [f"{name.removesuffix(suffix)}%{suffix}" if name.endswith(suffix) else name for name in folders]
    path = "/".join(map(_shortened, [*folders, file])) + suffix
    if len(path.encode()) > _PATH_BYTES:
        return f"%{_digest(identifier)}/{_shortened(file)}{suffix}"
    return path


def _percent_encoded(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


def _shortened(name: str) -> str:
    if len(name.encode()) <= _NAME_BYTES:
        return name
    return f"{name.encode()[: _NAME_BYTES // 2].decode(errors='ignore')}~{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def local_uri(path: str) -> str:
    """A local path unchanged, or percent-encoded as file:// if its bytes are not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path
