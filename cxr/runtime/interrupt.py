"""What SIGINT (Ctrl-C) and SIGTERM do to a job: it says so, tidies up for some seconds, and ends with 128 + signal.

Python runs its own signal handlers in the main thread, between two steps of Python code. A main thread that waits
inside Ray's C++ may not get there for a long time, so a second thread hears of the signal as well, from the
descriptor to which Python writes at once, and ends the process when its time is up.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
from typing import NoReturn

from cxr.runtime.console import current

GRACE_S = 8.0  # for stopping Ray and for what else stands in `finally`; `ray job stop` kills after 3 s


class Interruption:
    """Handles SIGINT and SIGTERM from now on. The first one raises KeyboardInterrupt in the main thread, once.

    Attributes:
        number: of the signal that came, or 0.
    """

    def __init__(self, message: str) -> None:
        self.number = 0
        self._raised = False
        self._message = f"{message}\n"
        self._to_say = threading.Lock()
        self._signals, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):  # a script's background processes begin with SIGINT ignored
            signal.signal(number, self._interrupt)
        threading.Thread(target=self._watch, name="interruption", daemon=True).start()

    def end(self) -> NoReturn:
        """Stop Ray and whatever else is registered for the end, then end, without tearing down Ray's C++ threads."""
        self._say()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(128 + self.number)

    def _interrupt(self, number: int, _: object) -> None:
        self.number = self.number or number
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first = self._next()
        self.number = self.number or first
        self._say()
        self._next(timeout_s=GRACE_S)
        os._exit(128 + first)

    def _next(self, timeout_s: float | None = None) -> int:
        """The number of the next SIGINT or SIGTERM, or 0 if none came in time."""
        while select.select([self._signals], [], [], timeout_s)[0]:
            if (number := os.read(self._signals, 1)[0]) in (signal.SIGINT, signal.SIGTERM):
                return number
        return 0

    def _say(self) -> None:
        """Say it once; not through a stream of Python's, which the interrupted thread may be using."""
        if self._to_say.acquire(blocking=False):
            current().write_error_now(self._message)
