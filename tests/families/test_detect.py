"""Training a detector: the same steps as Ultralytics' code, training targets, initial weights, scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import HAS_BOXES, Batch
from cxr.errors import UserError
from cxr.families import detect
from cxr.families.base import ScoringContext, SingleProcess, unit_pixels
from cxr.families.detect import PREDICTIONS, UNKNOWN, DetectRecipe, DetectTask, first_boxes, fused
from cxr.models.classifier import norm_layers
from cxr.models.detection_loss import covered
from cxr.models.yolo import Yolo, ultralytics
from cxr.schema import MOST_BOXES
from cxr.training.engine import Engine

FINDINGS = ("Mass", "Nodule")
STILL: dict[str, Any] = {"mosaic": 0, "translate": 0, "scale_jitter": 0, "flip": 0, "hsv_v": 0}
STEPS, EPOCHS = 4, 3
RECIPE = DetectRecipe(size=64, batch_size=4, epochs=EPOCHS, accumulate=2, warmup=0.4, weight_decay=0.05, **STILL)


def some_batches(steps: int = STEPS) -> Iterator[Batch]:
    """Noise with a bright box an image."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pixels = torch.randint(100, (4, 64, 64), generator=rng)
        boxes = torch.full((4, MOST_BOXES, 5), math.nan)
        for i in range(4):
            left, top = torch.randint(0, 32, (2,), generator=rng).tolist()
            pixels[i, top : top + 24, left : left + 24] += 150
            boxes[i, 0] = torch.tensor([i % 2, left / 64, top / 64, (left + 24) / 64, (top + 24) / 64])
        yield {
            schema.PIXELS: pixels.to(torch.uint8),
            schema.BOXES: boxes,
            HAS_BOXES: torch.ones(4, dtype=torch.bool),
            schema.LABELS: torch.eye(2, dtype=torch.int8).repeat(2, 1),
        }


def engine_of(recipe: DetectRecipe, network: Yolo | None = None) -> Engine:
    torch.manual_seed(0)
    task = recipe.task(network or recipe.network(FINDINGS))
    return Engine(task, recipe, SingleProcess(), steps_per_epoch=STEPS, device=torch.device("cpu"))


def plain_rates(move: int, moves: int, kind: str) -> tuple[float, float]:
    """Learning rate and momentum as Ultralytics' trainer sets them before a move."""
    args, warmup = RECIPE, round(RECIPE.warmup * EPOCHS * moves)
    epoch = move // moves
    rate = args.lr * (max(1 - epoch / EPOCHS, 0) * (1.0 - args.final_lr_fraction) + args.final_lr_fraction)
    if move > warmup:
        return rate, args.momentum
    first = args.warmup_bias_lr if kind == "bias" else 0.0
    span = [0, warmup]
    return np.interp(move, span, [first, rate]), np.interp(move, span, [args.warmup_momentum, args.momentum])


def ultralytics_loss(criterion: Any, network: Yolo, batch: Batch) -> Tensor:
    """Of images with one box each."""
    index, low, high = batch[schema.BOXES][:, 0].split([1, 2, 2], 1)
    boxes = {
        "batch_idx": torch.arange(len(index)),
        "cls": index,
        "bboxes": torch.cat([(low + high) / 2, high - low], 1),
    }
    return criterion(network(unit_pixels(batch, 64)), boxes)[0]


