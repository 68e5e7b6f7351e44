"""Credentials, endpoints, proxies and certificates of S3 requests: the same for listing, reading, writing and Ray."""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cxr import storage
from cxr.storage import StorageError
from tests.servers import faulty
from tests.servers.faulty import LOOPBACK, Faulty
from tests.servers.use import use_everything

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def backend() -> Iterator[str]:
    with faulty.moto() as url:
        yield url


@pytest.fixture(scope="module")
def server(backend: str) -> Iterator[Faulty]:
    with faulty.before(backend) as front:
        yield front


@pytest.fixture
def front(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """A server that records requests, with an empty bucket `xrays`."""
    for name in ("AWS_PROFILE", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in faulty.variables(server.url).items():
        monkeypatch.setenv(name, value)
    server.expired, server.refused = set(), {}
    bucket = boto3.resource("s3").Bucket("xrays")
    bucket.create()
    bucket.objects.delete()
    server.seen.clear()
    return server


def signers(front: Faulty, service: str = "s3") -> set[str]:
    """Ids of the keys that signed the requests to a service."""
    return {seen.signer for seen in front.seen if seen.service == service}


# ---- Credentials


def assume_by_profile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_profile(folder, monkeypatch, "source_profile = base")


def assume_by_web_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "token").write_text("a.b.c")
    write_profile(folder, monkeypatch, f"web_identity_token_file = {folder / 'token'}")


def assume_by_chain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = "\n[profile middle]\nrole_arn = arn:aws:iam::123456789012:role/middle\nsource_profile = base"
    write_profile(folder, monkeypatch, f"source_profile = middle{middle}")


def write_profile(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    role = f"[profile hospital]\nrole_arn = arn:aws:iam::123456789012:role/reader\n{lines}\n"
    base = "[profile base]\naws_access_key_id = BASE\naws_secret_access_key = word\n"
    (folder / "config").write_text(role + base)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_PROFILE", "hospital")
    for name in KEYS:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("assume", [assume_by_profile, assume_by_web_identity, assume_by_chain])
def test_every_request_is_signed_by_the_assumed_role(front: Faulty, tmp_path: Path, monkeypatch, assume) -> None:
    assume(tmp_path, monkeypatch)
    use_everything()
    (signer,) = signers(front)
    assert signer.startswith("ASIA")  # temporary credentials
    assert signer not in signers(front, "sts")
    assert "" not in {seen.signer for seen in front.seen if seen.path.startswith("/xrays")}


def test_expiring_credentials_are_refreshed_for_every_kind_of_request(
    front: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A credential process returns new keys, about to expire, each time; every operation must use new ones."""
    script = tmp_path / "renew.py"
    script.write_text(
        "import json, pathlib, sys\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "number = int(count.read_text()) + 1 if count.exists() else 1\n"
        "count.write_text(str(number))\n"
        f"expiry = {(datetime.now(UTC) + timedelta(seconds=60)).isoformat()!r}\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'KEY{number}', 'SecretAccessKey': 'word',"
        " 'SessionToken': 'x', 'Expiration': expiry}))\n"
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in KEYS:
        monkeypatch.delenv(name)
    storage.write_text("s3://xrays/a.txt", "a")
    _, files = storage.ray_storage("s3://xrays")
    for operation in (
        lambda: list(storage.list_files("s3://xrays")),
        lambda: storage.read_text("s3://xrays/a.txt"),
        lambda: storage.write_text("s3://xrays/a.txt", "b"),
        lambda: files.get_file_info("xrays/a.txt"),
    ):
        before = signers(front)
        operation()
        assert signers(front) - before, "the old key is still in use"


def test_expired_credentials_are_reloaded_from_the_credentials_file(
    front: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_in(key: str) -> None:
        lines = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = word\naws_session_token = x\n"
        (tmp_path / "credentials").write_text(lines)

    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    log_in("MORNING")
    use_everything()
    front.expired, front.seen[:] = {"MORNING"}, []
    with pytest.raises(
        StorageError, match=r"reports expired credentials: renew the credentials found by shared-cred"
    ):
        storage.write_text("s3://xrays/a.txt", "a")
    log_in("NOON")
    use_everything()
    assert [seen.signer for seen in front.seen][-1] == "NOON"


def test_invalid_settings_give_one_line_messages(
    front: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(uri: str = "s3://xrays/a") -> str:
        messages = set()
        for operation in (
            storage.read_bytes,
            storage.exists,
            storage.check_writable,
            lambda uri: [*storage.list_files(uri)],
        ):
            with pytest.raises(StorageError) as caught:
                operation(uri)
            messages.add(str(caught.value))
        assert not any("\n" in text for text in messages)
        return messages.pop()

    assert "correct the URI or the AWS settings" in message("s3://not a bucket/a")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "AWS_CA_BUNDLE=" in message()
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "The config profile (nobody) could not be found" in message()


# ---- Public and requester-pays buckets


def test_only_anonymous_buckets_are_read_without_a_signature(front: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3.client("s3").create_bucket(Bucket="public")
    for bucket in ("public", "xrays"):
        boto3.client("s3").put_object(Bucket=bucket, Key="a.txt", Body=b"a", ACL="public-read")
    front.seen.clear()
    monkeypatch.setenv("CXR_ANONYMOUS_BUCKETS", "public,other")
    assert [entry.path for entry in storage.list_files("s3://public")] == ["a.txt"]
    assert storage.read_text("s3://public/a.txt") == "a"
    assert {seen.signer for seen in front.seen} == {""}
    assert storage.read_text("s3://xrays/a.txt") == "a"
    assert front.seen[-1].signer == "key"
    monkeypatch.setenv("CXR_ANONYMOUS_BUCKETS", "*")
    for name in KEYS:
        monkeypatch.delenv(name)
    assert storage.read_text("s3://xrays/a.txt") == "a"
    assert front.seen[-1].signer == ""
    front.refused = {"/xrays": "AccessDenied"}
    with pytest.raises(StorageError, match="the bucket is not public, so omit --anonymous"):
        storage.read_text("s3://xrays/a.txt")


def test_requests_accept_requester_pays_charges(front: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    use_everything()
    assert {seen.payer for seen in front.seen} == {""}
    front.seen.clear()
    monkeypatch.setenv("CXR_REQUESTER_PAYS", "1")
    use_everything()
    assert {seen.payer for seen in front.seen} == {"requester"}


# ---- Endpoints, proxies and certificates


def test_every_request_goes_through_the_proxy(front: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", front.url)
    use_everything()
    assert {seen.method for seen in front.seen} == {"GET", "HEAD", "PUT", "DELETE"}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("CXR_STORAGE_PATIENCE_S", "0")
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9 keeps failing"):
        storage.read_bytes("s3://xrays/a.txt")


def test_endpoint_of_a_profile_is_used(front: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(f"[default]\nendpoint_url = {front.url}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    use_everything()
    assert front.seen


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for localhost: its file, and the server's SSL context."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, LOOPBACK)]),
    )
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .issuer_name(name)
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(1))
        .not_valid_after(now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(secret)
    (folder / "ca.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return folder / "ca.pem", context


def test_custom_ca_bundle_is_trusted_by_every_operation(
    front: Faulty, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, context = certificate(tmp_path)
    with faulty.before(backend, context) as secure:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, secure.url.replace(LOOPBACK, "localhost"))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        use_everything()
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(StorageError, match="presented an untrusted certificate: set AWS_CA_BUNDLE"):
            storage.read_bytes("s3://xrays/a.txt")


# ---- Keys with empty folder names


def test_keys_and_prefixes_with_two_slashes_are_read(front: Faulty, tmp_path: Path) -> None:
    keys = ["nih//a.png", "nih/b.png", "nih/c//d/e.png", "/nih/f.png"]
    for key in keys:
        storage.s3.client("xrays").put_object(Bucket="xrays", Key=key, Body=key.encode())
    listed = {entry.uri: entry.path for entry in storage.list_files("s3://xrays/nih")}
    assert listed == {"s3://xrays/nih//a.png": "/a.png", "s3://xrays/nih/b.png": "b.png"} | {
        "s3://xrays/nih/c//d/e.png": "c//d/e.png"
    }
    assert [storage.read_text(uri) for uri in sorted(listed)] == keys[:3]
    assert [entry.uri for entry in storage.list_files("s3://xrays//nih")] == ["s3://xrays//nih/f.png"]
    with pytest.raises(storage.NotFoundError, match=r"s3://xrays//nih/b\.png does not exist"):
        storage.read_text("s3://xrays//nih/b.png")


def test_unsupported_uris_with_two_slashes_are_rejected(front: Faulty) -> None:
    for operation in (storage.check_writable, storage.ray_storage):
        with pytest.raises(StorageError, match=r"s3://xrays/a//b has an empty folder name \(//\): remove it"):
            operation("s3://xrays/a//b")
    with pytest.raises(StorageError, match=r"an empty folder name \(//\), which is not supported on gs://"):
        storage.read_bytes("gs://xrays/a//b")
    with pytest.raises(StorageError, match="NUL character"):
        storage.read_bytes("/tmp/a\0b")
    assert json.dumps([seen.path for seen in front.seen]) == "[]"
