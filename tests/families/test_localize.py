"""Localization from labels: class weights, unknown labels, the scale of maps, boxes in the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.boxes import iou
from cxr.data.batch import HAS_BOXES, Batch
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.base import ScoringContext, SingleProcess
from cxr.families.localize import HEAT, WITHOUT_LAST, LocalizeRecipe, LocalizeTask
from cxr.imaging.geometry import ResizeTransform
from cxr.models.classifier import Classifier
from cxr.models.ensemble import Ensemble
from cxr.models.multiscale_cam import MultiscaleCAM
from cxr.schema import MOST_BOXES
from cxr.training.engine import Engine

FINDINGS = ("Mass", "Nodule", "Hernia")
CONTEXT = ScoringContext(FINDINGS, 40)
STILL = {"flip": 0.0, "rotation_deg": 0.0, "max_zoom": 1.0, "translate": 0.0, "exposure": 0.0}
SMALL = LocalizeRecipe(size=32, batch_size=8, epochs=1, map_stride=2, **STILL)  # pyright: ignore[reportArgumentType]
SIDE = 40  # of stored pixels
SQUARE = (0.25, 0.5, 0.5, 0.75)  # where images with a Mass are bright, as shares


def batch(labels: list[list[int]] | None = None, seed: int = 0) -> Batch:
    """Dark noisy images with a bright square where they show a Mass, and its box. No Hernia."""
    given = torch.tensor(labels or [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.int8)
    pixels = torch.randint(40, 80, (len(given), SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    boxes = torch.full((len(given), MOST_BOXES, 5), float("nan"))
    for image in (given[:, 0] == 1).nonzero()[:, 0]:
        left, top, right, bottom = (round(SIDE * edge) for edge in SQUARE)
        pixels[image, top:bottom, left:right] = 230
        boxes[image, 0] = torch.tensor([0, *SQUARE])
    return {
        schema.PIXELS: pixels.to(torch.uint8),
        schema.LABELS: given,
        schema.BOXES: boxes,
        HAS_BOXES: torch.ones(len(given), dtype=torch.bool),
    }


def some() -> Iterator[Batch]:
    return iter([batch(), batch(seed=1)])


def task_of(recipe: LocalizeRecipe = SMALL) -> LocalizeTask:
    torch.manual_seed(0)
    return recipe.task(recipe.network(FINDINGS))


class Bright(nn.Module):
    """A trunk whose one feature is how bright a pixel is."""

    def forward(self, x_B1HW: Tensor) -> list[Tensor]:
        return [x_B1HW]


def seeing(recipe: LocalizeRecipe = SMALL) -> MultiscaleCAM:
    """A network that takes brightness for a Mass, and sees nothing else."""
    network = recipe.replace(cam_stages="last", pooling="max").network(FINDINGS).eval()
    head = nn.Conv2d(1, 3, 1)
    head.load_state_dict(
        {"weight": torch.tensor([20.0, 0, 0]).view(3, 1, 1, 1), "bias": torch.tensor([-10.0, -9, -9])}
    )
    network.trunk, network.heads = Bright(), nn.ModuleList([head])  # pyright: ignore[reportAttributeAccessIssue]
    network.fields = [type(network.fields[0])()]
    network.scale_maps(torch.full((1, 3), -6.0), torch.full((1, 3), 8.0))
    return network


def rows_of(frame: ResizeTransform, height: int, width: int, count: int = 4) -> pa.Table:
    return pa.table({
        schema.RESIZE_TRANSFORM: [frame.as_dict()] * count,
        schema.HEIGHT_PX: [height] * count,
        schema.WIDTH_PX: [width] * count,
    })  # fmt: skip


def test_positives_and_negatives_of_a_finding_have_equal_total_weight() -> None:
    labels = [[1, 1, 0]] + [[1, 0, 0]] * 2 + [[0, 0, 0]] * 6 + [[-1, -1, 0]]
    task = task_of()
    task.begin(lambda: iter([batch(labels)]), SingleProcess())
    negative, positive = [9 / 6, 9 / 8, 11 / 10], [9 / 3, 9 / 1, 11 / 1]  # no Hernia counts as one
    assert task.class_weight.tolist() == [pytest.approx(negative), pytest.approx(positive)]
    mild = task_of(SMALL.replace(pos_weight_power=0.5))
    mild.begin(lambda: iter([batch(labels)]), SingleProcess())
    assert mild.class_weight[1, 1].item() == pytest.approx(3)


def test_the_loss_is_the_weighted_cross_entropy() -> None:
    task = task_of().eval()
    task.class_weight = torch.tensor([[2.0, 3, 5], [7.0, 11, 13]])
    labels = batch([[1, 0, -1], [0, -1, 1]])
    logits = torch.tensor([[0.3, -1.0, 4.0], [2.0, 1.0, -0.5]], requires_grad=True)
    p = logits.detach().double().sigmoid()
    wanted = -(7 * p[0, 0].log() + 3 * (1 - p[0, 1]).log() + 2 * (1 - p[1, 0]).log() + 13 * p[1, 2].log()) / 6
    loss = task.bce(logits, labels[schema.LABELS])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, labels[schema.LABELS] == schema.UNKNOWN)


def test_the_loss_of_several_workers_equals_that_of_one() -> None:
    task, logits = task_of(), torch.randn(4, 3)
    task.class_weight = torch.rand(2, 3) + 1
    whole = batch([[1, 0, 0], [0, -1, 0], [1, 1, 0], [-1, -1, -1]])
    halves = [task.bce(logits[r], whole[schema.LABELS][r]) for r in (slice(2), slice(2, 4))]
    assert torch.stack(halves).mean().item() == pytest.approx(task.bce(logits, whole[schema.LABELS]).item())


def test_augmentation_can_be_switched_off() -> None:
    given = {schema.PIXELS: torch.rand(4, 32, 32)}
    assert torch.equal(task_of().augment(given)[schema.PIXELS], given[schema.PIXELS])
    for change in ({"flip": 1.0}, {"rotation_deg": 5.0}, {"max_zoom": 1.2}, {"translate": 0.1}, {"exposure": 0.5}):
        changed = task_of(SMALL.replace(**change)).augment(given)[schema.PIXELS]
        assert not torch.equal(changed, given[schema.PIXELS])


def test_about_half_of_the_training_images_are_classified_without_the_last_stage() -> None:
    task = task_of(SMALL.replace(combine_stages="maps"))
    torch.manual_seed(0)
    dropped = torch.cat([task.augment(batch())[WITHOUT_LAST] for _ in range(50)])
    assert 0.35 < dropped.float().mean().item() < 0.65
    augmented = task.augment(batch())
    losses = [task.eval()(augmented | {WITHOUT_LAST: torch.full((len(dropped) // 50,), on)}) for on in (False, True)]
    assert not torch.allclose(losses[0]["bce"], losses[1]["bce"], atol=1e-5)
    assert torch.equal(losses[0]["bce"], task({k: v for k, v in augmented.items() if k != WITHOUT_LAST})["bce"])


def test_pooling_sharpens_in_the_first_30_percent_of_the_epochs() -> None:
    task = task_of(SMALL.replace(epochs=10, lse_r=8.0, lse_r_start=1.0))
    r = [task.cam.lse_r.item()]
    for _ in range(10):
        task.end_epoch(SingleProcess())
        r.append(task.cam.lse_r.item())
    assert r == pytest.approx([1, 2, 4, *[8] * 8])
    assert task_of(SMALL.replace(epochs=3)).cam.lse_r.item() == SMALL.lse_r
    short = task_of(SMALL.replace(epochs=3))
    short.end_epoch(SingleProcess())
    assert short.cam.lse_r.item() == SMALL.lse_r


def test_validation_measures_classification_and_localization_and_sets_the_scale() -> None:
    task = SMALL.task(seeing()).eval()
    metrics = task.evaluate(some, SingleProcess())
    assert metrics["findings_measured"] == 2  # no Hernia
    assert "auroc/Hernia" not in metrics
    assert metrics["auroc/Mass"] == 1
    assert metrics["mean_auroc"] == pytest.approx(np.mean([metrics["auroc/Mass"], metrics["auroc/Nodule"]]))
    assert (metrics["localization_accuracy_iou30"], metrics["boxes_measured"]) == (1, 4)
    network = task.cam
    x = batches_of_masses()
    (maps,) = network.maps(x)
    assert network.high[0, 0] == pytest.approx(maps[:, 0].amax((1, 2)).mean().item(), abs=0.2)
    assert network.low[0, 0] == pytest.approx(
        maps[:, 0].median().item(), abs=0.5
    )  # of images without: the background
    assert network.attention([maps], 32, 2)[:, 0].amax((1, 2)).mean() > 0.9
    about = task.describe()
    assert about["thresholds"]["findings"] == list(FINDINGS)
    assert network.thresholds.tolist() == pytest.approx(about["thresholds"]["values"])
    assert about["stage_weights"]["Nodule"] == [1.0]


def batches_of_masses() -> Tensor:
    shown = batch([[1, 0, 0]] * 4)[schema.PIXELS][:, None].float() / 255
    return nn.functional.interpolate(shown, size=(32, 32), mode="area")


def test_images_with_unknown_boxes_are_not_evaluated() -> None:
    def unknown() -> Iterator[Batch]:
        for one in some():
            yield one | {HAS_BOXES: torch.zeros(4, dtype=torch.bool)}

    assert "localization_accuracy_iou30" not in SMALL.task(seeing()).eval().evaluate(unknown, SingleProcess())


def blurred() -> Iterator[Batch]:
    """Images whose bright squares, of a Mass, have wide dim margins that their boxes include, or leave out."""
    for one in some():
        pixels = one[schema.PIXELS].clone()
        pixels[one[schema.LABELS][:, 0] == 1, 12:38, 2:28] = 170
        left, top, right, bottom = (round(SIDE * edge) for edge in SQUARE)
        pixels[one[schema.LABELS][:, 0] == 1, top:bottom, left:right] = 230
        yield one | {schema.PIXELS: pixels}


def with_margin() -> Iterator[Batch]:
    for one in blurred():
        boxes = one[schema.BOXES].clone()
        boxes[one[schema.LABELS][:, 0] == 1, 0] = torch.tensor([0, 0.05, 0.3, 0.7, 0.95])
        yield one | {schema.BOXES: boxes}


def test_the_box_threshold_of_a_finding_is_chosen_on_validation_images_with_boxes() -> None:
    chosen = {}
    for name, batches in {"narrow": blurred, "wide": with_margin}.items():
        task = SMALL.task(seeing()).eval()
        metrics = task.evaluate(lambda batches=batches: iter([*batches(), *batches()]), SingleProcess())
        assert metrics["localization_accuracy_iou30"] == 1
        mass, *others = task.cam.box_thresholds.tolist()
        assert others == [0.5, 0.5]  # no boxes
        chosen[name] = mass
        assert task.describe()["box_thresholds"]["Mass"] == mass
        with torch.inference_mode():
            predicted = SMALL.predicted_boxes(SMALL.predict(task.cam, next(batches())))[0]
        truth = next(batches())[schema.BOXES][0, :1, 1:].numpy()
        assert iou(predicted.boxes_N4[predicted.index_N == 0], truth).max() > 0.7
    assert chosen["wide"] == 0.5 < chosen["narrow"]  # .5 is as good as any below .6


def elsewhere() -> Iterator[Batch]:
    """12 images with a Mass, whose boxes are half as high as the bright squares, and lie to the right of them."""
    for one in [*some(), *some(), *some()]:
        boxes = one[schema.BOXES].clone()
        left, top, right, bottom = SQUARE
        wide = right - left
        boxes[one[schema.LABELS][:, 0] == 1, 0] = torch.tensor([0, right, top, right + wide, (top + bottom) / 2])
        yield one | {schema.BOXES: boxes}


def test_boxes_are_moved_and_scaled_by_the_offset_from_the_true_ones() -> None:
    task = SMALL.task(seeing()).eval()
    metrics = task.evaluate(elsewhere, SingleProcess())
    assert metrics["localization_accuracy_iou30"] == 1
    mass, *others = task.cam.box_offsets.tolist()
    assert mass[0] > 0.7
    assert mass[3] < -0.5
    assert not np.any(others)
    with torch.inference_mode():
        predicted = SMALL.predicted_boxes(SMALL.predict(task.cam, next(elsewhere())))[0]
    truth = next(elsewhere())[schema.BOXES][0, :1, 1:].numpy()
    assert iou(predicted.boxes_N4[predicted.index_N == 0], truth).max() > 0.8


def test_boxes_of_an_ensemble_are_adjusted_to_its_own_maps() -> None:
    first, second = seeing(), seeing()
    second.box_offsets.fill_(3.0)  # chosen for the maps of this network alone
    network = Ensemble([first, second], FINDINGS, SMALL.decision_buffers)
    members = combine_members(first, second)
    evaluation = SMALL.raw_evaluation(network)
    metrics = evaluation.evaluate_raw(((one, members(one)) for one in elsewhere()), SingleProcess())
    assert metrics["localization_accuracy_iou30"] == 1
    assert evaluation.describe()["box_offsets"]["Mass"] == network.get_buffer("box_offsets")[0].tolist()
    batch = next(elsewhere())
    predicted = SMALL.predicted_boxes(SMALL.decide(members(batch), network))[0]
    assert iou(predicted.boxes_N4[predicted.index_N == 0], batch[schema.BOXES][0, :1, 1:].numpy()).max() > 0.8


def combine_members(*networks: MultiscaleCAM) -> Callable[[Batch], dict[str, Tensor]]:
    def combined(batch: Batch) -> dict[str, Tensor]:
        with torch.inference_mode():
            return SMALL.combine([SMALL.raw_predictions(network.eval(), batch) for network in networks])

    return combined


def test_a_box_threshold_stays_as_set_with_few_boxes_or_without_tuning() -> None:
    few = SMALL.replace(box_threshold=0.35)  # four images have a box
    fixed, otsu = few.replace(tune_boxes=False), few.replace(box_threshold_mode="otsu")

    def twice() -> Iterator[Batch]:
        return iter([*with_margin(), *with_margin()])

    for recipe, batches in ((few, with_margin), (fixed, twice), (otsu, twice)):
        task = recipe.task(seeing()).eval()
        task.evaluate(batches, SingleProcess())
        assert task.cam.box_thresholds.tolist() == pytest.approx([0.35] * 3)
        assert not task.cam.box_offsets.any()


@torch.inference_mode()
def test_predicted_boxes_are_in_pixels_of_the_original() -> None:
    predicted = SMALL.predict(seeing(), batch())
    frame = ResizeTransform(
        10.0, 10.0, 0.0, -50.0
    )  # 40 stored pixels are 400 of the original; 5 rows on top are padding
    recipe = SMALL.replace(min_box_score=0.3)
    scores = recipe.scored(predicted, rows_of(frame, 300, 400), CONTEXT)
    assert scores.schema.equals(recipe.score_columns)
    found = scores[schema.PRED_BOXES].to_pylist()
    assert [[box[schema.LABEL] for box in boxes] for boxes in found] == [["Mass"], [], ["Mass"], []]
    (box,) = found[0]
    edges = [box[name] for name in (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)]
    assert edges == pytest.approx([100, 150, 200, 250], abs=15)
    p = scores[schema.PROBABILITIES].to_pylist()[0][0]
    assert 0.8 * p < box[schema.SCORE] <= p


@torch.inference_mode()
def test_scores_come_from_pixels_alone() -> None:
    network, whole = seeing(), batch()
    bare = SMALL.predict(network, {schema.PIXELS: whole[schema.PIXELS]})
    full = SMALL.predict(network, whole)
    assert all(torch.equal(bare[name], full[name]) for name in bare)
    assert bare[HEAT].shape == (4, 3, 16, 16)
    assert torch.equal(bare[schema.DECISIONS].bool(), bare[schema.PROBABILITIES] >= network.thresholds)


@torch.inference_mode()
def test_max_boxes_and_min_box_score_are_applied() -> None:
    warm = SMALL.predict(seeing(), batch())
    none = SMALL.replace(min_box_score=1.0, box_threshold_mode="wang")
    network = seeing()
    network.scale_maps(torch.full((1, 3), -6.0), torch.full((1, 3), 30.0))
    assert (
        none.scored(none.predict(network, batch()), rows_of(ResizeTransform(), 40, 40), CONTEXT)[
            schema.PRED_BOXES
        ].to_pylist()[0]
        == []
    )
    assert len(SMALL.scored(warm, rows_of(ResizeTransform(), 40, 40), CONTEXT)[schema.PRED_BOXES].to_pylist()[0]) == 1


def test_a_few_steps_learn_to_locate_the_bright_square() -> None:
    recipe = SMALL.replace(epochs=6, lr=5e-3, size=40, stem_stride=2, lse_r_start=6.0)
    engine = Engine(task_of(recipe), recipe, SingleProcess(), steps_per_epoch=8, device=torch.device("cpu"))
    labels = [[1, 0, 0], [0, 0, 0]] * 4
    means = [engine.epoch(batch(labels, seed=8 * epoch + step) for step in range(8)) for epoch in range(6)]
    metrics = engine.finish_epoch(lambda: iter([batch(labels, seed=99)]))
    assert means[-1]["bce"] < 0.3
    assert metrics["auroc/Mass"] == 1
    with torch.inference_mode():
        heat = recipe.predict(engine.task.network.eval(), batch([[1, 0, 0]], seed=100))[HEAT][0, 0]
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    left, top, right, bottom = (20 * edge for edge in SQUARE)
    assert left <= column + 0.5 <= right
    assert top <= row + 0.5 <= bottom


def test_pictures_are_drawn(tmp_path: Path) -> None:
    with torch.inference_mode():
        drawn = SMALL.render(SMALL.network(FINDINGS).eval(), batch())
    assert {name: tuple(images.shape) for name, images in drawn.items()} == {
        "overlay": (4, 32, 32, 3),
        "stages": (4, 32, 6 * 32, 3),
    }
    task = SMALL.task(seeing()).eval()
    task.save_pictures(some, tmp_path, list("abcd"))
    without_boxes = batch([[0, 0, 0]])
    task.save_pictures(lambda: iter([without_boxes]), tmp_path, ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes.png", "stage_weights.png"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())


def test_backbone_weights_come_from_classifiers_or_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = Classifier("resnet18", 5)
    torch.save(whole.body.state_dict(), tmp_path / "resnet.pt")
    recipe = SMALL.replace(backbone="resnet18", backbone_pretrained=str(tmp_path / "resnet.pt"))
    recipe, _ = recipe.resolve_weights(str(tmp_path / "out"))
    task = recipe.task(recipe.network(FINDINGS))
    task.begin(some, SingleProcess())
    own = task.cam.trunk.body.get_submodule("layer4").state_dict()
    assert all(torch.equal(own[name], values) for name, values in whole.body.layer4.state_dict().items())
    checkpoint.save(tmp_path / "kept", recipe, task, task.network.state_dict(), findings=FINDINGS, metrics={})
    again = recipe.replace(backbone_pretrained=str(tmp_path / "kept"))
    again, _ = again.resolve_weights(str(tmp_path / "out"))
    with pytest.raises(UserError, match="expected shape 32 x 3 x 5 x 5, got 64 x 3 x 7 x 7"):
        SMALL.replace(backbone_pretrained=str(tmp_path / "resnet.pt")).resolve_weights(str(tmp_path / "other"))
    with pytest.raises(UserError, match="torchvision has no weights for this network"):
        SMALL.replace(backbone_pretrained="IMAGENET1K_V1").resolve_weights(str(tmp_path / "other"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"backbone": "vgg16"},
        {"pooling": "median"},
        {"cam_stages": "first"},
        {"stage_weights": "fair"},
        {"combine_stages": "pixels"},
        {"stage_weight_gain": 0.0},
        {"lse_r": 0.0},
        {"lse_r_start": 0.0},
        {"context_dropout": 1.5},
        {"pos_weight_power": -1.0},
        {"map_stride": 5},
        {"box_threshold_mode": "cold"},
        {"max_boxes": 0},
        {"flip": 2.0},
        {"max_zoom": 0.5},
        {"stem_stride": 3},
    ],
)
def test_invalid_settings_are_rejected(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"expected|wanted"):
        SMALL.replace(**wrong)
