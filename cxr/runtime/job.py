"""How every job starts and ends: options, result.json, exit codes."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    NoReturn,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import docstring_parser
import tyro

from cxr import storage
from cxr.errors import ClusterError, UserError
from cxr.runtime import console, lease, provenance
from cxr.runtime.interrupt import Interruption

_APPENDS = set(get_args(tyro.conf.UseAppendAction[int])[1:])  # how tyro marks an option that can be repeated
_NO_VALUE = ("None", "''", "")  # how tyro shows defaults without a value
_FRAME = "╭╮╰╯─│+| "  # of the boxes that tyro draws around its messages
DONE, FAILED, MISUSED = 0, 1, console.MISUSED


class HasOut(Protocol):
    @property
    def out(self) -> str: ...


@runtime_checkable
class HasStartingPoint(Protocol):
    """Options whose defaults depend on arguments, such as `--preset`."""

    def starting_point(self, arguments: Sequence[str]) -> Any: ...

    def presets_help(self) -> str: ...


@runtime_checkable
class HasHint(Protocol):
    """Options with a sentence that follows what the parser says of a mistake."""

    HINT: ClassVar[str]


Options = TypeVar("Options", bound=HasOut)


@dataclass(frozen=True, kw_only=True)
class BucketOptions:
    """Access to buckets, in addition to the standard variables (AWS_PROFILE, AWS_ENDPOINT_URL, …)."""

    anonymous: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[BUCKET ...]")] = None
    """Read these S3 and Google Cloud buckets without credentials, or all buckets if none is named."""
    requester_pays: bool = False
    """Agree to pay for requests to requester-pays S3 buckets."""

    def apply(self) -> None:
        """Set the variables that storage reads, here and in the workers of a cluster that comes later."""
        if self.anonymous is not None:
            names = (re.sub(r"^\w+://|/.*", "", name) for name in self.anonymous)  # a bucket's URI names it, too
            os.environ[storage.ANONYMOUS] = ",".join(names) or "*"
        if self.requester_pays:
            os.environ[storage.REQUESTER_PAYS] = "1"


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the job prints."""

    quiet: bool = False
    """Print only the path of the result, or the error."""
    json: bool = False
    """Print one JSON object per line: progress, notes, and finally the result or the error."""

    def __post_init__(self) -> None:
        if self.quiet and self.json:
            raise UserError("expected --quiet or --json, got both: use one of them")

    @property
    def form(self) -> console.Form:
        return "quiet" if self.quiet else "json" if self.json else "text"


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Options]):
    """A command line: the options of the job, and those of every job."""

    job: Annotated[Options, tyro.conf.arg(name="")]
    buckets: BucketOptions = field(default_factory=BucketOptions)
    output: OutputOptions = field(default_factory=OutputOptions)


def parse(
    options: type[Options] | Options, arguments: Sequence[str], description: str = "", program: str | None = None
) -> Command[Options]:
    """Parse a job's command line; exits with 2 if it is wrong.

    Args:
        options: the class of the job's options, or an instance with the job's defaults.
        program: what the help calls the program. Default: the name of the script.
    """
    options_type: Any = options if isinstance(options, type) else type(options)
    defaults: Any = {} if isinstance(options, type) else {"default": Command(job=options)}
    _check_given_once(arguments, options_type)
    if defaults and isinstance(options, HasStartingPoint):
        description = f"{description.rstrip()}\n\n{options.presets_help()}\n"
        try:
            defaults = {"default": Command(job=options.starting_point(arguments))}
        except UserError as mistake:
            console.reject(mistake, arguments)
    if defaults and {"-h", "--help"} & {*arguments}:
        _write_help(defaults["default"])
    refusal = io.StringIO()
    try:
        with redirect_stderr(refusal):
            command = tyro.cli(
                cast(Any, Command)[options_type],
                prog=program,
                args=arguments,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                **defaults,
            )
    except (UserError, SystemExit) as end:
        if mistake := _mistake_in(end):
            console.reject(re.sub(r"^([a-z]\w*)(?=: expected)", _option, str(mistake)), arguments)
        if refused := refusal.getvalue():  # nothing after `--help`
            hint = options.HINT if isinstance(options, HasHint) and "--" not in arguments else ""
            _show_refusal(refused + hint, arguments)
        raise
    print(refusal.getvalue(), end="", file=sys.stderr)  # warnings
    return command


