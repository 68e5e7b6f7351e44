"""Messages about the progress of a long run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from cxr.errors import UserError
from cxr.runtime.progress import Progress, with_stall_notes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_time_left_is_that_of_the_pace_after_the_start(clock: Clock) -> None:
    progress = Progress("ingest", total=1000, done=100)
    assert progress.line() == "ingest: 100 of 1,000 images (10%)"
    clock.now += 60
    progress.add(100)
    assert progress.line() == "ingest: 200 of 1,000 images (20%), 2 images/s"
    clock.now += 40
    progress.add(400, rejects=3)
    assert progress.line() == "ingest: 600 of 1,000 images (60%), 3 rejected, 5 images/s, 40 s left"
    clock.now += 3500
    progress.add(400)
    assert progress.line() == "ingest: 1,000 of 1,000 images (100%), 3 rejected, 0 images/s, 1 h 00 min"


def test_the_last_line_says_what_an_image_took(clock: Clock) -> None:
    progress = Progress("ingest", total=100, done=50)
    clock.now += 10
    progress.add(25, seconds={"storage": 0.1, "decoding": 0.75})
    assert progress.line().endswith("2 images/s")
    progress.add(25, seconds={"decoding": 0.25})
    assert progress.line().endswith("5 images/s, 10 s; an image took 2 ms of storage and 20 ms of decoding")


def test_a_line_is_printed_every_few_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("scored", total=100)
    for _ in range(10):
        clock.now += 2
        progress.add(10)
    assert capsys.readouterr().out.count("\n") == 3


def test_zero_remaining_rows_do_not_divide_by_zero(clock: Clock) -> None:
    assert Progress("ingest", total=0).line() == "ingest: 0 of 0 images (0%)"
    assert Progress("ingest", total=5, done=5).images_per_second == 0


def test_a_long_wait_is_noted_with_its_reason_and_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXR_STALL_WARNING_S", "0.2")

    def slow() -> Iterator[int]:
        yield 1
        time.sleep(0.7)
        yield 2

    items = with_stall_notes(slow(), lambda: "part-00007, while 0 of 2 CPUs are free")
    assert next(items) == 1
    time.sleep(0.4)  # of the consumer
    assert capsys.readouterr().out == ""
    assert list(items) == [2]
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) >= 2
    assert all(
        note.endswith("without progress; waiting for part-00007, while 0 of 2 CPUs are free") for note in notes
    )


def test_a_stall_time_that_is_no_number_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_STALL_WARNING_S", "soon")
    with pytest.raises(UserError, match="CXR_STALL_WARNING_S=soon: expected seconds above 0"):
        next(with_stall_notes([1], str))
