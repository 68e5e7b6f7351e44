"""Train pneumothorax segmentation. Phantoms have the prevalence of SIIM-ACR."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cxr.cli.commands import train
from cxr.cli.commands.train import Options
from cxr.cli.phantoms import siim_phantoms


def main(options: Options) -> dict[str, Any]:
    return train.main(replace(options, data=siim_phantoms(options.data, options.out)))