def plain_training(network: Yolo) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and their moving average after training with Ultralytics' optimizer, loss and average."""
    trainer, average = ultralytics("engine.trainer").BaseTrainer, ultralytics("utils.torch_utils").ModelEMA
    decay = RECIPE.weight_decay * 4 * 2 / 64
    optimizer = trainer.build_optimizer(None, network.detector, "SGD", RECIPE.lr, RECIPE.momentum, decay)
    slow, criterion = average(network.detector), network.detector.init_criterion()
    network.train()
    for step, batch in enumerate(batch for _ in range(EPOCHS) for batch in some_batches()):
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = plain_rates(step // 2, STEPS // 2, group["param_group"])
        ultralytics_loss(criterion, network, batch).sum().backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            slow.update(network.detector)
    return network.detector.state_dict(), slow.ema.state_dict()


def test_steps_equal_those_of_ultralytics() -> None:
    """Parameter groups, rates, momentum, decay, the scale and clipping of gradients, the moving average."""
    torch.manual_seed(0)
    network = RECIPE.network(FINDINGS)
    engine = engine_of(RECIPE, network)
    begun = copy.deepcopy(network)
    begun.detector.args = SimpleNamespace(  # pyright: ignore
        box=RECIPE.box_weight, cls=RECIPE.class_weight, dfl=RECIPE.dfl_weight
    )
    network.detector.args = begun.detector.args
    criterion = network.detector.init_criterion()  # pyright: ignore
    weights, average = plain_training(begun)
    engine.task.forward = lambda batch: dict(  # of the same values as ours, but for rounding, which grows quickly
        zip("abc", ultralytics_loss(criterion, network, batch) / len(batch[schema.PIXELS]), strict=True)
    )
    for _ in range(EPOCHS):
        engine.epoch(some_batches())
    ours, shipped = engine.task.network.detector.state_dict(), engine.shipped().detector.state_dict()  # pyright: ignore
    for name, value in weights.items():
        assert torch.allclose(ours[name].float(), value.float(), atol=2e-4), name
    for name, value in average.items():
        if "num_batches" not in name:
            assert torch.allclose(shipped[name], value, atol=2e-3), name


@pytest.mark.parametrize(("optimizer", "named"), [("sgd", "SGD"), ("adamw", "AdamW")])
def test_parameter_groups_equal_those_of_ultralytics(optimizer: str, named: str) -> None:
    recipe = RECIPE.replace(optimizer=optimizer)
    network = recipe.network(FINDINGS)
    ours = recipe.make_optimizer(recipe.task(network), recipe.stages()[0], fused=False)
    build = ultralytics("engine.trainer").BaseTrainer.build_optimizer
    theirs = build(None, network.detector, named, recipe.lr, recipe.momentum, recipe.weight_decay / 8)
    assert type(ours) is type(theirs)
    of_kind = {group["param_group"]: group for group in theirs.param_groups}
    for kind, group in zip(("weight", "bn", "bias"), ours.param_groups, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in of_kind[kind]["params"] if p.requires_grad}
        for name in set(group) - {"params", "fused"}:
            assert group[name] == pytest.approx(of_kind[kind][name]), (kind, name)


def test_adamw_warms_up_all_rates_from_zero() -> None:
    engine = engine_of(RECIPE.replace(optimizer="adamw"))
    rates = []
    for _ in range(EPOCHS * 2):
        rates.append({group["lr"] for group in engine.optimizer.param_groups})
        engine.optimizer.step()
        engine.schedule.step()
    assert all(len(of_move) == 1 for of_move in rates)
    assert [rate for (rate,) in rates] == pytest.approx([plain_rates(move, 2, "weight")[0] for move in range(6)])


def test_rates_and_momentum_follow_ultralytics_schedule_also_after_resuming() -> None:
    engine, other = engine_of(RECIPE), engine_of(RECIPE)
    for move in range(EPOCHS * 2):
        if move == 3:
            other.restore(engine.state())
            engine = other
        for kind, group in zip(("weight", "bn", "bias"), engine.optimizer.param_groups, strict=True):
            assert (group["lr"], group["momentum"]) == pytest.approx(plain_rates(move, 2, kind)), (move, kind)
        engine.optimizer.step()
        engine.schedule.step()


@pytest.mark.slow
def test_a_detector_overfits_a_few_images() -> None:
    settings = STILL | {"optimizer": "adamw", "lr": 2e-3}  # SGD's result would depend on rounding
    recipe = DetectRecipe(size=64, batch_size=4, epochs=30, warmup=0.1, ema=0, close_mosaic=0, **settings)
    torch.manual_seed(0)
    task = recipe.task(recipe.network(FINDINGS))
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=8, device=torch.device("cpu"))
    for _ in range(18):
        engine.epoch(batch for _ in range(2) for batch in some_batches(4))
    assert engine.finish_epoch(lambda: some_batches(4))["map_50"] > 0.7


