"""Measure how long a search for classification heads takes on synthetic embeddings, in one process.

cxr benchmark heads --images 100000 --trials 200
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cxr.runtime import console

VALIDATION = 10  # one image in so many is for validation


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    out: str = "runs/benchmark_heads"
    """Folder or URI of the results."""
    images: int = 20_000
    """Number of synthetic embeddings."""
    width: int = 1024
    """Numbers per embedding."""
    findings: int = 14
    """Number of findings."""
    trials: int = 50
    """Number of trials of the search."""
    seed: int = 0
    """Random seed."""


def main(options: Options) -> dict[str, Any]:
    import torch

    from cxr.families.classify import ClassifyRecipe
    from cxr.families.head_training import search_heads, search_space, starting_recipe, train_head

    data = _synthetic(options)
    recipe = starting_recipe(ClassifyRecipe())
    start, cpu = time.monotonic(), time.process_time()
    ended = search_heads(recipe, data, search_space(recipe), trials=options.trials, seed=options.seed)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
    start = time.monotonic()
    train_head(recipe.replace(**ended[0].sampled), data)
    final_seconds = time.monotonic() - start
    console.say(
        f"{options.trials} trials on {options.images} embeddings of {options.width} numbers: {seconds:.1f} s "
        f"({cpu_seconds:.1f} s of CPU time); then {final_seconds:.1f} s to train the best head for all its epochs"
    )
    metrics = {
        "search_seconds": seconds,
        "search_cpu_seconds": cpu_seconds,
        "final_seconds": final_seconds,
        "best_mean_auroc": ended[0].value,
        "complete_trials": sum(not trial.stopped_early for trial in ended),
        "steps": sum(trial.steps for trial in ended),
        "threads": torch.get_num_threads(),
    }
    return {"metrics": metrics}


def _synthetic(options: Options) -> Any:
    """Normally distributed features, and labels of which a twentieth of the features, and noise, decide."""
    import torch

    from cxr.families.head_training import LabeledEmbeddings

    random = torch.Generator().manual_seed(options.seed)
    mask_DF = torch.rand(options.width, options.findings, generator=random) < 0.05
    weight_DF = torch.randn(options.width, options.findings, generator=random) * mask_DF
    weight_DF *= 2 / weight_DF.norm(dim=0).clamp(min=1e-6)
    vectors = torch.empty(options.images, options.width, dtype=torch.float16)
    labels = torch.empty(options.images, options.findings, dtype=torch.int8)
    for rows in torch.arange(options.images).split(20_000):
        x_BD = torch.randn(len(rows), options.width, generator=random)
        noise_BF = torch.randn(len(rows), options.findings, generator=random)
        vectors[rows], labels[rows] = x_BD.half(), (x_BD @ weight_DF + noise_BF > 2.5).to(torch.int8)
    order = torch.randperm(options.images, generator=random)
    val = options.images // VALIDATION
    return LabeledEmbeddings(vectors, labels, order[val:], order[:val])
