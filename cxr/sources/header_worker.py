"""The child process of `cxr.sources.header_scan`: `python -m cxr.sources.header_worker`."""

from __future__ import annotations

import signal

from cxr.sources.header_scan import serve

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends this
    serve()
