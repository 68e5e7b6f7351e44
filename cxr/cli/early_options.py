"""Options that decide the defaults of others, and are therefore read before the command line is parsed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def early_values(arguments: Sequence[str], *options: str) -> list[list[str]]:
    """The values of each of these options on a command line. A value that is missing is left to the parser to report.

    Args:
        options: their names, such as `--preset`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in options:
        parser.add_argument(option, dest=option, nargs="?", action="append", default=[])
    parsed = vars(parser.parse_known_args(list(arguments))[0])
    return [list(filter(None, parsed[option])) for option in options]
