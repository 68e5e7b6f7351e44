"""Throughput of a recipe's training step as run by fit() on a worker of Ray Train, and in a bare torch loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import get_device

from cxr.benchmarks.throughput.bare_loop import BareLoop
from cxr.data import shards
from cxr.data.batch import Batch, to_device
from cxr.families import recipe_from_dict
from cxr.families.base import Recipe, SingleProcess
from cxr.runtime import ray_private
from cxr.training.engine import Engine
from cxr.training.options import RunOptions
from cxr.training.raw_stream import open_streams
from cxr.training.session import RayTrainSession
from cxr.training.training_data import CACHE_BYTES


def both_paces(
    recipe: Recipe, shards_uri: str, steps: int, rounds: int, scratch: str, *, gpu: bool = False
) -> tuple[float, float]:
    """Images per second through Ray Train and in a bare loop with the same model, batch and threads; median of
    rounds.

    Both run alternately, with steps of the recipe's first stage.
    """
    config = {
        "recipe": recipe.to_dict(),
        "data": {"shards": shards_uri, "cache_bytes": CACHE_BYTES},
        "findings": list(shards.read_info(shards_uri).findings),
        "steps": steps,
        "rounds": rounds,
    }
    trainer = ray_private.torch_trainer(
        _train_on_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=gpu,
            resources_per_worker=RunOptions().resources_per_worker | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(storage_path=scratch),
    )
    result = trainer.fit().return_value
    assert result is not None
    return result["fit"], result["bare"]


def _train_on_worker(config: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(1)
    recipe, steps = recipe_from_dict(config["recipe"]), config["steps"]
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    train, _ = open_streams(config["data"], recipe, SingleProcess(), RayTrainSession())
    task = recipe.task(recipe.network(config["findings"]))
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=steps, device=device)
    bare = BareLoop(recipe.task(recipe.network(config["findings"])), recipe, device)
    in_memory = [to_device(batch, device) for batch in _first(train.train(0), steps)]
    engine.epoch(iter(in_memory[:1]))
    bare(in_memory[:1])
    seconds: dict[str, list[float]] = {"fit": [], "bare": []}
    for number in range(config["rounds"]):
        batches = train.train(number + 1)
        begun = chain(
            [next(batches)], islice(batches, steps - 1)
        )  # waiting for the first batch is measured elsewhere
        seconds["fit"].append(_seconds(lambda begun=begun: engine.epoch(begun)))
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
        seconds["bare"].append(_seconds(lambda: bare(in_memory)))
    images = steps * recipe.batch_size
    return {name: images / sorted(taken)[len(taken) // 2] for name, taken in seconds.items()}


def _first(batches: Iterator[Batch], count: int) -> list[Batch]:
    first = list(islice(batches, count))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return first


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
