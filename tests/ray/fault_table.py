"""The table of faults in docs/reference/faults.md: python -m tests.ray.fault_table, after the tests (`make faults`).

Tests record what they measured in build/faults; rows that were not measured again are kept.
"""

from __future__ import annotations

import json
import re
import time

from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "reference" / "faults.md"
RECORDS = REPOSITORY / "build" / "faults"
HEAD = "| fault | work | end | undisturbed, s | with the fault, s | recovery, s | measured |"


def record(
    fault: str, work: str, end: str, recovery: float | None, seconds: float, undisturbed: float | None
) -> None:
    """Record a row of the table. Times are in seconds, None where they were not measured; the page defines them."""
    times = ["–" if value is None else f"{value:.0f}" for value in (undisturbed, seconds, recovery)]
    RECORDS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", f"{fault} {work}")
    row = [fault, work, end, *times, time.strftime("%Y-%m-%d")]
    (RECORDS / f"{name}.json").write_text(json.dumps(row))


def main() -> None:
    before, _, after = PAGE.read_text().partition(HEAD)
    table, _, rest = after.partition("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    known = {(fault, work): [fault, work, *others] for fault, work, *others in rows}
    for file in sorted(RECORDS.glob("*.json")):
        fault, work, *others = json.loads(file.read_text())
        known[fault, work] = [fault, work, *others]
    lines = [f"| {' | '.join(row)} |" for _, row in sorted(known.items())]
    PAGE.write_text("\n".join([before + HEAD, "|---" * 7 + "|", *lines]) + "\n\n" + rest)
    print(f"{PAGE}: {len(known)} rows")


if __name__ == "__main__":
    main()