def test_the_last_epochs_have_no_mosaic() -> None:
    recipe = DetectRecipe(size=64, epochs=3, close_mosaic=1, mixup=0.5)
    task = recipe.task(recipe.network(FINDINGS))
    shares = []
    for _ in range(3):
        task.train()
        shares.append((task.variation.mosaic, task.variation.mixup))
        task.end_epoch(SingleProcess())
    assert shares == [(1, 0.5), (1, 0.5), (0, 0)]
    assert task.variation.scale_jitter == recipe.scale_jitter


def task_of(recipe: DetectRecipe) -> DetectTask:
    """A task whose batch norms are fixed: else all images of a batch depend on one another."""
    torch.manual_seed(0)
    task = recipe.task(recipe.network(FINDINGS)).train()
    for layer in norm_layers(task.network):
        layer.eval()
    return task


def gradients(task: DetectTask, batch: Batch) -> Tensor:
    """Gradient of the loss with respect to each anchor's logits, (B, findings, A): 0 for unknown findings."""
    held = {}
    keep = task.network.register_forward_hook(lambda module, given, raw: held.update(scores=raw["scores"]))
    terms = task(batch)
    keep.remove()
    (gradient,) = torch.autograd.grad(sum(terms.values()), held["scores"])
    return gradient


@pytest.mark.parametrize("label", [schema.POSITIVE, schema.UNKNOWN])
def test_a_finding_without_a_box_is_background_only_if_its_label_is_negative(label: int) -> None:
    """The first two images have boxes of one finding each, the others have none."""
    task = task_of(RECIPE)
    (batch,) = some_batches(1)
    batch[schema.BOXES][2:] = math.nan
    batch[schema.LABELS] = torch.tensor([[1, 0], [label, 1], [0, label], [label, label]], dtype=torch.int8)
    taught = gradients(task, batch) != 0
    assert taught.all(2).tolist() == [[True, True], [False, True], [True, False], [False, False]]
    assert taught.any(2).equal(taught.all(2)), "an anchor teaches as its image does"
    excluding = gradients(task_of(RECIPE.replace(incomplete_boxes="exclude")), batch) != 0
    assert excluding.any(2).tolist() == [[True, True], [False, False], [False, False], [False, False]]


def test_unknown_findings_of_an_image_move_with_it_into_mosaics() -> None:
    """Bright images may show the second finding anywhere, dark ones do not show it."""
    task = task_of(DetectRecipe(size=64, batch_size=8, mosaic=0.7, mixup=0, hsv_v=0, flip=0.5, scale_jitter=0.5))
    bright = torch.arange(8) % 2 == 1
    batch = {
        schema.PIXELS: torch.where(bright[:, None, None], 250, 20).expand(-1, 64, 64).to(torch.uint8),
        schema.BOXES: torch.full((8, 3, 5), math.nan),
        schema.LABELS: torch.stack([torch.zeros(8), torch.where(bright, -1, 0)], 1).to(torch.int8),
    }
    shown = task.augment(batch)
    at = (torch.arange(64) + 0.5) / 64
    points = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).view(-1, 2)
    unknown = covered(shown[UNKNOWN], points, 2).view(8, 64, 64, 2)
    assert not unknown[..., 0].any()
    x = shown[schema.PIXELS]
    assert unknown[..., 1][x > 0.97].all(), "of a bright image, edges are blended with what lies beside"
    assert not unknown[..., 1][x < 0.4].any()
    assert 0.2 < unknown[..., 1].float().mean() < 0.8


