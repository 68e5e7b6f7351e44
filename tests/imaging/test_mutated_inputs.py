"""Decode thousands of damaged files: each is decoded or rejected, in a few seconds and with little memory.

They are decoded in a child process with limited memory, so that a crash, a hang or an unlimited allocation in a
C library fails a test that names the seed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import pytest
from imagecodecs import htj2k_encode, jpeg8_encode, jpegls_encode
from pydicom import uid

from cxr.errors import ImageRejectedError
from cxr.imaging.decode import decode, inspect
from cxr.imaging.image import Image
from cxr.imaging.reduced import decode_to_fit
from tests.odd_files import HEIGHT, WIDTH, chunk, dataset, dicom, encoded, odd_files, radiograph, run_lengths

MAX_CPU_S = 5.0  # CPU time per file
MAX_BYTES = 1 << 30  # memory per file, beyond that of the process before decoding
HANG_S = 120.0  # wall-clock time per file, for a busy machine
NUMBERS = (0, 1, 2, 7, 16, HEIGHT, WIDTH, 255, 256, 4095, 4096, 8000, 10_000, 32_767, 65_535, 0x7FFFFFFF, 0xFFFFFFFF)
SIDES = (17, HEIGHT - 1, HEIGHT + 1, 200, 1000, 4000, 9999, 65_535)
HEADER = 1500  # bytes that contain most headers


def whole_files() -> list[bytes]:
    """One file of every kind that can be decoded: all transfer syntaxes, PNG, JPEG and raw JSRT."""
    gray, twelve = radiograph(), radiograph(12)
    rgb = np.dstack([gray] * 3)
    color = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    window = {"WindowCenter": "100", "WindowWidth": "200"}
    tiles = {"no_jp2": True, "tile_size": (32, 32), "codeblock_size": (8, 8), "precinct_size": (64, 64)}
    lossy = {"no_jp2": True, "irreversible": True, "quality_layers": [10]}
    compressed = [
        (uid.RLELossless, twelve, run_lengths(twelve)),
        (uid.JPEGBaseline8Bit, gray, encoded(gray, "JPEG", progressive=True)),
        (uid.JPEGExtended12Bit, gray, encoded(gray, "JPEG")),
        (uid.JPEGLSNearLossless, gray, jpegls_encode(gray, 3)),
        (uid.JPEG2000, gray, encoded(gray, "JPEG2000", **lossy)),
        (uid.JPEG2000, gray, encoded(gray, "JPEG2000", **tiles)),
        (uid.JPEG2000, gray, encoded(gray, "JPEG2000")),
        (uid.JPEGExtended12Bit, twelve, jpeg8_encode(twelve, bitspersample=12)),
        (uid.JPEGLossless, twelve, jpeg8_encode(twelve, lossless=True, predictor=7, bitspersample=12)),
        (uid.HTJ2KLossless, twelve, htj2k_encode(twelve, reversible=True)),
        (uid.HTJ2KLosslessRPCL, twelve, htj2k_encode(twelve, reversible=True, tile=(32, 32), tlm=True)),
        (uid.HTJ2K, gray, htj2k_encode(gray, 0.01, reversible=False)),
    ]
    colored = [
        (uid.JPEGBaseline8Bit, encoded(rgb, "JPEG")),
        (uid.JPEGLosslessSV1, jpeg8_encode(rgb, lossless=True, predictor=1)),
        (uid.JPEGLSLossless, jpegls_encode(rgb)),
        (uid.HTJ2KLossless, htj2k_encode(rgb, reversible=True)),
    ]
    return [
        *(file.data for file in odd_files() if file.reason is None),
        *(dicom(dataset(pixels, **window), syntax, codestream) for syntax, pixels, codestream in compressed),
        *(dicom(dataset(rgb, **color), syntax) for syntax in (uid.JPEG2000Lossless, uid.RLELossless)),
        *(dicom(dataset(rgb, **color), syntax, codestream) for syntax, codestream in colored),
        np.random.default_rng(0).integers(0, 4096, (2048, 2048)).astype(">u2").tobytes(),
    ]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Apply one to three of: flip bytes, truncate, edit numbers, swap, repeat or remove slices."""
    damaged = bytearray(data)
    for kind in rng.integers(0, 7, rng.integers(1, 4)):
        length = len(damaged)
        if length < 16:
            break
        place = int(rng.integers(0, min(length - 8, HEADER)))
        if kind == 0:
            for at in rng.integers(0, length, rng.integers(1, 9)):
                damaged[at] = rng.integers(256)
        elif kind == 1:
            for at in rng.integers(0, min(length, HEADER), rng.integers(1, 5)):
                damaged[at] = rng.integers(256)
        elif kind == 2:
            del damaged[length - int(rng.integers(1, length if rng.random() < 0.5 else min(64, length))) :]
        elif kind == 3:
            number = int(rng.choice(NUMBERS))
            order, size = rng.choice(["<", ">"]), rng.choice(["H", "I"])
            written = struct.pack(order + size, number & (0xFFFF if size == "H" else 0xFFFFFFFF))
            damaged[place : place + len(written)] = written
        elif kind == 4:  # tags, or other bytes at their position
            size = int(rng.integers(2, 40))
            one, other = (slice(at, at + size) for at in rng.integers(0, length - 8, 2))
            damaged[one], damaged[other] = bytes(damaged[other]), bytes(damaged[one])
        elif kind == 5:  # every declaration of the size, so that they still agree
            for old, new in ((HEIGHT, rng.choice(SIDES)), (WIDTH, rng.choice(SIDES))):
                for code in ("<H", ">H", "<I", ">I"):
                    damaged = damaged.replace(struct.pack(code, old), struct.pack(code, new))
        else:
            slice_ = slice(place, place + int(rng.integers(1, 200)))
            damaged[slice_] = bytes(damaged[slice_]) * int(rng.choice([0, 2]))
    return bytes(damaged)


