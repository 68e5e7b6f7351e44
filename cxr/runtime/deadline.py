"""The moment at which a job stops by itself, given with `--until`."""

from __future__ import annotations

from datetime import datetime, time, timedelta

from cxr.errors import UserError


def parse_deadline(text: str, now: float) -> float:
    """The moment that `text` names; moments are seconds since 1970, as from `time.time()`.

    Args:
        text: a time of day such as "06:00", which means its next occurrence, or a date and time in ISO 8601 such as
            "2026-01-31T06:00". They are local times unless they have an offset from UTC.

    Raises:
        UserError: `text` is neither, or the date has passed.
    """
    try:
        moment = datetime.combine(datetime.fromtimestamp(now), time.fromisoformat(text))
        if moment.timestamp() <= now:
            moment += timedelta(days=1)
    except ValueError:
        moment = _date_and_time(text)
    if moment.timestamp() <= now:
        clock = f"{datetime.fromtimestamp(now):%Y-%m-%dT%H:%M}"
        raise UserError(f"--until: expected a time in the future, got {text}, and it is {clock}")
    return moment.timestamp()


def _date_and_time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--until: expected a time such as 06:00 or a date and time such as 2026-01-31T06:00, got {text!r}"
        ) from None
