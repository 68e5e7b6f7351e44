"""Geometry is float32: autocast changes nothing of what training shows, and casts only the layers of networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cxr import schema
from cxr.data.batch import Batch
from cxr.families.align import AlignRecipe
from cxr.families.base import Recipe, SingleProcess, Stage
from cxr.families.lungs import LungsRecipe
from cxr.training.engine import Engine
from tests.by_family import QUICK, by_family
from tests.families.test_recipes import SMALL, engine_of, some_batches

EVERY = SMALL | {
    "align with lungs": AlignRecipe(
        size=32, backbone="conv3", batch_size=4, epochs=1, iterations=2, parameterization="affine"
    ),
    "classify with a transformer": SMALL["classify"].replace(
        backbone="timm:vit_tiny_patch16_224", head="attention", mixup=0.4, loss="asymmetric"
    ),
    "classify by positions": SMALL["classify"].replace(head="mil", mixup=0.4),
    "detect with mixup": SMALL["detect"].replace(
        epochs=20, mosaic=0.5, mixup=0.5, rotation_deg=10.0, shear_deg=5.0, close_mosaic=0
    ),
    "lungs without elastic": SMALL["lungs"].replace(elastic=0.0),
    "localize with exposure": SMALL["localize"].replace(rotation_deg=10.0, max_zoom=1.2, translate=0.1, exposure=1.0),
}
BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.fixture(params=by_family(EVERY, quick=QUICK | {"align with lungs", "classify with a transformer"}))
def engine(request: pytest.FixtureRequest) -> Engine:
    """An engine that trains in bfloat16, also on CPUs without bfloat16 arithmetic."""
    recipe = EVERY[request.param]
    if request.param != "align with lungs":
        made = engine_of(recipe)
    else:  # whose lung network need not have learned anything here
        torch.manual_seed(0)
        task = recipe.task(recipe.network(()))
        made = Engine(task, recipe, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))
    made.casts = True
    return made


def each_stage(engine: Engine) -> Iterator[Stage]:
    for stage in engine.recipe.stages():
        engine.enter(stage)
        engine.task.train()
        yield stage


def augmented(engine: Engine, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    return engine.task.augment(next(some_batches()))


def assert_same(found: Batch, wanted: Batch) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0, equal_nan=True, msg=name)


def test_autocast_does_not_change_augmentation(engine: Engine) -> None:
    for _ in each_stage(engine):
        wanted = augmented(engine)
        with torch.autocast(**BFLOAT16):
            assert_same(augmented(engine), wanted)
        assert wanted[schema.PIXELS].dtype == torch.float32


def test_the_engine_augments_outside_autocast_even_if_its_caller_is_inside(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, shown = engine.task.forward, []

    def noted(batch: Batch) -> dict[str, Tensor]:
        shown.append(batch)
        return forward(batch)

    monkeypatch.setattr(engine.task, "forward", noted)
    for _ in each_stage(engine):
        wanted = augmented(engine)
        torch.manual_seed(0)
        with torch.autocast(**BFLOAT16):
            terms = engine.step(next(some_batches()))
        assert_same(shown[-1], wanted)
        assert all(value.isfinite() for value in terms.values())


def test_augmentation_differs_in_every_step_and_leaves_the_batch_as_it_is(engine: Engine) -> None:
    for _ in each_stage(engine):
        given, copied = next(some_batches()), {name: values.clone() for name, values in next(some_batches()).items()}
        first, second = (engine.task.augment(given) for _ in range(2))
        assert_same(given, copied)
        if not isinstance(engine.recipe, AlignRecipe):
            assert not torch.equal(first[schema.PIXELS], second[schema.PIXELS])
        assert any(not torch.equal(first[name], second[name]) for name in first)


class ShortProducts(TorchDispatchMode):
    """Notes operations in bfloat16 that are geometry, or matrix products outside of a layer with weights."""

    LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
    PRODUCTS = ("mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "dot", "convolution", "linear")
    MULTIPLIES = "affine_grid_generator"  # matrices, inside of PyTorch; `cxr.precision.affine_grid` does not

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.found: list[str] = []
        self.in_layers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        short = any(isinstance(each, Tensor) and each.dtype == torch.bfloat16 for each in tree_leaves((args, kwargs)))
        if short and self.inside and name in self.PRODUCTS:
            self.in_layers += 1
        elif (short and name in (*self.PRODUCTS, "grid_sampler_2d")) or name == self.MULTIPLIES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def short_products() -> Iterator[ShortProducts]:
    mode = ShortProducts()

    def count(by: int) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            mode.inside += by * isinstance(module, mode.LAYERS)

        return hook

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(count(1)).remove)
        stack.callback(register_module_forward_hook(count(-1)).remove)
        stack.enter_context(mode)
        yield mode


def test_under_autocast_only_layers_compute_in_bfloat16(engine: Engine) -> None:
    for _ in each_stage(engine):
        batch = augmented(engine)
        with short_products() as noted, torch.autocast(**BFLOAT16):
            engine.task(batch)
        assert noted.found == []
        assert noted.in_layers > 0, "the networks themselves are cast"


def test_a_matrix_product_outside_layers_is_reported() -> None:
    a, layer = torch.rand(2, 3, 3), nn.Linear(3, 3)
    with short_products() as noted, torch.autocast(**BFLOAT16):
        layer(a)
        a @ a
        torch.nn.functional.affine_grid(a[:, :2], [2, 1, 4, 4], align_corners=False)
    assert noted.found == ["bmm", "affine_grid_generator"]
    assert noted.in_layers == 1


def test_masks_are_augmented_without_elastic_deformation_under_autocast() -> None:
    recipe = LungsRecipe(size=32, warmup_size=0, warmup_epochs=0, batch_size=4, epochs=1, elastic=0.0)
    trained = engine_of(recipe)
    trained.casts = True
    assert trained.epoch(some_batches())["loss"] > 0


@pytest.mark.parametrize("transform", ["similarity", "anisotropic", "affine"])
def test_transforms_of_the_same_features_are_the_same_under_autocast(transform: str) -> None:
    """Frames of an aligner whose backbone sees nothing, so that only the geometry after it could differ."""
    settings: dict[str, Any] = {"iterations": 3, "parameterization": transform, "identity_weight": 1.0}
    recipe = AlignRecipe(size=64, backbone="conv3", lungs=False, **settings)
    torch.manual_seed(0)
    task = recipe.task(recipe.network(()))
    nn.init.normal_(task.network.head.weight, std=0.1)  # pyright: ignore
    nn.init.normal_(task.network.head.bias, std=0.3)  # pyright: ignore
    task.network.backbone = Constant()
    batch, frames = task.augment(next(some_batches(size=64))), []
    task.workers = SimpleNamespace(all_rows=lambda rows: frames.append(rows.detach()) or rows)  # pyright: ignore
    task(batch)
    with torch.autocast(**BFLOAT16):
        task(batch)
    assert frames[0].dtype == frames[1].dtype == torch.float32
    assert (frames[0] - frames[1]).abs().max() < 1e-6
    assert (frames[0][:, :, :2] - torch.eye(2)).abs().max() > 0.05


class Constant(nn.Module):
    """The same 128 features of every image, in bfloat16 numbers."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (torch.arange(128) / 64 - 1).expand(len(x_BCHW), -1)


@pytest.mark.parametrize("family", by_family(SMALL))
def test_a_step_in_bfloat16_is_nearly_that_in_float32(family: str) -> None:
    """Not a claim about geometry, which the tests above make: the losses are of the same images."""

    def terms(recipe: Recipe, casts: bool) -> dict[str, Tensor]:
        trained = engine_of(recipe)
        trained.casts = casts
        trained.task.train()
        torch.manual_seed(0)
        return trained.step(next(some_batches()))

    short, long = (terms(SMALL[family], casts) for casts in (True, False))
    for name in long.keys() - {"grad_norm"}:
        assert short[name].item() == pytest.approx(long[name].item(), rel=0.05, abs=0.02), name