def _mistake_in(error: BaseException | None) -> UserError | None:
    """The UserError of a check in the `__post_init__` of options, for which tyro exits if the options are nested."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


def _show_refusal(text: str, arguments: Sequence[str]) -> None:
    """Print what tyro says of a command line, as one line without its frame if the command line asks for JSON."""
    if console.wants_json(arguments):
        _title, *lines = (line.strip(_FRAME) for line in text.splitlines())
        console.reject(" ".join(line for line in lines if line.strip("-")), arguments)
    print(text.rstrip(), file=sys.stderr, flush=True)


def _option(setting: re.Match[str]) -> str:
    return f"--{setting[0].replace('_', '-')}"


def _write_help(options: Any) -> None:
    """Make the help of each option one paragraph, which ends in its default unless the text says what that means.

    tyro keeps the line breaks of docstrings that are indented, and shows defaults such as None.
    """
    texts = {
        text.arg_name: " ".join((text.description or "").split())
        for base in reversed(type(options).__mro__[:-1])
        for text in docstring_parser.parse_from_object(base).params
    }
    hints = get_type_hints(type(options), include_extras=True)
    for option in dataclasses.fields(options):
        if dataclasses.is_dataclass(nested := getattr(options, option.name)):
            _write_help(nested)
        elif text := texts.get(option.name):
            option.metadata = MappingProxyType({**option.metadata, "help": text})
            if not _is_repeatable(hints[option.name]):
                shown = tyro.conf.arg(
                    help_behavior_hint=partial(_default_text, text), metavar=_metavar(hints[option.name])
                )
                type(options).__annotations__[option.name] = Annotated[hints[option.name], shown]


def _metavar(hint: Any) -> str | None:
    """INT for `int | None`, which tyro shows as {None}|INT; None for what tyro shows well."""
    return next((kind.__name__.upper() for kind in (int, float, str) if hint == kind | None), None)


def _default_text(text: str, default: str) -> str:
    """What follows the help of an option; `default` is in the form of the command line."""
    return "" if default in _NO_VALUE or "Default:" in text else f"(default: {default})"


def run_job(main: Callable[[Options], dict[str, Any]], options_type: type[Options]) -> None:
    """Parse the command line of a script and run `main`; see `run`."""
    command = parse(options_type, sys.argv[1:], sys.modules["__main__"].__doc__ or "")
    run(main, command, Path(sys.argv[0]).stem)


def run(main: Callable[[Options], dict[str, Any]], command: Command[Options], name: str) -> NoReturn:
    """Run `main`, write OUT/result.json, print its path last, exit.

    Exits with 0 when done, 2 on a mistake in the options or the input (only its message is printed), 130 after
    SIGINT, 143 after SIGTERM, and 1 on any other failure (with a traceback, unless it was the cluster's).

    Args:
        name: the job's name in result.json.
    """
    command.buckets.apply()
    shown = console.start(command.output.form, command.job.out)
    interruption = Interruption(f"interrupted{_how_to_continue(command.job)}")
    try:
        code, error = _outcome(main, command.job, name)
    finally:
        if interruption.number:
            interruption.end()  # do not report the errors that it made Ray raise
    if error:
        shown.show_error(error, code)
    sys.exit(code)


def show(main: Callable[[Any], tuple[dict[str, Any], str]], command: Command[Any]) -> NoReturn:
    """Print what `main` returns, as JSON or as text, and exit as `run` does."""
    command.buckets.apply()
    form = command.output.form
    try:
        content, text = main(command.job)
    except (UserError, ClusterError) as error:
        code = MISUSED if isinstance(error, UserError) else FAILED
        console.Console(form).show_error(f"error: {error}", code)
        sys.exit(code)
    print(json.dumps(console.finite(content)) if form == "json" else text, flush=True)
    sys.exit(DONE)


def _how_to_continue(options: object) -> str:
    resume = ", with --resume if training had started" if hasattr(options, "resume") else ""
    return f"; run the same command again to continue{resume}"


def _check_given_once(arguments: Sequence[str], options_type: type) -> None:
    """Exit where an option that takes one value is given several times: the parser would use the last one alone."""
    options = itertools.takewhile(lambda word: word != "--", arguments)
    names = [word.partition("=")[0].replace("_", "-") for word in options if word.startswith("--")]
    repeated = {f"--{name.replace('_', '-')}" for name in _repeatable(options_type)}
    for name, count in Counter(names).items():
        if count > 1 and name not in repeated:
            console.reject(f"expected one {name}, got {count}: use it once", arguments)


def _repeatable(options_type: type) -> Iterator[str]:
    """Names of the fields, nested ones included, of which every occurrence on the command line counts."""
    for name, hint in get_type_hints(options_type, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _repeatable(cast(type, hint))
        elif _is_repeatable(hint):
            yield name


def _is_repeatable(hint: Any) -> bool:
    return get_origin(hint) is Annotated and set(hint.__metadata__) >= _APPENDS


def _outcome(main: Callable[[Options], dict[str, Any]], options: Options, name: str) -> tuple[int, str]:
    """Run `main`; the exit code, and what there is to say of an error."""
    start = time.monotonic()
    try:
        _check_out(options.out)
        with lease.held(options.out):
            path, result = write_result(name, options, main(options), time.monotonic() - start)
            console.current().show_result(path, result)
        return DONE, ""
    except UserError as mistake:
        return MISUSED, f"error: {mistake}"
    except ClusterError as failure:
        return FAILED, f"error: {failure}"
    except Exception as error:
        if type(error).__name__ == "LocalRayletDiedError":  # by name, since importing Ray takes seconds
            return FAILED, (
                f"error: Ray's node process on this machine died, most likely because the machine was overloaded or "
                f"short of memory. Finished work is saved{_how_to_continue(options)}"
            )
        return FAILED, traceback.format_exc().rstrip()


def _check_out(out: str) -> None:
    """Check that OUT can be written before anything starts, so that a job does not fail after hours."""
    if "working_dir_files" in storage.normalize(out).split("/"):
        console.note(
            f"--out {out} is inside the submitted job's copy of the working directory, which Ray deletes at the end: "
            f"use an absolute path or a URI to keep the results"
        )
    storage.check_writable(out)


def write_result(name: str, options: Any, result: dict[str, Any], seconds: float) -> tuple[str, dict[str, Any]]:
    """Write OUT/result.json: the job's name, its settings, versions, duration and what it returned.

    Returns:
        The file's URI and content.
    """
    uri = storage.join(storage.normalize(options.out), "result.json")
    head = {
        "job": name,
        "settings": dataclasses.asdict(options),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "seconds": round(seconds, 1),
    }
    content = console.finite(head | result)
    storage.write_json(uri, content)
    return uri, content
