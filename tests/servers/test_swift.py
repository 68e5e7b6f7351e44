"""The Swift server: signatures are enforced, big objects and all of our requests work, data outlive the server."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from cxr import storage
from tests.servers import swift
from tests.servers.use import use_everything

IN_PARTS = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not swift.VENV.exists(), reason="no Swift: `make .venv-swift` installs it"),
]


def test_signatures_parts_and_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = os.urandom(10 << 20)
    with swift.swift(tmp_path) as variables:
        s3 = swift.client(variables)
        s3.create_bucket(Bucket="cxr")
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            swift.client({**variables, "AWS_SECRET_ACCESS_KEY": "wrong"}).list_objects_v2(Bucket="cxr")
        s3.upload_fileobj(io.BytesIO(big), "cxr", "a/big", Config=IN_PARTS)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        use_everything("s3://cxr/run")
        storage.write_bytes("s3://cxr/a/small", b"x")
        assert storage.read_bytes("s3://cxr/a/big") == big
    with swift.swift(tmp_path) as variables:
        listed = swift.client(variables).list_objects_v2(Bucket="cxr")["Contents"]
    assert [(entry["Key"], entry["Size"]) for entry in listed] == [("a/big", 10 << 20), ("a/small", 1)]
