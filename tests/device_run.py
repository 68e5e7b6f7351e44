"""A family on a device, from training to prediction, for tests on `fake_cuda` and on a GPU (`tests/gpu`).

Imports no Ray, so that a GPU machine without it can run this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cxr import schema
from cxr.augment import affine_exposure
from cxr.data.batch import Batch
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.families.base import Communicator, Recipe, ScoringContext, SingleProcess
from cxr.families.capabilities import LatentEncoder
from cxr.imaging.geometry import ResizeTransform
from cxr.training.engine import Engine
from tests.families.test_recipes import SMALL, some_batches

RECIPES: dict[str, Recipe] = SMALL | {
    "aecnn of ten crops": SMALL["aecnn"].replace(size=40, crop=32, tta_crops="ten", pos_weight_power=1.0),
    "align by features": SMALL["align"].replace(target="features", feature_weight=1.0),
    "align by structure": SMALL["align"].replace(target="structure", iterations=2),
    "align with lungs": AlignRecipe(size=32, backbone="conv3", batch_size=4, epochs=1),
    "classify by positions": SMALL["classify"].replace(head="mil", mixup=0.4, loss="focal", pos_weight_power=1.0),
    "classify with a transformer": SMALL["classify"].replace(
        backbone="timm:vit_tiny_patch16_224", head="attention", mixup=0.4, loss="asymmetric", layer_decay=0.7
    ),
    "detect by AdamW": SMALL["detect"].replace(optimizer="adamw", epochs=20, close_mosaic=0, mixup=0.5),
    "lungs in two stages": SMALL["lungs"].replace(warmup_size=16, warmup_epochs=1),
}

# Families whose training step must wait for the device: in which files, and why.
WAITS: dict[str, dict[str, str]] = {}


def given(recipe: Recipe) -> Iterator[Batch]:
    """Two batches of four images, as large as the recipe needs them."""
    return some_batches(size=max(40, recipe.size))


def engine_on(device: torch.device | str, recipe: Recipe, workers: Communicator | None = None) -> Engine:
    """An engine in the first stage of a new run, seeded."""
    torch.manual_seed(0)
    task, workers = recipe.task(recipe.network(schema.FINDINGS)), workers or SingleProcess()
    engine = Engine(task, recipe, workers, steps_per_epoch=2, device=torch.device(device))
    engine.task.begin(lambda: engine.moved(given(recipe)), workers)
    return engine


def train(
    engine: Engine, around_step: Callable[[], AbstractContextManager[object]] = nullcontext
) -> dict[str, float]:
    """An epoch of two steps in every stage, each step within `around_step`. Returns the last validation's metrics."""
    metrics: dict[str, float] = {}
    for stage in engine.recipe.stages():
        engine.enter(stage)
        engine.task.train()
        for batch in engine.moved(some_batches()):
            with around_step():
                engine.step(batch)
        metrics = engine.finish_epoch(some_batches)
    return metrics


def resumed(engine: Engine) -> Engine:
    """Another engine, resumed from a checkpoint of this one, which is read to the CPU."""
    state = [engine.state(), checkpoint.task_state(engine.task)]
    of_engine, of_task = tree_map_only(Tensor, lambda values: values.cpu().clone(), state)
    other = engine_on(engine.device, engine.recipe, engine.workers)
    other.enter(engine.stage)
    checkpoint.restore_task_state(other.task, of_task)
    other.restore(of_engine)
    return other


@torch.inference_mode()
def use(engine: Engine) -> pa.Table:
    """What `score_archive` does with a trained network: scores, pictures, and latents where there are any."""
    recipe, network = engine.recipe, engine.shipped().eval()
    batch = next(engine.moved(some_batches()))
    count, side = batch[schema.PIXELS].shape[:2]
    known = {schema.RESIZE_TRANSFORM: [ResizeTransform().as_dict()] * count}
    known |= {schema.HEIGHT_PX: [side] * count, schema.WIDTH_PX: [side] * count}
    pictures = [*recipe.render(network, batch).values()]
    context = ScoringContext(schema.FINDINGS, side)
    if isinstance(recipe, LatentEncoder) and (stored := _latent_size(recipe)):
        encoded = {schema.PIXELS: recipe.encode(network, batch)}
        assert encoded[schema.PIXELS].cpu().numpy().shape == (count, stored, stored)
        recipe.scored(recipe.predict_latents(network, encoded), pa.table(known), context)
        pictures += recipe.render_latents(network, encoded).values()
    assert all(picture.cpu().numpy().dtype == "uint8" for picture in pictures)
    return recipe.scored(recipe.predict(network, batch), pa.table(known), context)


def _latent_size(recipe: LatentEncoder) -> int:
    """Side of the latents in pixels; 0 if they are too small for an archive."""
    try:
        return recipe.latent_format().size
    except UserError:
        return 0


@contextmanager
def same_noise() -> Iterator[None]:
    """Sample the noise of pixels on the CPU; it is the only random value that the device samples itself."""
    with mock.patch.object(affine_exposure, "pixel_noise", lambda like, *_: torch.randn(like.shape).to(like.device)):
        yield


def augmented(engine: Engine) -> list[Batch]:
    """The augmented batch of the first step of every stage, on the CPU; random values are equal on all devices."""
    shown = []
    for stage in engine.recipe.stages():
        engine.enter(stage)
        engine.task.train()
        torch.manual_seed(1)
        with same_noise():
            batch = engine.task.augment(next(engine.moved(given(engine.recipe))))
        shown.append({name: values.cpu() for name, values in batch.items()})
    return shown


def losses(engine: Engine, shown: list[Batch]) -> list[dict[str, float]]:
    """The loss terms and the gradient's norm of every stage's first step, on batches that are augmented already.

    Each stage begins with the weights that the engine has: were they those that the stage before has learned, small
    differences between devices would have grown.
    """
    terms, begun = [], copy.deepcopy(engine.task.network.state_dict())
    with mock.patch.object(engine.task, "augmented", lambda batch: batch):
        for stage, batch in zip(engine.recipe.stages(), shown, strict=True):
            engine.enter(stage)
            engine.task.train()
            engine.task.network.load_state_dict(begun)
            moved = next(engine.moved(iter([batch])))
            terms.append({name: value.item() for name, value in engine.step(moved).items()})
    return terms


def not_channels_last(engine: Engine) -> list[str]:
    """Names of the convolutions that a step in bfloat16 gives weights, or takes results from, with channels first."""
    found: list[str] = []

    def check(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, _: object, out: Tensor) -> None:
            held = (module.weight, out)
            if not all(values.is_contiguous(memory_format=torch.channels_last) for values in held):
                found.append(name)

        return hook

    for name, module in engine.task.network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(check(name))
    engine.task.train()
    engine.step(next(engine.moved(some_batches())))
    return found
