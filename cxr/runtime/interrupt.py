"""SIGINT (Ctrl-C) and SIGTERM: the job prints a message, cleans up for a few seconds, and exits with 128 + signal.

Python runs signal handlers in the main thread, between two bytecode instructions. A main thread that waits inside
Ray's C++ may not reach the next one for a long time. So a second thread also receives the signal, through the wakeup
file descriptor, to which Python writes at once, and ends the process when the time for cleaning up is over.
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

GRACE_S = 8.0  # for stopping Ray and for `finally` blocks; `ray job stop` kills after 3 s


class Interruption:
    """Handles SIGINT and SIGTERM from now on. The first one raises KeyboardInterrupt in the main thread, once.

    Attributes:
        number: number of the signal that was received, or 0.
    """

    def __init__(self, message: str) -> None:
        self.number = 0
        self._raised = False
        self._message = f"{message}\n"
        self._to_say = threading.Lock()
        self._signals, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):  # background processes of a script start with SIGINT ignored
            signal.signal(number, self._interrupt)
        threading.Thread(target=self._watch, name="interruption", daemon=True).start()

    def end(self) -> NoReturn:
        """Run the registered exit functions, which stop Ray, and exit without tearing down Ray's C++ threads."""
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
        """Print the message once; not through a Python stream, which the interrupted thread may be using."""
        if self._to_say.acquire(blocking=False):
            current().write_error_now(self._message)
