"""Output of a job and its workers: text for people, or JSON for programs.

Code calls `say`, `note` and `event`, on whatever machine it runs. In a worker they print a marked line, which Ray
brings to the job; the job shows it in the form that its command line asked for. All else that workers print, and all
that Ray and its C++ libraries write to the job's standard error, goes to a log file that is named once.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NoReturn, cast

Form = Literal["text", "quiet", "json"]
MARK = "::cxr::"  # prefix of our lines among a worker's lines
LOG = "ray.log"  # in OUT
MISUSED = 2  # exit code
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def say(text: str) -> None:
    """Show a line of text."""
    event("message", text)


def note(text: str) -> None:
    """Show information on which the user need not act."""
    event("note", f"note: {text}")


def event(kind: str, text: str, *, shown: bool = True, **values: Any) -> None:
    """Show an event, as `text` or as a JSON object of `event`, `text` and `values`.

    Args:
        shown: False for events that only programs read.
    """
    record = {"event": kind, "text": text, **values}
    if _in_worker():
        print(MARK + json.dumps({**finite(record), "shown": shown}), flush=True)
    else:
        _console.show(record, shown)


def show_worker_lines(batch: dict[str, Any]) -> None:
    """Show the events among the lines of one worker; the log gets the others. The format is Ray's log batch."""
    for line in batch["lines"]:
        _, mark, record = line.partition(MARK)
        if mark:
            values = json.loads(_COLORS.sub("", record))
            _console.show(values, values.pop("shown"))
        else:
            name = batch.get("actor_name") or batch.get("task_name") or "process"
            _console.write_log(f"({name} {batch.get('pid')} on {batch.get('ip', 'this cluster')}) {line}\n")


def finite(value: Any) -> Any:
    """The same, with null for each number that JSON cannot represent."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_worker() -> bool:
    """Whether Ray started this process for its tasks or actors."""
    if "ray" not in sys.modules:
        return False
    from cxr.runtime import ray_private

    return ray_private.is_worker_process()


class Console:
    """The standard output and error of a job, and its log."""

    def __init__(self, form: Form = "text", out: str = "", stdout: IO[str] | None = None) -> None:
        self.form: Form = form
        self._out = out
        self._given_stdout = stdout
        self._lock = threading.RLock()
        self._ended = False
        self._log: IO[bytes] | None = None
        self._errors: IO[str] | None = None  # the terminal, once descriptor 2 leads to the log
        self._bar: Any = None

    # ---- Output

    def show(self, record: dict[str, Any], shown: bool = True) -> None:
        """Print an event; after the job's result nothing is printed any more, so that it stays the last line."""
        with self._lock:
            if self._ended or self.form == "quiet":
                return
            if self.form == "json":
                print(json.dumps(finite(record)), file=self._stdout, flush=True)
            elif shown:
                self._clear_live_line()
                print(record["text"], file=self._stdout, flush=True)

    def show_result(self, path: str, result: Mapping[str, Any]) -> None:
        """Print the job's last line: the path of its result.json, or the result itself as JSON."""
        with self._lock:
            self.show({"event": "result", "path": path, **result}, shown=False)
            self._ended = True
            if self.form != "json":
                self._clear_live_line()
                print(path, file=self._stdout, flush=True)

    def show_error(self, text: str, exit_code: int) -> None:
        """Print an error to standard error; with --json, also as an event."""
        with self._lock:
            if self.form == "json":
                self.show({"event": "error", "text": text, "exit_code": exit_code})
            self._ended = True
            self._clear_live_line()
            print(text, file=self._errors or sys.stderr, flush=True)

    @property
    def _stdout(self) -> IO[str]:
        return self._given_stdout or sys.stdout

    # ---- The live line

    def show_live_line(self, what: str, done: int, total: int, unit: str, rejects: int = 0) -> bool:
        """Show on a terminal how much of the work is done; False where there is none, and where it is not shown."""
        terminal = self._errors or sys.stderr
        with self._lock:
            if self.form != "text" or self._ended or not terminal.isatty():
                return False
            if self._bar is None or self._bar.desc != f"{what}: ":
                from tqdm import tqdm  # only terminals need it

                self._clear_live_line()
                self._bar = tqdm(
                    desc=what,
                    total=total,
                    initial=done,
                    unit=f" {unit}",
                    file=terminal,
                    dynamic_ncols=True,
                    leave=False,
                )
            if rejects:
                self._bar.set_postfix({"rejected": rejects}, refresh=False)
            self._bar.update(done - self._bar.n)
            return True

    def _clear_live_line(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # ---- The log

    def divert_ray(self) -> None:
        """Send what Ray, its C++ libraries and Python's warnings write to standard error to a log file, and name it.

        Errors of the job itself still reach the terminal, through `show_error`. Without a job nothing changes.
        """
        if self._log is not None or not self._out:  # only a job's streams are its own to divert
            return
        path = self._log_path()
        self._log = path.open("ab", buffering=0)
        sys.stderr.flush()
        self._errors = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(self._log.fileno(), 2)
        sys.excepthook = self._show_uncaught
        event("log", f"Ray's own messages are in {path}", path=str(path))

    def _log_path(self) -> Path:
        from cxr import storage  # imports pyarrow, for which a mistyped command does not wait

        if self._out and storage.is_local(self._out):
            folder = Path(storage.normalize(self._out).removeprefix("file://"))
            folder.mkdir(parents=True, exist_ok=True)
            return folder / LOG
        descriptor, path = tempfile.mkstemp(prefix="cxr-ray-", suffix=".log")
        os.close(descriptor)
        return Path(path)

    def write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(text.encode(errors="backslashreplace"))

    @contextmanager
    def hidden_stdout(self) -> Iterator[None]:
        """Within the block, what libraries print goes to the log; events are shown as ever."""
        self._given_stdout, before = self._given_stdout or sys.stdout, self._given_stdout
        try:
            with redirect_stdout(cast(IO[str], _Lines(self.write_log))):
                yield
        finally:
            self._given_stdout = before

    def write_error_now(self, text: str) -> None:
        """Write to the terminal at once, not through a stream that an interrupted thread may be using."""
        os.write(self._errors.fileno() if self._errors else 2, text.encode())

    def _show_uncaught(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        self.show_error("".join(traceback.format_exception(kind, error, where)).rstrip(), 1)


class _Lines(io.TextIOBase):
    """A stream that calls `show` with each line, its end included, that is written to it."""

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show, self._partial = show, ""

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in filter(str.strip, lines):
            self._show(f"{line}\n")
        return len(text)


_console = Console()


def start(form: Form, out: str) -> Console:
    """The console of this process's job, in the form that its command line asks for.

    Where it is not text, lines that are printed without `say` become events as well.

    Args:
        out: folder of the results; the log lies there if it is on this machine.
    """
    global _console
    _console = Console(form, out, sys.stdout)
    if form != "text":
        sys.stdout = _Lines(lambda line: event("note" if line.startswith("note: ") else "message", line.rstrip()))
    return _console


def current() -> Console:
    return _console


def reject(mistake: object, arguments: Sequence[str]) -> NoReturn:
    """Print a mistake on a command line, as JSON, too, if the command line asks for it, and exit with 2."""
    Console("json" if wants_json(arguments) else "text").show_error(f"error: {mistake}", MISUSED)
    sys.exit(MISUSED)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line that has not been parsed has the option `--json`."""
    return "--json" in itertools.takewhile(lambda word: word != "--", arguments)
