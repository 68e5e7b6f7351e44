"""Pretraining that all training runs of a recipe share, run once on the cluster before the first of them."""

from __future__ import annotations

from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from cxr.families import recipe_from_dict
from cxr.families.base import SomeRecipe
from cxr.families.capabilities import SharedPretraining
from cxr.runtime.user_errors import user_error_in
from cxr.training.fit import room, uses_gpu
from cxr.training.options import RunOptions


def prepare(recipe: SomeRecipe, out: str, options: RunOptions) -> SomeRecipe:
    """`recipe.pretrain_shared(out)`, run with the resources of one worker.

    Raises:
        UserError: as `recipe.pretrain_shared` does, or the cluster cannot hold one worker.
    """
    if not isinstance(recipe, SharedPretraining) or recipe.is_pretrained:
        return recipe
    room(options, raw=False)  # else Ray would wait for ever for what the cluster lacks
    threads = max(1, int(options.cpus_per_worker))
    run = ray.remote(
        num_cpus=options.resources_per_worker["CPU"],
        num_gpus=float(uses_gpu(options)),
        max_retries=options.max_failures,
    )(prepare_here)
    try:
        return type(recipe).from_dict(ray.get(run.remote(recipe.to_dict(), out, threads)))
    except RayTaskError as error:
        if (mistake := user_error_in(error)) is None:
            raise
        raise mistake from error


def prepare_here(recipe: dict[str, Any], out: str, threads: int) -> dict[str, Any]:
    """`recipe.pretrain_shared`, from plain data to plain data."""
    torch.set_num_threads(threads)
    shared = recipe_from_dict(recipe)
    assert isinstance(shared, SharedPretraining)
    return shared.pretrain_shared(out).to_dict()
