"""Batch norm of several workers: SyncBatchNorm on GPUs, under the same names, and a note where it cannot be had."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cxr import schema
from cxr.families.base import Communicator, Recipe, SingleProcess
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.training import batch_norm
from cxr.training.engine import Engine
from cxr.training.worker import Worker
from tests.fake_cuda import DEVICE, FakeCuda, FakeNccl
from tests.families.test_recipes import SMALL, some_batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WITH_NORMS = [SMALL[family] for family in ("aecnn", "attend", "detect", "localize", "pneumothorax")]


def norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("recipe", WITH_NORMS, ids=lambda recipe: recipe.family)
def test_synchronized_norms_have_the_names_and_parameters_of_plain_ones(recipe: Recipe) -> None:
    plain = recipe.network(schema.FINDINGS)
    before = {name: id(values) for name, values in plain.named_parameters()}
    state, count = plain.state_dict(), len(norms(plain))
    network = batch_norm.synchronized(plain)
    assert network is plain
    assert len(norms(network)) == count > 0
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(network))
    assert {name: id(values) for name, values in network.named_parameters()} == before
    recipe.network(schema.FINDINGS).load_state_dict(network.state_dict())
    network.load_state_dict(state)
    assert network.state_dict().keys() == state.keys()


def test_a_frozen_backbone_stays_frozen() -> None:
    recipe = PneumothoraxRecipe(size=32, backbone="resnet18", backbone_pretrained="/x", freeze_backbone=True)
    network = batch_norm.synchronized(recipe.network(())).train()
    frozen = [norm for norm in norms(network) if not norm.training]
    assert len(frozen) == 20
    assert not any(values.requires_grad for norm in frozen for values in norm.parameters())
    assert any(norm.training for norm in norms(network)), "those of the decoder learn"


@pytest.mark.parametrize(
    ("workers", "wanted", "synchronized"),
    [(FakeNccl(2), True, True), (FakeNccl(2), False, False), (SingleProcess(), True, False)],
)
def test_several_gpus_share_statistics_unless_that_is_off(
    workers: Communicator, wanted: bool, synchronized: bool
) -> None:
    recipe = SMALL["localize"].replace(sync_batch_norm=wanted, ema=0.9)
    with FakeCuda():
        task = recipe.task(recipe.network(schema.FINDINGS))
        engine = Engine(task, recipe, workers, steps_per_epoch=2, device=DEVICE)
        for network in (engine.task.network, engine.shipped()):
            assert {isinstance(norm, nn.SyncBatchNorm) for norm in norms(network)} == {synchronized}
        assert engine.shipped().state_dict().keys() == recipe.network(schema.FINDINGS).state_dict().keys()


def test_workers_on_cpus_have_their_own_statistics_and_the_log_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = SMALL["localize"].network(schema.FINDINGS)
    few = batch_norm.note(network, 8, 2, CPU)
    assert (
        "each of the 8 workers computes its own statistics over 2 of the 16 images of a step, because only GPUs"
        in few
    )
    assert "With fewer than" in few
    assert "With fewer than" not in batch_norm.note(network, 2, 16, CPU)
    assert "because sync_batch_norm is off" in batch_norm.note(network, 2, 16, GPU)
    recipe = SMALL["localize"].replace(batch_size=16)
    engine = Engine(recipe.task(network), recipe, FakeNccl(8), steps_per_epoch=2, device=CPU)
    for rank in range(8):
        workers = FakeNccl(8)
        workers.rank = rank
        Worker(recipe, {}, workers, CPU)._say_what_batches_affect(engine)
    assert capsys.readouterr().out == f"note: {few}\n"


def test_no_note_if_the_number_of_workers_has_no_effect() -> None:
    network = SMALL["localize"].network(schema.FINDINGS)
    assert batch_norm.note(network, 1, 2, CPU) == ""
    assert batch_norm.note(SMALL["align"].network(()), 8, 2, CPU) == "", "no batch norm"
    assert batch_norm.note(network.requires_grad_(False), 8, 2, CPU) == "", "frozen"
    assert batch_norm.note(batch_norm.synchronized(SMALL["localize"].network(schema.FINDINGS)), 8, 2, GPU) == ""


def test_a_mosaic_from_the_window_does_not_wait_for_the_device() -> None:
    recipe = SMALL["detect"].replace(mosaic=1.0, mixup=1.0, close_mosaic=0)
    with FakeCuda() as cuda:
        task = recipe.task(recipe.network(schema.FINDINGS)).to(DEVICE).train()
        batches = [{name: values.to(DEVICE) for name, values in batch.items()} for batch in some_batches(3)]
        cuda.syncs.clear()
        for batch in task.look_ahead(iter(batches)):
            task.augment(batch)
        assert cuda.syncs == []
