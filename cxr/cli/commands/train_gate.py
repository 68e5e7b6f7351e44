"""Train the gate, a network that recognizes upright frontal chest X-rays, and evaluate it on archives.

It is trained on phantoms and on the training images of the archives given with --archive, which must be frontal
chest X-rays. The shipped file, cxr/data/gate.safetensors, was made by the first command.

cxr train gate --archive /data/chestxray14 --test /data/montgomery --test /data/shenzhen

cxr train gate --steps 0 --test /data/montgomery  # evaluate the network that ships with cxr
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cxr import storage
from cxr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/gate"
    """Folder of the results; the weights are OUT/gate.safetensors."""
    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Archive of frontal chest X-rays. The network is trained on its training images and evaluated on its test
    images. May be repeated."""
    test: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Archive of frontal chest X-rays. The network is evaluated on all of its images. May be repeated."""
    phantoms: int = 1000
    """Number of phantoms of each kind to train on."""
    steps: int = 3000
    """Number of training steps, with 64 images each. 0: evaluate the network that ships with cxr instead."""
    seed: int = 0
    """Seed of the phantoms, the initial weights and the augmentation."""

    def __post_init__(self) -> None:
        if self.phantoms < 1 or self.steps < 0:
            raise UserError(
                f"expected at least 1 phantom and no negative steps, got phantoms={self.phantoms}, steps={self.steps}"
            )
        if not storage.is_local(storage.normalize(self.out)):
            raise UserError(f"expected --out to be a local folder, got {self.out}")


def main(options: Options) -> dict[str, Any]:
    for archive in (*options.archive, *options.test):
        storage.check_readable(archive)

    from cxr.data import gate  # these import torch, which takes seconds
    from cxr.families import gate_training

    weights = gate.WEIGHTS
    if options.steps:
        training = gate_training.GateTraining(options.phantoms, options.steps, options.seed)
        real = [gate_training.read_frontal(archive, "train") for archive in options.archive]
        network = gate_training.train(training, real)
        weights = Path(storage.join(storage.normalize(options.out), gate.WEIGHTS.name))
        about = {"real_frontal_images": sum(map(len, real))}
        gate_training.save_weights(network, training, about, str(weights))
    print(f"weights: {weights}", flush=True)

    held_out = gate_training.render_images(gate_training.HELD_OUT, options.seed, first=1_000_000)
    measured = {"frontal phantoms": held_out.frontal, "lateral phantoms": held_out.lateral}
    measured |= {"phantoms of other body parts": held_out.other}
    measured |= {f"{storage.name(a)}, test": gate_training.read_frontal(a, "test") for a in options.archive}
    measured |= {storage.name(archive): gate_training.read_frontal(archive, None) for archive in options.test}
    metrics = {}
    for name, images in measured.items():
        passed = gate_training.measure(images, weights)
        print(f"{name}, {len(images):,} images; passed: {', '.join(f'{k} {v:.3f}' for k, v in passed.items())}")
        metrics |= {f"passed/{name}/{how}": share for how, share in passed.items()}
    return {"weights": str(weights), "metrics": metrics}
