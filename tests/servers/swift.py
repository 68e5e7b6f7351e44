"""An S3 server with enforced signatures for system tests: OpenStack Swift in one folder, on loopback ports.

    make .venv-swift
    python -m tests.servers.swift --folder /tmp/swift --bucket cxr

serves until Ctrl-C or SIGTERM and prints `export AWS_…` lines for the shell that is to use it. The data stay
in the folder: a server started there again finds them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

VENV = Path(os.environ.get("CXR_SWIFT_VENV", Path(__file__).parents[2] / ".venv-swift"))
ACCESS_KEY, SECRET_KEY, REGION = "test:tester", "testing", "us-east-1"
STORES = ("account", "container", "object")

SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = cxr
swift_hash_path_suffix = tests
[storage-policy:0]
name = only
default = yes
"""
# workers = 0: no forks, so that each server is a single process to stop. No log address: no syslog.
DEFAULTS = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
workers = 0
log_address = /nonexistent
"""
STORE_CONF = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
PROXY_CONF = """
[pipeline:main]
pipeline = catch_errors proxy-logging listing_formats s3api tempauth copy slo dlo versioned_writes symlink \
proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
"""
PLAIN_FILTERS = ["catch_errors", "listing_formats", "copy", "slo", "dlo", "versioned_writes", "symlink"]


@contextlib.contextmanager
def swift(folder: Path, venv: Path = VENV, port: int = 0) -> Iterator[dict[str, str]]:
    """Serve the contents of `folder`; yields the environment variables with which S3 clients find the server.

    `port` 0 uses any free port.

    Raises:
        FileNotFoundError: `venv` holds no Swift.
        RuntimeError: a server ended, or none answered in a minute; the message ends with the log.
    """
    if not (venv / "bin" / "swift-proxy-server").exists():
        raise FileNotFoundError(f"no Swift in {venv}: `make .venv-swift` installs it")
    folder = folder.resolve()
    ports: dict[str, int] = dict(zip(STORES, _free_ports(len(STORES)), strict=True))
    ports["proxy"] = port or _free_ports(1)[0]
    _configure(folder, venv, ports)
    log = folder / "swift.log"
    servers: list[subprocess.Popen[bytes]] = []
    try:
        with log.open("wb") as output:
            for name in ports:
                command = [venv / "bin" / f"swift-{name}-server", folder / f"{name}.conf", "--verbose"]
                servers.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
        variables = _variables(ports["proxy"])
        _wait(variables, servers, log)
        yield variables
    finally:
        _stop(servers)


def client(variables: dict[str, str], attempts: int = 1):
    """A boto3 client that ignores the caller's own AWS settings."""
    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
        config=Config(connect_timeout=2, read_timeout=30, retries={"max_attempts": attempts}),
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server_socket in sockets:
            server_socket.bind(("127.0.0.1", 0))
        return [server_socket.getsockname()[1] for server_socket in sockets]


def _configure(folder: Path, venv: Path, ports: dict[str, int]) -> None:
    """Write configuration and rings for this run's ports; the data under `devices/` stay as they are."""
    (folder / "devices" / "d1").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text(SWIFT_CONF)
    filters = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in PLAIN_FILTERS)
    filters += "[filter:proxy-logging]\nuse = egg:swift#proxy_logging\n"
    for name, port in ports.items():
        defaults = DEFAULTS.format(port=port, folder=folder)
        body = PROXY_CONF + filters if name == "proxy" else STORE_CONF.format(name=name)
        (folder / f"{name}.conf").write_text(defaults + body)
    for name in STORES:
        builder = folder / f"{name}.builder"
        builder.unlink(missing_ok=True)
        for arguments in (
            ["create", "6", "1", "0"],
            ["add", f"r1z1-127.0.0.1:{ports[name]}/d1", "1"],
            ["rebalance", "--seed", "0"],
        ):
            tool = venv / "bin" / "swift-ring-builder"
            subprocess.run([tool, builder, *arguments], check=True, capture_output=True)
    shutil.rmtree(folder / "backups", ignore_errors=True)


def _variables(port: int) -> dict[str, str]:
    url = f"http://127.0.0.1:{port}"
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
    }


def _wait(variables: dict[str, str], servers: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(server.poll() is None for server in servers):
        with contextlib.suppress(BotoCoreError, ClientError):
            client(variables).list_buckets()
            return
        time.sleep(0.2)
    raise RuntimeError(f"Swift did not come up:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(servers: Sequence[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        server.terminate()
    for server in servers:
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", type=Path, required=True, help="Folder of data and log, created if missing.")
    parser.add_argument("--bucket", action="append", default=[], help="Bucket to create if missing. May be repeated.")
    parser.add_argument("--port", type=int, default=0, help="Port of the S3 endpoint. Default: any free port.")
    parser.add_argument("--venv", type=Path, default=VENV, help="Virtual environment in which Swift is installed.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        contextlib.suppress(KeyboardInterrupt),
        swift(options.folder, options.venv, options.port) as variables,
    ):
        for bucket in options.bucket:
            client(variables, attempts=8).create_bucket(Bucket=bucket)  # a server just started may say 503
        for name, value in variables.items():
            print(f"export {name}={value}")
        print(
            f"# process {os.getpid()} serves {options.folder}; Ctrl-C or kill {os.getpid()} stops it",
            flush=True,
        )
        signal.pause()


if __name__ == "__main__":
    main()
