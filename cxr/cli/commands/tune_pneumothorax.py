"""Search the settings of pneumothorax segmentation. Phantoms have the prevalence of SIIM-ACR."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cxr.cli.commands import tune
from cxr.cli.commands.tune import Options
from cxr.cli.phantoms import siim_phantoms


def main(options: Options) -> dict[str, Any]:
    return tune.main(replace(options, data=siim_phantoms(options.data, options.out)))
