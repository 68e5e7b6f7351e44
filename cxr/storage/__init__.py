"""Files by URI: list, read and write on local disks, S3 and Google Cloud Storage.

A URI is a local path, `file:///path`, `s3://bucket/key` or `gs://bucket/key`. Every request to S3 is made by boto3,
which takes endpoint, region, credentials, proxy and certificates from the standard variables and files
(`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_PROFILE`, `http_proxy`, `AWS_CA_BUNDLE`, `~/.aws/config`, …) and renews
credentials that expire; Google's are its application default credentials. Buckets that `CXR_ANONYMOUS_BUCKETS` names
(`*` for all) are read without credentials; with `CXR_REQUESTER_PAYS` set, requests to S3 agree to pay. Throttling,
5xx, lost connections and lost mounts are tried again for `CXR_STORAGE_PATIENCE_S` seconds (60 if unset); what is
missing or refused is not. Every failure is a `StorageError` that names the URI and says what to do: `NotFoundError` or
`UnreadableError` where it concerns one file, a plain one where its whole place is concerned.
"""

from cxr.storage.conditional import replace_if
from cxr.storage.files import (
    check_readable,
    check_writable,
    delete,
    download_folder,
    exists,
    read_bytes,
    read_json,
    read_text,
    upload_folder,
    write_bytes,
    write_json,
    write_text,
)
from cxr.storage.filesystems import filesystem
from cxr.storage.listing import FileEntry, list_files
from cxr.storage.parquet import read_parquet, read_parquet_footer
from cxr.storage.ray_filesystem import ray_storage
from cxr.storage.uri import (
    ANONYMOUS,
    REQUESTER_PAYS,
    NotFoundError,
    StorageError,
    UnreadableError,
    is_local,
    join,
    name,
    normalize,
    safe_path,
)

__all__ = [
    "ANONYMOUS",
    "REQUESTER_PAYS",
    "FileEntry",
    "NotFoundError",
    "StorageError",
    "UnreadableError",
    "check_readable",
    "check_writable",
    "delete",
    "download_folder",
    "exists",
    "filesystem",
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
    "read_text",
    "replace_if",
    "safe_path",
    "upload_folder",
    "write_bytes",
    "write_json",
    "write_text",
]
