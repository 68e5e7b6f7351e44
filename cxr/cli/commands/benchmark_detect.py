"""Measure how fast a detector trains: with Ray Train from shards, and with Ultralytics' own trainer from PNG files.

cxr benchmark detect  # yolov5n at 320 px, one CPU; ten minutes

Both use the same images, boxes, network, batch, augmentation and optimizer with one thread, alternately. Ultralytics'
trainer runs under favorable conditions: images cached in memory, no plots, no checkpoints, no validation between
epochs. The throughput of an epoch covers its training steps with reading and augmentation; the first epoch of each
round, which fills the caches, is excluded.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import torch
import yaml

from cxr import schema, storage
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import ensure_shards
from cxr.data import shards
from cxr.data.batch import Batch
from cxr.data.shard_loader import ShardStream
from cxr.families.detect import DetectRecipe
from cxr.models.yolo import ultralytics
from cxr.runtime import cluster
from cxr.training.fit import fit
from cxr.training.options import RunOptions
from cxr.training.run_log import read_metrics

_BATCH = 32  # images converted at a time
_REPORTERS = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_detect"
    """Folder or URI of result.json and of the phantoms for training."""
    images: int = 200
    """Number of phantoms; about 70 % are used for training."""
    rounds: int = 2
    """Number of alternating rounds per trainer."""
    recipe: DetectRecipe = field(
        default_factory=lambda: DetectRecipe(size=320, epochs=4, close_mosaic=0, precision="float32")
    )


def main(options: Options) -> dict[str, Any]:
    cluster.connect()
    out = storage.normalize(options.out)
    data = ensure_shards(ArchiveOptions(phantoms=options.images, stored_size=options.recipe.size), out)
    paces: dict[str, list[float]] = {"ray train": [], "ultralytics": []}
    with tempfile.TemporaryDirectory(prefix="cxr-detect-") as scratch:
        yolo = yolo_folder(data, Path(scratch) / "yolo")
        for number in range(options.rounds):
            paces["ray train"] += ours(options.recipe, data, f"{scratch}/ours-{number}")
            paces["ultralytics"] += theirs(options.recipe, yolo, Path(scratch) / f"theirs-{number}")
    medians = {name: statistics.median(values) for name, values in paces.items()}
    ratio = medians["ray train"] / medians["ultralytics"]
    for name, values in paces.items():
        print(f"{name:<12} {medians[name]:7.2f} images/s ({min(values):.2f} to {max(values):.2f})")
    print(f"ratio {ratio:.3f}", flush=True)
    return {"metrics": {"ratio": ratio, **medians}, "epochs": paces}


def ours(recipe: DetectRecipe, data: str, out: str) -> list[float]:
    """Images per second of each epoch except the first, as logged by fit()."""
    fit(recipe, data, out, RunOptions())
    return [row["images_per_s"] for row in read_metrics(out)][1:]


def theirs(recipe: DetectRecipe, yolo: Path, out: Path) -> list[float]:
    """The same with Ultralytics' own trainer, in this process."""
    trainer_of = ultralytics("models.yolo.detect").DetectionTrainer
    _go_offline()
    trainer = trainer_of(overrides=settings(recipe, yolo, out))
    begun: list[float] = []
    paces: list[float] = []

    def begin(trainer: Any) -> None:
        torch.set_num_threads(1)
        begun.append(time.perf_counter())

    def end(trainer: Any) -> None:
        paces.append(len(trainer.train_loader.dataset) / (time.perf_counter() - begun[-1]))

    trainer.add_callback("on_train_epoch_start", begin)
    trainer.add_callback("on_train_epoch_end", end)
    trainer.train()
    return paces[1:]


def settings(recipe: DetectRecipe, yolo: Path, out: Path) -> dict[str, Any]:
    """A recipe's settings under Ultralytics' names."""
    return {
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "box": recipe.box_weight,
        "cls": recipe.class_weight,
        "dfl": recipe.dfl_weight,
        "mosaic": recipe.mosaic,
        "mixup": recipe.mixup,
        "close_mosaic": recipe.close_mosaic,
        "translate": recipe.translate,
        "scale": recipe.scale_jitter,
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
        "model": f"{recipe.architecture}.yaml",
        "data": str(yolo / "data.yaml"),
        "imgsz": recipe.size,
        "batch": recipe.batch_size,
        "nbs": recipe.batch_size * recipe.accumulate,
        "optimizer": "SGD",
        "lr0": recipe.lr,
        "lrf": recipe.final_lr_fraction,
        "warmup_epochs": recipe.warmup * recipe.epochs,
        "degrees": recipe.rotation_deg,
        "shear": recipe.shear_deg,
        "fliplr": recipe.flip,
        "hsv_v": recipe.hsv_v,
        "device": "cpu",
        "cache": "ram",
        "amp": False,
        "deterministic": False,
        "plots": False,
        "save": False,
        "val": False,
        "verbose": False,
        "project": str(out),
    }


def _go_offline() -> None:
    """Keep Ultralytics' trainer from downloading a font and from reporting to installed loggers."""
    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    shutil.copy(font, Path(os.environ["YOLO_CONFIG_DIR"]) / "Ultralytics" / "Arial.ttf")
    ultralytics("utils").SETTINGS.update(dict.fromkeys(_REPORTERS, False))


def yolo_folder(data: str, folder: Path) -> Path:
    """Convert shards to Ultralytics' layout: images/SPLIT/*.png, labels/SPLIT/*.txt, data.yaml."""
    info = shards.read_info(data)
    for split in ("train", "val"):
        stream = ShardStream(info, split, (schema.PIXELS, schema.BOXES), batch_size=_BATCH)
        for name, (pixels, lines) in enumerate(_labeled(stream.every())):
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(folder / "images" / split / f"{name:06d}.png"), pixels)
            (folder / "labels" / split / f"{name:06d}.txt").write_text(lines)
    about = {"path": str(folder), "train": "images/train", "val": "images/val", "channels": 1}
    (folder / "data.yaml").write_text(yaml.safe_dump(about | {"names": dict(enumerate(info.findings))}))
    return folder


def _labeled(batches: Iterator[Batch]) -> Iterator[tuple[Any, str]]:
    """Each image's pixels, and its boxes as lines with the finding, and center and size in fractions."""
    for batch in batches:
        for pixels, boxes_N5 in zip(batch[schema.PIXELS].numpy(), batch[schema.BOXES].tolist(), strict=True):
            boxes = [box for box in boxes_N5 if not math.isnan(box[0])]  # NaN pads images with fewer boxes
            yield pixels, "".join(_line(*box) for box in boxes)


def _line(finding: float, x_min: float, y_min: float, x_max: float, y_max: float) -> str:
    center_and_size = ((x_min + x_max) / 2, (y_min + y_max) / 2, x_max - x_min, y_max - y_min)
    return f"{int(finding)} {' '.join(f'{value:.6f}' for value in center_and_size)}\n"
