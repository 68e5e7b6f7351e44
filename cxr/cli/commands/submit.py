"""Run a cxr command on a Ray cluster: submit it, show its output, and exit with its exit code.

The cluster is the one at RAY_API_SERVER_ADDRESS, or the one to which `ray dashboard` has opened a tunnel. If the
connection drops, the output continues where it stopped. Ctrl-C stops the output, not the job.

cxr submit -- train classify --archive s3://xrays/nih --out s3://xrays/classify --workers 8
cxr submit --working-dir . -- tune align --archive s3://xrays/nih --out s3://xrays/tune  # the code of this folder
cxr submit --follow train-classify-1a2b3c
"""

from __future__ import annotations

import secrets
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import tyro
import yaml

from cxr.errors import ClusterError, UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the submission."""

    HINT: ClassVar[str] = "The command to run follows after --, as in `cxr submit -- score --help`."

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """The command to run on the cluster, without `cxr`, after `--`."""
    address: str = ""
    """Address of the cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, or else http://127.0.0.1:8265."""
    wait: bool = True
    """Show the job's output until it ends, and exit with its exit code."""
    working_dir: str = ""
    """Folder with the code of cxr to run. Default: the version that is installed on the cluster."""
    runtime_env: str = ""
    """YAML file with Ray's runtime environment for the job, such as cluster/runtime_env.yaml."""
    env: tuple[str, ...] = ()
    """Environment variables of the job, as NAME=VALUE."""
    follow: str = ""
    """Id of a submitted job whose output to show, from the beginning."""
    stop: str = ""
    """Id of a submitted job to stop. The job saves finished work and exits."""

    def __post_init__(self) -> None:
        given = [name for name in ("follow", "stop") if getattr(self, name)]
        if len(given) + bool(self.command) > 1:
            raise UserError("expected a command after --, --follow or --stop, got several: use one of them")
        for each in self.env:
            if not each.partition("=")[0].isidentifier() or "=" not in each:
                raise UserError(
                    f"expected NAME=VALUE after --env, got {each!r}: separate the name and the value by ="
                )


def main(options: Options) -> tuple[dict[str, Any], str]:
    from cxr.cli.main import find
    from cxr.runtime.submission import connect

    if not (options.command or options.follow or options.stop):
        raise UserError("expected a command after --, such as `cxr submit -- score --help`, got none")
    if options.command:
        find(options.command)  # raises
    environment = _runtime_environment(options)
    client = connect(options.address)
    if options.stop:
        _answer(client.stop_job, options.stop)
        return {"job": options.stop}, f"{options.stop} is being stopped; submit the same command again to continue"
    if options.follow:
        _follow(client, options.follow)
    name = "-".join([*_words(options.command), secrets.token_hex(3)])
    entrypoint = shlex.join(["cxr", *options.command])
    _answer(client.submit_job, entrypoint=entrypoint, submission_id=name, runtime_env=environment)
    text = f"submitted {name}\n{_how_to(name)}"
    if not options.wait:
        return {"job": name}, text
    print(text, flush=True)
    _follow(client, name)


def _words(command: tuple[str, ...]) -> list[str]:
    """The words of a command line that name the command."""
    from cxr.cli.main import find

    return find(command)[0].name.split()


def _how_to(name: str) -> str:
    return (
        f"to show its output: cxr submit --follow {name}\n"
        f"to stop it: cxr submit --stop {name}\n"
        f"to continue it after it was stopped or failed: submit the same command again (train and tune: with "
        f"--resume, if training had started)"
    )


def _runtime_environment(options: Options) -> dict[str, Any]:
    environment: dict[str, Any] = {}
    if options.runtime_env:
        try:
            environment = yaml.safe_load(Path(options.runtime_env).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"expected a YAML file at --runtime-env {options.runtime_env}, got: {error}") from error
        if not isinstance(environment, dict):
            raise UserError(
                f"expected names and values in {options.runtime_env}, got {environment!r}: write lines such as "
                f"env_vars: {{NAME: VALUE}}"
            )
    if options.working_dir:
        environment["working_dir"] = options.working_dir
    if options.env:
        variables = dict(each.split("=", 1) for each in options.env)
        environment["env_vars"] = environment.get("env_vars", {}) | variables
    return environment


def _answer(request: Any, *arguments: Any, **options: Any) -> Any:
    """The cluster's answer to a request; a request that it rejects is a mistake of the user."""
    try:
        return request(*arguments, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the cluster did not accept the request: {error}") from error


def _follow(client: Any, name: str) -> NoReturn:
    """Show the job's output until it ends, and exit as it did."""
    from cxr.runtime.submission import Follower, exit_code

    try:
        info = Follower(client, name, _write).follow()
    except KeyboardInterrupt:
        print(f"\n{name} continues on the cluster\n{_how_to(name)}", file=sys.stderr, flush=True)
        sys.exit(130)
    except ClusterError as error:
        print(f"error: {error}. {name} may still be running\n{_how_to(name)}", file=sys.stderr, flush=True)
        sys.exit(1)
    if info.driver_exit_code is None and info.message:  # its command did not run to its end
        print(f"{name}: {info.message}", file=sys.stderr, flush=True)
    sys.exit(exit_code(info))


def _write(text: str) -> None:
    print(text, end="", flush=True)
