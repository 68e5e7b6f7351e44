"""Disable Numba's compiler for ensemble-boxes: results are equal, and compiling takes longer than all tests."""

from __future__ import annotations

import os

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
