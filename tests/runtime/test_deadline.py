"""`--until`: times of day, dates, and mistakes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from cxr.errors import UserError
from cxr.runtime.deadline import parse_deadline


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("23:30", "2026-01-30T23:30+01:00"),
        ("06:00", "2026-01-31T06:00+01:00"),
        ("22:00", "2026-01-31T22:00+01:00"),  # now
        ("06:00+00:00", "2026-01-31T06:00+00:00"),
        ("2026-02-01T06:00", "2026-02-01T06:00+01:00"),
        ("2026-02-01 06:00:30", "2026-02-01T06:00:30+01:00"),
        ("2026-01-30T21:30Z", "2026-01-30T22:30+01:00"),
    ],
)
def test_times_of_day_and_dates(text: str, expected: str) -> None:
    assert parse_deadline(text, moment("2026-01-30T22:00+01:00")) == moment(expected)


def test_a_time_of_day_is_by_the_clock_when_daylight_saving_time_begins() -> None:
    assert parse_deadline("06:00", moment("2026-03-28T22:00+01:00")) == moment("2026-03-29T06:00+02:00")


@pytest.mark.parametrize("text", ["6 o'clock", "25:00", "", "tomorrow"])
def test_other_texts_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match=r"--until: expected a time such as 06:00 or a date and time such as .*, got"):
        parse_deadline(text, time.time())


def test_a_date_that_has_passed_is_rejected() -> None:
    with pytest.raises(UserError, match=r"in the future, got 2026-01-30T06:00, and it is 2026-01-30T2"):
        parse_deadline("2026-01-30T06:00", moment("2026-01-30T22:00+01:00"))
