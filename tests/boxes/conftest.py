"""ensemble-boxes without Numba's compiler: its results are the same, and compiling takes longer than all tests."""

from __future__ import annotations

import os

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
