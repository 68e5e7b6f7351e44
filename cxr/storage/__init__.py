"""Files by URI: list, read and write on local disks, S3 and Google Cloud Storage.

A URI is a local path, `file:///path`, `s3://bucket/key` or `gs://bucket/key`, or one of these followed by `!/MEMBER`
for a file inside a ZIP or TAR file, which is read without unpacking the container.

Every request to S3 is made by boto3, which reads endpoint, region, credentials, proxy and certificates from the
standard variables and files (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_PROFILE`, `http_proxy`, `AWS_CA_BUNDLE`,
`~/.aws/config`, …) and refreshes expiring credentials. Google Cloud Storage uses application default credentials.
Buckets listed in `CXR_ANONYMOUS_BUCKETS` (`*` for all) are read without credentials; if `CXR_REQUESTER_PAYS` is set,
requests to S3 accept requester-pays charges. Throttling, 5xx, lost connections and lost mounts are retried for
`CXR_STORAGE_PATIENCE_S` seconds (60 if unset); missing files and denied access are not. Every failure is a
`StorageError` that names the URI and says what to do: `NotFoundError` or `UnreadableError` if it concerns one file,
plain `StorageError` if it concerns the whole bucket, disk or mount.
"""

from cxr.storage.conditional import replace_if
from cxr.storage.containers import FileEntry, archive_root
from cxr.storage.errors import storage_error
from cxr.storage.files import (
    check_readable,
    check_writable,
    delete,
    download_folder,
    exists,
    is_folder,
    read_bytes,
    read_json,
    read_start,
    read_text,
    upload_folder,
    write_bytes,
    write_json,
    write_text,
)
from cxr.storage.filesystems import filesystem
from cxr.storage.listing import list_files
from cxr.storage.parquet import RowGroupReader, read_parquet, read_parquet_footer
from cxr.storage.ray_filesystem import ray_storage
from cxr.storage.recorded_reads import current_versions, recorded_reads
from cxr.storage.uri import (
    ANONYMOUS,
    REQUESTER_PAYS,
    DamagedError,
    NotFoundError,
    StorageError,
    UnreadableError,
    is_container,
    is_inside,
    is_local,
    join,
    name,
    normalize,
    resolve,
    safe_path,
    split_member,
)

__all__ = [
    "ANONYMOUS",
    "REQUESTER_PAYS",
    "DamagedError",
    "FileEntry",
    "NotFoundError",
    "RowGroupReader",
    "StorageError",
    "UnreadableError",
    "archive_root",
    "check_readable",
    "check_writable",
    "current_versions",
    "delete",
    "download_folder",
    "exists",
    "filesystem",
    "is_container",
    "is_folder",
    "is_inside",
    "is_local",
    "join",
    "list_files",
    "name",
    "normalize",
    "ray_storage",
    "read_bytes",
    "read_json",
    "read_parquet",
    "read_parquet_footer",
    "read_start",
    "read_text",
    "recorded_reads",
    "replace_if",
    "resolve",
    "safe_path",
    "split_member",
    "storage_error",
    "upload_folder",
    "write_bytes",
    "write_json",
    "write_text",
]
