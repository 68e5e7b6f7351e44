"""The time of a device: of all blocks, once, and on a GPU without waiting for it."""

from __future__ import annotations

import time

import pytest
import torch

from cxr.data.device_time import DeviceTime
from tests.fake_cuda import DEVICE, FakeCuda


@pytest.mark.parametrize("device", [torch.device("cpu"), DEVICE])
def test_blocks_are_counted_once(device: torch.device) -> None:
    with FakeCuda() as cuda:
        timed = DeviceTime(device)
        for _ in range(2):
            with timed.measured():
                time.sleep(0.05)
        time.sleep(0.05)
        assert 0.1 <= timed.taken() < 0.15 + 0.5
        assert timed.taken() == 0
        assert cuda.syncs == []


def test_blocks_that_a_gpu_has_not_ended_are_counted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda():
        timed, ended = DeviceTime(DEVICE), [False]
        monkeypatch.setattr(torch.cuda.Event, "query", lambda event: ended[0])
        with timed.measured():
            time.sleep(0.02)
        assert timed.taken() == 0
        ended[0] = True
        assert timed.taken() >= 0.02
