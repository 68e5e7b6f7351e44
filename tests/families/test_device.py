"""Every family trains and is used on a device that is not the CPU, and no training step waits for it.

The device is a stand-in (`fake_cuda`); `tests/gpu` makes the same demands on a GPU.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cxr.families import RECIPES as FAMILIES
from cxr.families import lung_pretraining
from cxr.families.lung_pretraining import LungTraining
from cxr.training.engine import Engine
from tests.by_family import by_family
from tests.device_run import RECIPES, WAITS, augmented, engine_on, losses, not_channels_last, resumed, train, use
from tests.fake_cuda import DEVICE, FakeCuda, FakeNccl, Sync
from tests.families.test_recipes import some_batches

REPOSITORY = Path(__file__).parents[2]
CASES = by_family(RECIPES, quick={"classify", "lungs"})


@dataclass
class Trained:
    """Results of an epoch of two steps of each stage, and how often these steps waited for the device."""

    engine: Engine
    folder: Path
    metrics: dict[str, float]
    waits: list[Sync]


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder, waits = tmp_path_factory.mktemp("device"), []
    with FakeCuda() as cuda:

        @contextmanager
        def noted() -> Iterator[None]:
            before = len(cuda.syncs)
            yield
            waits.extend(cuda.syncs[before:])

        engine = engine_on(DEVICE, RECIPES[request.param], FakeNccl())
        return Trained(engine, folder, train(engine, noted), waits)


@pytest.fixture
def _cuda() -> Iterator[None]:
    with FakeCuda():
        yield


def test_every_family_is_covered() -> None:
    assert {recipe.family for recipe in RECIPES.values()} == set(FAMILIES)


@pytest.mark.usefixtures("_cuda")
def test_a_family_trains_on_the_device(trained: Trained) -> None:
    assert trained.engine.recipe.monitor in trained.metrics
    assert {values.device for values in trained.engine.task.state_dict().values()} == {DEVICE}


def test_a_training_step_waits_for_the_device_only_where_it_must(trained: Trained) -> None:
    places = "\n".join(sorted(set(map(str, trained.waits))))
    assert {sync.file for sync in trained.waits} == set(WAITS.get(trained.engine.recipe.family, {})), places


@pytest.mark.usefixtures("_cuda")
def test_a_network_on_the_device_predicts_and_saves_pictures(trained: Trained) -> None:
    assert use(trained.engine).num_rows == 4
    trained.engine.task.save_pictures(lambda: trained.engine.moved(some_batches()), trained.folder, list("abcd"))
    assert any(trained.folder.glob("*.png"))


@pytest.mark.usefixtures("_cuda")
def test_training_resumes_from_a_checkpoint_on_the_device(trained: Trained) -> None:
    again = resumed(trained.engine)
    terms = again.step(next(again.moved(some_batches())))
    assert all(math.isfinite(value) for value in terms.values())


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("name", CASES)
def test_workers_exchange_only_device_tensors(name: str) -> None:
    engine = engine_on(DEVICE, RECIPES[name], FakeNccl(2))
    engine.task.train()
    engine.task(engine.task.augment(next(engine.moved(some_batches()))))
    assert engine.recipe.monitor in engine.finish_epoch(some_batches)


@pytest.mark.parametrize("name", CASES)
def test_augmentation_and_losses_on_the_device_equal_those_on_the_cpu(name: str) -> None:
    recipe = RECIPES[name].replace(precision="float32")
    on_cpu = engine_on("cpu", recipe)
    shown = augmented(on_cpu)
    expected = losses(on_cpu, shown)
    with FakeCuda():
        on_device = engine_on(DEVICE, recipe)
        torch.testing.assert_close(augmented(on_device), shown, rtol=0, atol=0, equal_nan=True)
        found = losses(on_device, shown)
    assert found == [pytest.approx(terms, rel=1e-5) for terms in expected]


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("name", CASES)
def test_channels_stay_last_in_bfloat16(name: str) -> None:
    assert not_channels_last(engine_on(DEVICE, RECIPES[name].replace(precision="bfloat16"))) == []


@pytest.mark.usefixtures("_cuda")
def test_the_lung_network_is_trained_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lung_pretraining, "HELD_OUT", 2)
    network, metrics = lung_pretraining.train(LungTraining(sizes=(32, 48), phantoms=2, steps=2), DEVICE)
    assert {parameter.device for parameter in network.parameters()} == {DEVICE}
    assert 0 <= metrics["iou"] <= metrics["dice"] <= 1


ABSENT = "ray,matplotlib,torchmetrics,imagecodecs,pylibjpeg,openjpeg,libjpeg,jpeg_ls,sklearn,tensorboard,moto"
BARE = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, *args)
absent = sys.argv[1].split(",")
sys.meta_path[:] = map(Without, sys.meta_path)
"""
SKIPPED = """
import pytest
sys.exit(pytest.main(["-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-rs"]))
"""
RUN = """
from tests.by_family import by_family
from tests.device_run import RECIPES, engine_on, resumed, train, use
from tests.fake_cuda import DEVICE, FakeCuda
with FakeCuda():
    for recipe in RECIPES.values():
        engine = engine_on(DEVICE, recipe)
        train(engine)
        use(engine)
        resumed(engine)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [SKIPPED, RUN], ids=["collected", "run"])
def test_gpu_tests_import_neither_ray_nor_packages_of_reports(code: str, tmp_path: Path) -> None:
    """Where these packages are not installed, they are collected, and skipped for want of a GPU; their calls run."""
    done = subprocess.run(
        [sys.executable, "-c", BARE + code, ABSENT],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert code == RUN or "no CUDA device" in done.stdout