def with_checksums(data: bytes) -> bytes:
    """Correct a PNG's checksums, so that the damage reaches its decoder; other files are unchanged."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    mended, position = data[:8], 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        mended += chunk(kind, data[position + 8 : position + 8 + length])
        position += 12 + length
    return mended


def damaged_file(seed: int, files: list[bytes]) -> bytes:
    rng = np.random.default_rng(seed)
    damaged = mutated(files[seed % len(files)], rng)
    return with_checksums(damaged) if rng.random() < 0.7 else damaged


def decode_both(data: bytes) -> Image:
    """Decode at full resolution, and, if the file allows it, at a reduced one."""
    with suppress(ImageRejectedError):
        decode_to_fit(inspect(data), 20)
    return decode(data)


def decode_all(channel: Connection, first: int, last: int, decoder: Callable[[bytes], Any]) -> None:
    """Send (seed, None) before and (seed, outcome) after each file; outcomes other than "decoded" and "rejected"
    fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of C libraries
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    files = whole_files()
    limit = psutil.Process().memory_info().data + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for seed in range(first, last):
        data = damaged_file(seed, files)
        channel.send((seed, None))
        start = time.process_time()
        try:
            pixels = decoder(data).pixels
            outcome = "decoded" if pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16) else "not an image"
        except ImageRejectedError:
            outcome = "rejected"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        channel.send((seed, outcome if seconds <= MAX_CPU_S else f"{outcome} after {seconds:.1f} s"))


def outcomes(count: int, decoder: Callable[[bytes], Any] = decode_both) -> tuple[Counter[str], list[str]]:
    """Counts of decoded and rejected files, and the other outcomes with their seeds."""
    processes = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    failures: list[str] = []
    seed = 0
    while seed < count:
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=decode_all, args=(theirs, seed, count, decoder))
        child.start()
        theirs.close()
        began = None
        try:
            while seed < count:
                if not ours.poll(HANG_S):
                    raise TimeoutError
                seed, outcome = ours.recv()
                began = seed
                if outcome is not None:
                    began, seed = None, seed + 1
                    if outcome in ("decoded", "rejected"):
                        counts[outcome] += 1
                    else:
                        failures.append(f"seed {seed - 1}: {outcome}")
        except (EOFError, TimeoutError) as error:
            child.join(1)
            assert began is not None, "the child process failed outside of decoding"
            ended = child.exitcode and signal.strsignal(-child.exitcode)
            failures.append(f"seed {began}: {ended or f'no answer ({type(error).__name__})'}")
            seed = began + 1
        child.kill()
        child.join()
    return counts, failures


def check(count: int) -> None:
    counts, failures = outcomes(count)
    assert not failures
    assert counts.total() == count
    assert min(counts["decoded"], counts["rejected"]) > count / 10


def test_300_mutated_files_are_decoded_or_rejected() -> None:
    check(300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_10_000_mutated_files_are_decoded_or_rejected_within_5_s_and_1_gib() -> None:
    check(10_000)


def fails_then_crashes(data: bytes) -> None:
    """Simulated decoder: the first file of each process raises an error, the second one kills the process."""
    fails_then_crashes.met = getattr(fails_then_crashes, "met", 0) + 1
    if fails_then_crashes.met == 1:
        raise KeyError("a bug")
    os.kill(os.getpid(), signal.SIGSEGV)


def fills_memory(data: bytes) -> None:
    np.ones(MAX_BYTES + (64 << 20), np.uint8)


@pytest.mark.slow
def test_errors_crashes_and_excessive_memory_are_reported_with_their_seeds() -> None:
    counts, failures = outcomes(3, fails_then_crashes)
    assert not counts
    assert failures == ["seed 0: KeyError: 'a bug'", "seed 1: Segmentation fault", "seed 2: KeyError: 'a bug'"]
    _, (failure,) = outcomes(1, fills_memory)
    assert "MemoryError" in failure
