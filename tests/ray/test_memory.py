"""Bytes that Ray's object store reports as spilled."""

from __future__ import annotations

import pytest

from cxr.runtime import ray_private

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_spilled_bytes_are_counted() -> None:
    assert ray_private.spilled_bytes() == 0
