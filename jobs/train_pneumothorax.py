"""Train a network that segments pneumothorax, as annotated in SIIM-ACR (2019).

python jobs/train_pneumothorax.py  # on a phantom archive, with a small network for CPUs

python jobs/train_pneumothorax.py --archive /data/siim --preset siim --out runs/pneumothorax
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from cxr.cli.entry import train
from cxr.cli.options import ArchiveOptions, TrainOptions
from cxr.cli.phantoms import siim_phantoms
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.families.presets import preset
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Settings of the job."""

    out: str = "runs/train_pneumothorax"
    """Folder or URI of the results."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600))
    recipe: PneumothoraxRecipe = field(default_factory=lambda: preset(PneumothoraxRecipe, "demo"))


def main(options: Options) -> dict[str, Any]:
    return train(replace(options, data=siim_phantoms(options.data, options.out)))


if __name__ == "__main__":
    run_job(main, Options)
