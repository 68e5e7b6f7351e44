"""Every family on a GPU: shows the images that the CPU shows, learns the same from them, and does not wait.

`make test-gpu` runs these tests. They need no Ray; what they do with a family is in `tests.device_run`, and is tried
on a stand-in for a GPU by `tests/families/test_device.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cxr import schema
from tests.device_run import RECIPES, WAITS, augmented, engine_on, losses, not_channels_last, resumed, train, use
from tests.fake_cuda import FakeNccl
from tests.families.test_autocast import short_products
from tests.families.test_recipes import some_batches

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("name", sorted(RECIPES))]
DEVICE = torch.device("cuda:0")
SIDE = 256  # at which coordinates that are off by little show


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    """Without TF32: float32 has all of its bits, as on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    matrices.allow_tf32 = convolutions.allow_tf32 = False
    yield
    matrices.allow_tf32, convolutions.allow_tf32 = before


def test_a_family_trains_resumes_and_is_used(tmp_path: Path, name: str) -> None:
    engine = engine_on(DEVICE, RECIPES[name], FakeNccl())
    assert engine.recipe.monitor in train(engine)
    assert {values.device for values in engine.task.state_dict().values()} == {DEVICE}
    assert use(engine).num_rows == 4
    if importlib.util.find_spec("matplotlib"):
        engine.task.save_pictures(lambda: engine.moved(some_batches()), tmp_path, list("abcd"))
    again = resumed(engine)
    assert all(math.isfinite(value) for value in again.step(next(again.moved(some_batches()))).values())


def test_augmentation_on_the_gpu_equals_that_on_the_cpu(name: str) -> None:
    """Pixels, boxes and masks of an augmented batch, by the same random parameters."""
    recipe = RECIPES[name].replace(size=SIDE, precision="float32")
    expected = augmented(engine_on("cpu", recipe))
    for found, wanted in zip(augmented(engine_on(DEVICE, recipe)), expected, strict=True):
        assert found.keys() == wanted.keys()
        for column, values in wanted.items():
            assert found[column].dtype == values.dtype
            if column == schema.MASKS:  # a pixel on the outline may fall on either side
                assert (found[column] != values).float().mean() < 1e-3
            else:
                most = 1e-5 if column == schema.BOXES else 2e-4
                torch.testing.assert_close(found[column], values, rtol=0, atol=most, equal_nan=True)


def test_training_on_the_gpu_equals_that_on_the_cpu(name: str) -> None:
    """Loss terms and the gradient's norm in float32, on the same augmented images."""
    recipe = RECIPES[name].replace(precision="float32")
    on_cpu = engine_on("cpu", recipe)
    shown = augmented(on_cpu)
    expected, found = losses(on_cpu, shown), losses(engine_on(DEVICE, recipe), shown)
    assert found == [pytest.approx(terms, rel=1e-3, abs=1e-5) for terms in expected]


def test_a_training_step_waits_for_the_gpu_only_where_it_must(name: str) -> None:
    engine = engine_on(DEVICE, RECIPES[name])
    train(engine)  # one-time work, such as cuDNN's choice of algorithms, is done
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        torch.ones(1, device=DEVICE).item()
    if RECIPES[name].family not in WAITS:
        train(engine, waiting_is_an_error)
        return
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        train(engine, waiting_is_an_error)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_only_layers_of_networks_compute_in_bfloat16(name: str) -> None:
    engine = engine_on(DEVICE, RECIPES[name].replace(precision="bfloat16"))
    assert engine.casts
    for stage in engine.recipe.stages():
        engine.enter(stage)
        engine.task.train()
        batch = engine.task.augment(next(engine.moved(some_batches())))
        assert {values.dtype for values in batch.values() if values.is_floating_point()} <= {torch.float32}
        with short_products() as noted, torch.autocast("cuda", torch.bfloat16):
            engine.task(batch)
        assert noted.found == []
        assert noted.in_layers > 0


def test_channels_stay_last_in_bfloat16(name: str) -> None:
    assert not_channels_last(engine_on(DEVICE, RECIPES[name].replace(precision="bfloat16"))) == []
