"""Read epochs through the same streams as fit(), into a training step of negligible cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa
import torch
from ray.train import RunConfig, ScalingConfig
from torch import Tensor, nn

from cxr import schema
from cxr.data import shards
from cxr.data.batch import Batch
from cxr.data.shard_loader import ShardStream
from cxr.families.base import Recipe, SingleProcess, Task
from cxr.runtime import ray_private
from cxr.training.fit import ExactlyOnceDataConfig
from cxr.training.options import RunOptions, ShardReader
from cxr.training.raw_stream import Stream, open_streams
from cxr.training.session import RayTrainSession
from cxr.training.training_data import CACHE_BYTES, describe

BATCH_SIZE = 32
_GRID = 8  # side of the grid of pixels that the step uses


class Step:
    """A training step of a linear layer on a few pixels of each image."""

    def __init__(self) -> None:
        self._layer = nn.Linear(_GRID * _GRID, 1)
        self._optimizer = torch.optim.SGD(self._layer.parameters(), 1e-6)
        self(torch.zeros(1, _GRID, _GRID))  # an optimizer's first step imports modules

    def __call__(self, pixels_BHW: Tensor) -> None:
        every = pixels_BHW.shape[-1] // _GRID
        seen = pixels_BHW[:, ::every, ::every][:, :_GRID, :_GRID].reshape(len(pixels_BHW), -1)
        self._layer(seen.float() / 255).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


@dataclass(frozen=True, kw_only=True)
class Reading(Recipe):
    """A recipe with the settings for reading; nothing is trained."""

    family: ClassVar[str] = "reading"
    mode: ClassVar[Literal["min", "max"]] = "max"
    score_columns: ClassVar[pa.Schema] = pa.schema([])

    batch_size: int = BATCH_SIZE

    @property
    def monitor(self) -> str:
        return ""

    def network(self, findings: Sequence[str]) -> nn.Module:
        return nn.Identity()

    def task(self, network: nn.Module) -> Task:
        return Task()

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Pace:
    """Throughput of some epochs, including all overhead."""

    rows: int
    seconds: float
    first_batch_s: tuple[float, ...]  # since the start of each epoch

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds

    @property
    def first_batch_again_s(self) -> float:
        """The longest wait for the first batch of the second and later epochs."""
        return max(self.first_batch_s[1:])


def read_epochs(stream: Stream, epochs: int, first: int = 0) -> Pace:
    """Read epochs `first`, `first` + 1, … into a step."""
    step, rows, waits, start = Step(), 0, [], time.perf_counter()
    for epoch in range(first, first + epochs):
        begun, waited = time.perf_counter(), None
        for batch in stream.train(epoch):
            waited = waited or time.perf_counter() - begun
            step(batch[schema.PIXELS])
            rows += len(batch[schema.PIXELS])
        waits.append(waited or 0.0)
    return Pace(rows, time.perf_counter() - start, tuple(waits))


def shard_stream(info: shards.ShardInfo) -> ShardStream:
    """The stream of a single worker of fit()."""
    return ShardStream(info, "train", Reading.columns, batch_size=BATCH_SIZE, cache_bytes=CACHE_BYTES)


def on_worker(archive: str, size: int, epochs: int, scratch: str, shard_reader: ShardReader = "own") -> Pace:
    """Read the train split of shards, or of a raw archive with Ray Data, on a worker of Ray Train."""
    data = describe(archive, Reading(size=size), scratch, shard_reader=shard_reader)
    trainer = ray_private.torch_trainer(
        _read_on_worker,
        train_loop_config={"data": data.about, "size": size, "epochs": epochs},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker=RunOptions().resources_per_worker),
        run_config=RunConfig(storage_path=scratch),
        datasets=data.datasets(0, scratch),
        dataset_config=ExactlyOnceDataConfig() if data.streams else None,
    )
    result = trainer.fit().return_value
    assert result is not None
    return Pace(result["rows"], result["seconds"], tuple(result["first_batch_s"]))


def _read_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    train, _ = open_streams(config["data"], Reading(size=config["size"]), SingleProcess(), RayTrainSession())
    return asdict(read_epochs(train, config["epochs"]))
