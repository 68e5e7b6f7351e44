"""A pyarrow file system for Ray on top of `cxr.storage`: with its retries, and each file complete or absent."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cxr.storage.errors import storage_error
from cxr.storage.files import atomic_writer, open_local_copy
from cxr.storage.filesystems import filesystem
from cxr.storage.retries import retried
from cxr.storage.uri import NotFoundError, check_writable_uri, normalize


def ray_storage(uri: str) -> tuple[str, fs.FileSystem]:
    """`storage_path` and `storage_filesystem` for Ray's RunConfig.

    Ray writes checkpoints and its own records through them. pyarrow's clients, which Ray would create itself, give up
    after seconds, lose their retry strategy when they are pickled, and leave partial files on a full disk.
    """
    check_writable_uri(uri)
    scheme, mark, path = normalize(uri).rpartition("://")
    return path, fs.PyFileSystem(_RetryingHandler(scheme + mark))


class _RetryingHandler(fs.FileSystemHandler):
    """Delegates to this process's pyarrow file system with retries; a missing file is a FileNotFoundError."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix  # "s3://", or empty for local disks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RetryingHandler) and other.prefix == self.prefix

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.prefix)

    def _call(self, operation: str, path: str, *values: Any, **options: Any) -> Any:
        uri = self.prefix + path

        def call() -> Any:
            return getattr(filesystem(uri)[0], operation)(*values, **options)

        try:
            return retried(uri, call)
        except NotFoundError as error:
            raise FileNotFoundError(str(error)) from error

    def get_type_name(self) -> str:
        return f"cxr+{self.prefix or 'file://'}"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._call("get_file_info", paths[0], paths) if paths else []

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self._call("get_file_info", selector.base_dir, selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        if self.prefix != "s3://":  # which has no folders
            self._call("create_dir", path, path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._call("delete_dir", path, path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self._call("delete_dir_contents", path, path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a whole disk or bucket is never deleted")

    def delete_file(self, path: str) -> None:
        self._call("delete_file", path, path)

    def move(self, src: str, dest: str) -> None:
        self._call("move", src, src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._call("copy_file", src, src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        try:
            return pa.PythonFile(open_local_copy(self.prefix + path), mode="r")
        except NotFoundError as error:
            raise FileNotFoundError(str(error)) from error

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Outgoing(self.prefix + path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("files cannot be appended to")


class _Outgoing:
    """A file that appears at its URI when it is closed."""

    def __init__(self, uri: str) -> None:
        self._uri, self._stack = uri, ExitStack()
        self._stream = self._stack.enter_context(atomic_writer(uri))
        self.closed = False

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.closed = True
            with suppress(OSError):
                self._stack.__exit__(*sys.exc_info())
            raise storage_error(self._uri, error) from error

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._stack.close()
