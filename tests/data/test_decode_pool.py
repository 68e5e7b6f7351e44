"""Decoding in child processes: a file that breaks its decoder affects only itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from cxr.data import decode_pool
from cxr.data.decode_pool import DecodePool, Limits
from cxr.data.memory_budget import MemoryBudget
from cxr.errors import ImageRejectedError, UserError
from cxr.imaging.decode import inspect

MARKED = Path(__file__).parents[1] / "marked_files"


def png(seed: int = 0, side: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def pixels_of(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    """A pool whose processes misbehave on marked files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(MARKED), prepend=os.pathsep)
        pool = DecodePool(Limits(seconds=3, memory_gib=0.5))
        yield pool
        pool.close()


def test_child_process_decodes_like_this_process(pool: DecodePool) -> None:
    for seed, side in ((1, 64), (2, 1500), (3, 17)):
        image = pool.decode(png(seed, side), "image").image
        assert np.array_equal(image.pixels, pixels_of(png(seed, side)))
        assert (image.spacing_mm, image.view) == (None, None)


def test_masks_may_be_blank_and_images_may_not(pool: DecodePool) -> None:
    blank = cv2.imencode(".png", np.zeros((32, 32), np.uint8))[1].tobytes()
    assert not pool.decode(blank, "mask").image.pixels.any()
    with pytest.raises(ImageRejectedError, match="blank image"):
        pool.decode(blank, "image")


def test_files_that_crash_their_decoder_are_rejected_and_others_decoded(pool: DecodePool) -> None:
    reasons = {
        "exits": "the decoder exited with code 3",
        "crashes": "the decoder was killed by signal 11 (SIGSEGV)",
        "hangs": "decoding took longer than 3 s",
        "fills_memory": "decoding needed more than 0.5 GiB of memory",
    }
    marked = [png(seed) + f"#{mark}".encode() for seed, mark in enumerate(reasons)]
    good = [png(seed) for seed in range(8)]

    def outcome(data: bytes) -> np.ndarray | str:
        try:
            return pool.decode(data, "image").image.pixels
        except ImageRejectedError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(outcome, [*good[:4], *marked, *good[4:]]))
    assert outcomes[4:8] == list(reasons.values())
    for data, found in zip(good, outcomes[:4] + outcomes[8:], strict=True):
        assert np.array_equal(found, pixels_of(data))
    start = time.monotonic()
    assert [outcome(data) for data in marked] == list(reasons.values())
    assert time.monotonic() - start < 1, "a stream that meets these files in every epoch waits for them each time"


def test_a_file_that_fails_once_is_decoded_in_a_new_process(pool: DecodePool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MARKED_FILES_MET", str(tmp_path / "met"))
    pool.close()  # processes that are idle do not know the variable
    assert np.array_equal(pool.decode(png() + b"#fails_once", "image").image.pixels, pixels_of(png()))
    assert (tmp_path / "met").exists()


def test_memory_of_large_images_is_released(pool: DecodePool) -> None:
    side = 9000  # 81 MB
    assert (
        pool.decode(cv2.imencode(".png", np.eye(side, dtype=np.uint8))[1].tobytes(), "image").image.pixels.sum()
        == side
    )
    assert all(os.fstat(decoder._memory.descriptor).st_size < 64 << 20 for decoder in pool._idle)
    assert np.array_equal(pool.decode(png(), "image").image.pixels, pixels_of(png()))


def test_decoders_wait_for_the_memory_estimated_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Recorded(MemoryBudget):
        def hold(self, size_bytes: int) -> AbstractContextManager[None]:
            held.append(size_bytes)
            return super().hold(size_bytes)

    monkeypatch.setattr(decode_pool, "MemoryBudget", Recorded)
    pool = DecodePool()
    image, mask = png(side=64), png(side=200)
    pool.decode(image, "image")
    pool.decode(mask, "mask")
    with pytest.raises(ImageRejectedError):
        pool.decode(b"not an image", "image")
    pool.close()
    assert held == [inspect(image).memory_bytes, inspect(mask).memory_bytes]


def test_no_decoder_outlives_a_killed_worker(tmp_path: Path) -> None:
    (tmp_path / "hangs.png").write_bytes(png() + b"#hangs")
    script = f"""
import threading
from pathlib import Path
from cxr.data.decode_pool import DecodePool
pool = DecodePool()
threading.Thread(target=pool.decode, args=({png()!r}, "image")).start()  # which ends before its decoder
while not pool._idle: pass
print(pool._idle[0]._process.pid, flush=True)
pool.decode(Path({str(tmp_path / "hangs.png")!r}).read_bytes(), "image")
"""
    paths = os.pathsep.join([str(MARKED), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as worker:
        assert worker.stdout is not None
        decoder = psutil.Process(int(worker.stdout.readline()))
        time.sleep(0.3)
        assert decoder.is_running()
        worker.kill()
    assert psutil.wait_procs([decoder], timeout=10)[1] == []


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limits.from_environment() == Limits(60, 2)
    monkeypatch.setenv("CXR_DECODE_SECONDS", "7.5")
    monkeypatch.setenv("CXR_DECODE_MEMORY_GIB", "4")
    assert Limits.from_environment() == Limits(7.5, 4)
    monkeypatch.setenv("CXR_DECODE_SECONDS", "never")
    with pytest.raises(UserError, match="expected CXR_DECODE_SECONDS to be a number above 0, got never"):
        Limits.from_environment()


def test_decoder_processes_import_neither_torch_nor_ray() -> None:
    probe = "import sys, cxr.data.decode_worker; print({'torch', 'ray'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "set()\n"