def test_findings_with_too_many_boxes_for_a_mixed_image_are_unknown_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detect, "MOST_BOXES", 5)
    task = task_of(DetectRecipe(size=64, mixup=1, **STILL))
    boxes = torch.tensor([0.0, 0.4, 0.4, 0.6, 0.6]).repeat(4, 5, 1)
    boxes[:, 4, 0] = 1
    labels = torch.ones(4, 2, dtype=torch.int8)
    shown = task.augment({schema.PIXELS: torch.zeros(4, 64, 64), schema.BOXES: boxes, schema.LABELS: labels})
    assert shown[schema.BOXES].shape == (4, 5, 5)
    assert not shown[schema.BOXES].isnan().any()
    for regions in shown[UNKNOWN]:
        assert regions[~regions[:, 0].isnan()].tolist() == [[0, 0, 0, 1, 1], [1, 0, 0, 1, 1]]


def test_every_step_has_the_same_shapes_whichever_labels_are_known() -> None:
    """Else cuDNN searches for the fastest convolutions again and again, and the host waits for the numbers."""
    recipe = DetectRecipe(size=64, batch_size=4, mixup=0.5)
    task, shapes = recipe.task(recipe.network(FINDINGS)).train(), []
    (batch,) = some_batches(1)
    for known in ([True] * 4, [True, False, False, True], [False] * 4):
        known_B = torch.tensor(known)
        boxes = torch.where(known_B[:, None, None], batch[schema.BOXES], math.nan)
        labels = torch.where(known_B[:, None], batch[schema.LABELS], schema.UNKNOWN).to(torch.int8)
        augmented = task.augment(batch | {schema.BOXES: boxes, schema.LABELS: labels})
        shapes.append([augmented[name].shape for name in (schema.PIXELS, schema.BOXES, UNKNOWN)])
        terms = task(augmented)
        assert (terms["box"].item() > 0) == any(known)
        assert all(value.isfinite() for value in terms.values())
    assert shapes[0][:2] == [(4, 64, 64), (4, MOST_BOXES, 5)]
    assert shapes == [shapes[0]] * 3


def test_an_image_with_many_boxes_keeps_the_first_ones() -> None:
    boxes = torch.arange(60.0).view(1, 12, 5).repeat(2, 1, 1)
    boxes[0, ::2] = math.nan
    kept = first_boxes(boxes)[:, :5]
    assert kept[0, :, 0].tolist() == [5, 15, 25, 35, 45]
    assert kept[1, :, 0].tolist() == [0, 5, 10, 15, 20]


def test_an_archive_without_boxes_is_rejected() -> None:
    recipe = DetectRecipe(size=64)
    task = recipe.task(recipe.network(FINDINGS))
    (batch,) = some_batches(1)
    batch[schema.BOXES][:] = math.nan
    with pytest.raises(UserError, match="expected boxes, got a train split without any"):
        task.begin(lambda: iter([batch]), SingleProcess())


def test_validation_of_perfect_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = DetectRecipe(size=64)
    task = recipe.task(recipe.network(FINDINGS))

    def oracle(recipe: DetectRecipe, network: nn.Module, batch: Batch) -> Tensor:
        boxes = batch[schema.BOXES][:, :2]
        score = torch.where(boxes[..., :1].isnan(), math.nan, 0.9)
        return torch.cat([boxes[..., 1:], score, boxes[..., :1]], -1)

    monkeypatch.setattr(DetectRecipe, "boxes", oracle)
    metrics = task.evaluate(lambda: some_batches(2), SingleProcess())
    assert metrics == pytest.approx({"precision": 1, "recall": 1, "map_40": 1, "map_50": 1, "map_50_95": 1})


