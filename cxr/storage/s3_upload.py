"""Objects on S3 that are uploaded while they are written, in flat memory and without a temporary file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from cxr.storage import s3
from cxr.storage.retries import retried
from cxr.storage.uri import StorageError

_PART_BYTES = 16 << 20  # S3 allows 10,000 parts of at least 5 MiB
_UPLOADED = 3  # parts at a time


@contextmanager
def uploaded(uri: str, path: str) -> Iterator[Upload]:
    """The stream of the object at "bucket/key", which appears if the block ends without an exception.

    Raises:
        StorageError: a part could not be uploaded; also raised by `write`.
    """
    with ThreadPoolExecutor(_UPLOADED) as pool:
        upload = Upload(uri, path, pool)
        try:
            yield upload
            upload.complete()
        except BaseException:
            upload.abort()
            raise


class Upload(io.RawIOBase):
    """A stream whose bytes are sent in parts by the threads of `pool`."""

    def __init__(self, uri: str, path: str, pool: ThreadPoolExecutor) -> None:
        self._uri, self._pool = uri, pool
        self._object = dict(zip(("Bucket", "Key"), s3.split(path), strict=True))
        self._waiting, self._position = bytearray(), 0
        self._upload: dict[str, Any] | None = None  # of several parts
        self._parts: list[Future[dict[str, Any]]] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any, /) -> int:
        with memoryview(data).cast("B") as view:
            self._waiting += view
            self._position += len(view)
            while len(self._waiting) >= _PART_BYTES:
                self._send(bytes(self._waiting[:_PART_BYTES]))
                del self._waiting[:_PART_BYTES]
            return len(view)

    def complete(self) -> None:
        """Upload the rest and make the object appear."""
        if self._upload is None:
            self._request("put_object", Body=bytes(self._waiting))
            return
        if self._waiting:
            self._send(bytes(self._waiting))
        parts = [{"PartNumber": n, "ETag": part.result()["ETag"]} for n, part in enumerate(self._parts, 1)]
        self._request("complete_multipart_upload", **self._upload, MultipartUpload={"Parts": parts})

    def abort(self) -> None:
        """Discard what has been uploaded."""
        self._pool.shutdown(cancel_futures=True)
        if self._upload is not None:
            with suppress(StorageError):
                self._request("abort_multipart_upload", **self._upload)

    def _send(self, data: bytes) -> None:
        if self._upload is None:
            self._upload = {"UploadId": self._request("create_multipart_upload")["UploadId"]}
        if len(self._parts) >= _UPLOADED:
            self._parts[-_UPLOADED].result()
        number = len(self._parts) + 1
        self._parts.append(
            self._pool.submit(self._request, "upload_part", **self._upload, PartNumber=number, Body=data)
        )

    def _request(self, operation: str, **arguments: Any) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            return getattr(s3.client(self._object["Bucket"]), operation)(**self._object, **arguments)

        return retried(self._uri, call)