@pytest.mark.parametrize(
    ("label", "exact"), [(schema.POSITIVE, True), (schema.UNKNOWN, True), (schema.NEGATIVE, False)]
)
def test_validation_counts_no_false_positives_of_unknown_findings(
    label: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network predicts the ground-truth boxes and, with higher scores, the other finding in the same places."""
    task = task_of(DetectRecipe(size=64))

    def both(recipe: DetectRecipe, network: nn.Module, batch: Batch) -> Tensor:
        finding, corners = batch[schema.BOXES][:, :1].split([1, 4], -1)
        right, wrong = (
            torch.cat([corners, torch.full_like(finding, score), of], -1)
            for score, of in ((0.5, finding), (0.9, 1 - finding))
        )
        return torch.cat([wrong, right], 1)

    def some() -> Iterator[Batch]:
        for batch in some_batches(2):
            yield batch | {schema.LABELS: torch.where(batch[schema.LABELS] == 1, 1, label).to(torch.int8)}

    monkeypatch.setattr(DetectRecipe, "boxes", both)
    assert (task.evaluate(some, SingleProcess())["map_50"] > 0.99) == exact


def test_scores_are_in_pixels_of_the_original() -> None:
    """A network of 64 px for pixels stored at 128 px, each of which is 10 px of the original, 40 px to the right."""
    found = torch.full((1, 100, 6), math.nan)
    found[0, 0] = torch.tensor([0.25, 0.5, 0.5, 0.75, 0.9, 1])
    found[0, 1] = torch.tensor([-0.5, 0.9, 0.5, 1.5, 0.4, 0])
    frame = {"x_scale": 10.0, "y_scale": 10.0, "x_offset": 40.0, "y_offset": 0.0}
    rows = pa.table({schema.RESIZE_TRANSFORM: [frame], schema.HEIGHT_PX: [1200], schema.WIDTH_PX: [1400]})
    table = RECIPE.scored({PREDICTIONS: found}, rows, ScoringContext(tuple(FINDINGS), 128))
    first, second = table[schema.PRED_BOXES][0].as_py()
    assert first["label"] == "Nodule"
    assert [first[name] for name in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx([360, 640, 680, 960])
    assert (second["x_min"], second["y_max"]) == (0, 1200), "cut off at the image's border"
    assert (first["score"], second["score"]) == pytest.approx((0.9, 0.4))


def test_weights_are_loaded_and_pickles_are_rejected(tmp_path: Path) -> None:
    network = RECIPE.network(FINDINGS)
    torch.save(network.detector.state_dict(), tmp_path / "state.pt")
    recipe = RECIPE.replace(pretrained=str(tmp_path / "state.pt"))
    out = str(tmp_path / "out")
    recipe, _ = recipe.resolve_weights(out)
    torch.manual_seed(1)
    task = recipe.task(recipe.network(FINDINGS))
    task.begin(some_batches, SingleProcess())
    first = "detector.model.0.conv.weight"
    assert torch.equal(task.network.state_dict()[first], network.state_dict()[first])
    torch.save({"model": network}, tmp_path / "pickle.pt")
    for name in ("pickle.pt", "yolov5nu.pt"):
        with pytest.raises(UserError, match="import it: cxr import-weights"):
            RECIPE.replace(pretrained=str(tmp_path / name)).resolve_weights(out)
    with pytest.raises(UserError, match="YOLOv5 of this size"):
        RECIPE.replace(architecture="yolov5s", pretrained=str(tmp_path / "state.pt")).resolve_weights(
            str(tmp_path / "other")
        )


@pytest.mark.parametrize("wrong", [{"size": 100}, {"box_weight": -1.0}, {"momentum": 0.0}, {"mosaic": 2.0}])
def test_invalid_settings_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        RECIPE.replace(**wrong)


def test_an_ensemble_fuses_the_boxes_of_its_members() -> None:
    """Two members find nearly the same box, one of them another besides."""
    one, other = torch.full((1, 4, 6), math.nan), torch.full((1, 4, 6), math.nan)
    one[0, 0] = torch.tensor([0.1, 0.1, 0.3, 0.3, 0.8, 1])
    other[0, :2] = torch.tensor([[0.1, 0.1, 0.32, 0.3, 0.4, 1], [0.6, 0.6, 0.9, 0.9, 0.6, 0]])
    both = fused([one, other], iou=0.5)[0]
    assert both[:2, 5].tolist() == [1, 0]
    assert both[:2, 4].tolist() == pytest.approx([0.6, 0.3])
    assert both[0, 2].item() == pytest.approx((0.3 * 0.8 + 0.32 * 0.4) / 1.2)
    assert both[2:].isnan().all()
