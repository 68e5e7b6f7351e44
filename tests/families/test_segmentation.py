"""Segmentation: which masks are trained on, the rule that validation chooses, scores at the original size."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pydicom
import pytest
import torch
import torchvision
from pydicom import uid
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import NO_MASK, Batch, to_columns, to_tensors
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.base import Communicator, Recipe, ScoringContext, SingleProcess, unit_pixels
from cxr.families.checkpoint import Checkpoint
from cxr.families.lungs import LungsRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.families.segmentation import MASK_VALUES, SegmentationRecipe, images_and_masks
from cxr.imaging.geometry import fit
from cxr.metrics.segmentation.mask_thresholds import MaskRule
from cxr.models.segmentation_model import SegmentationModel, Segmenter
from cxr.schema import PixelFormat
from cxr.sources import open_manifest, rle
from cxr.sources.options import ReadOptions
from cxr.training.distributed import ProcessGroup
from cxr.training.engine import Engine
from tests.two_workers import TwoWorkers

STILL = {"flip": 0, "rotation_deg": 0, "max_zoom": 1, "translate": 0, "elastic": 0}
STILL |= {"gamma": 1, "contrast": 0, "brightness": 0, "noise": 0}
SMALL = PneumothoraxRecipe(size=32, architecture="small_unet", batch_size=4, epochs=1, lr=1e-3, **STILL)
STEPS = 3


def test_an_archive_without_such_masks_is_rejected_at_once() -> None:
    unknown = {
        schema.PIXELS: torch.zeros(2, 32, 32, dtype=torch.uint8),
        schema.MASKS: torch.full((2, 32, 32), NO_MASK, dtype=torch.uint8),
    }
    with pytest.raises(UserError, match="expected masks of Pneumothorax"):
        SMALL.task(SMALL.network(())).begin(lambda: iter([unknown]), SingleProcess())


class Bright(Segmenter):
    """Segments pixels brighter than mid-gray; records the sizes of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.gain = nn.Parameter(torch.tensor(20.0))

    @property
    def backbone(self) -> nn.Module:
        return nn.Identity()

    def forward(self, x_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(x_B1HW.shape[-1])
        logits = self.gain * (x_B1HW - 0.5)
        return logits, logits.amax((1, 2, 3))


def bright(rule: MaskRule = SMALL.rule) -> SegmentationModel:
    return SegmentationModel(Bright(), tuple(rule.describe().values()))


def squares(known: tuple[bool, ...] = (True, True, True, True), size: int = 32, seed: int = 0) -> Batch:
    """Dark noisy images, every other one with a bright square, which is its mask where it is known."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(known), size, size, dtype=torch.bool)
    mask[::2, size // 4 : size // 2, size // 4 : size // 2] = True
    pixels = torch.randint(0, 60, mask.shape, generator=rng) + 190 * mask
    masks = torch.where(torch.tensor(known)[:, None, None], mask.to(torch.uint8), NO_MASK)
    return {schema.PIXELS: pixels.to(torch.uint8), schema.MASKS: masks}


def images(batch: Batch) -> Tensor:
    return images_and_masks(batch, 32)[0]


def some(workers: Communicator | None = None) -> Iterator[Batch]:
    """Steps of four images, dealt to the workers."""
    rank, size = (workers.rank, workers.size) if workers else (0, 1)
    for step in range(STEPS):
        yield {name: values[rank::size] for name, values in squares(seed=step).items()}


def engine_of(recipe: Recipe, network: nn.Module | None = None, workers: Communicator | None = None) -> Engine:
    torch.manual_seed(0)
    task = recipe.task(recipe.network(()) if network is None else network)
    workers = workers or SingleProcess()
    task.begin(lambda: some(workers), workers)
    return Engine(task, recipe, workers, steps_per_epoch=STEPS, device=torch.device("cpu"))


@pytest.mark.parametrize("stored", [32, 64, 96])
def test_stored_masks_are_resized_to_the_input_size(stored: int) -> None:
    task = SMALL.task(bright())
    found = task.evaluate(lambda: iter([squares(size=stored)]), SingleProcess())
    assert found["dice"] == found["iou"] == found["positive_dice"] == found["pixel_accuracy"] == 1
    assert (found["empty_prediction_dice"], found["image_auroc"], found["images"], found["positives"]) == (
        0.5,
        1,
        4,
        2,
    )
    assert SMALL.task(bright())(squares(size=stored))["bce"] < 0.01


def test_images_with_unknown_masks_are_ignored() -> None:
    known = (True, False, True, True)
    task = SMALL.task(bright())
    found = task.evaluate(lambda: iter([squares(known), squares((False,) * 4)]), SingleProcess())
    assert (found["images"], found["positives"]) == (3, 2)
    assert found["empty_prediction_dice"] == pytest.approx(1 / 3)
    other = squares(known)
    other[schema.PIXELS][1] = 255
    first, second = task(squares(known)), task(other)
    assert {name: value.item() for name, value in first.items()} == {k: v.item() for k, v in second.items()}
    seen = squares()
    seen[schema.PIXELS][1] = 255
    assert task(seen)["bce"] > 10 * first["bce"]
    nothing = task.evaluate(lambda: iter([squares((False,) * 4)]), SingleProcess())
    assert np.isnan(nothing["dice"])
    task = SMALL.task(SMALL.network(()))  # whose network does not take a batch of 0 images
    assert task.evaluate(lambda: iter([squares((False,) * 4), squares()]), SingleProcess())["images"] == 4


def test_the_rule_that_validation_chooses_is_saved_and_used(tmp_path: Path) -> None:
    engine = engine_of(SMALL)
    engine.epoch(some())
    engine.finish_epoch(some)
    checkpoint.save(tmp_path, SMALL, engine.task, engine.shipped().state_dict(), findings=(), metrics={})
    kept = checkpoint.load(str(tmp_path))
    learnt = MaskRule(**kept.about["learned"]["mask_rule"])
    assert learnt != SMALL.rule
    assert MaskRule(*kept.network.rule.tolist()) == learnt  # pyright: ignore
    with torch.inference_mode():
        p, _ = SMALL.probabilities(kept.network, images(squares()))
        values = SMALL.predict(kept.network, squares())[MASK_VALUES]
    assert torch.equal(values >= 0.5, learnt.apply(p))
    lungs = LungsRecipe(size=32, warmup_size=0, warmup_epochs=0, batch_size=4)
    fixed = engine_of(lungs, bright(lungs.rule)).task
    fixed.evaluate(some, SingleProcess())
    assert fixed.describe()["mask_rule"] == lungs.rule.describe()


def ellipse(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 3, height // 2), (width // 5, height // 6), 20, 0, 360, 1, -1)
    return mask.astype(bool)


def scored(recipe: SegmentationRecipe, network: nn.Module, masks: list[np.ndarray], stored: int) -> pa.Table:
    """Scores of images that are bright where their mask is, through the frame in which they are stored."""
    fitted = [fit(mask.astype(np.uint8) * np.uint8(255), stored) for mask in masks]
    rows = pa.table(
        {
            schema.RESIZE_TRANSFORM: [frame.as_dict() for _, frame in fitted],
            schema.HEIGHT_PX: [mask.shape[0] for mask in masks],
            schema.WIDTH_PX: [mask.shape[1] for mask in masks],
        }
    )
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in fitted]))
    with torch.inference_mode():
        return recipe.scored(recipe.predict(network, {schema.PIXELS: pixels}), rows, ScoringContext((), stored))


@pytest.mark.parametrize("stored", [64, 128])
def test_scores_have_masks_at_the_original_size(stored: int) -> None:
    masks = [ellipse(150, 230), ellipse(301, 200), np.zeros((90, 70), bool)]
    found = scored(SMALL.replace(size=64), bright(MaskRule(0.5, 0, 0.5)), masks, stored)
    for mask, code, area in zip(
        masks[:2], *(found[name].to_pylist() for name in found.column_names[:2]), strict=False
    ):
        decoded = rle.decode(code, *mask.shape)
        assert area == decoded.sum()
        assert (decoded & mask).sum() / (decoded | mask).sum() > 0.95
    assert found[schema.PRED_MASK_RLE].to_pylist()[2] == rle.EMPTY
    assert found[schema.PRED_MASK_PROBABILITY].to_numpy() == pytest.approx([1, 1, 0], abs=1e-3)


def test_too_few_confident_pixels_give_an_empty_mask() -> None:
    masks = [ellipse(150, 230)]
    share = masks[0].sum() / 230**2  # of the padded square
    for factor, empty in ((0.9, False), (1.1, True)):
        found = scored(SMALL.replace(size=64), bright(MaskRule(0.5, factor * share, 0.5)), masks, 64)
        assert (found[schema.PRED_MASK_RLE][0].as_py() == rle.EMPTY) is empty
        assert (found[schema.PRED_MASK_AREA_PX][0].as_py() == 0) is empty


def test_flip_averaging_makes_predictions_symmetric() -> None:
    torch.manual_seed(0)
    network = SMALL.network(()).eval()
    there = squares()
    mirrored = {name: values.flip(-1) for name, values in there.items()}

    def both(recipe: SegmentationRecipe) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return tuple(
                recipe.probabilities(network, images(batch))[0].flip(flips)
                for batch, flips in ((there, ()), (mirrored, (-1,)))
            )

    one, other = both(SMALL)
    torch.testing.assert_close(one, other)
    one, other = both(SMALL.replace(tta_flip=False))
    assert (one - other).abs().max() > 1e-3


def test_training_starts_at_the_warmup_size() -> None:
    recipe = SMALL.replace(warmup_size=16, warmup_epochs=2, epochs=3)
    assert [(stage.name, stage.epochs) for stage in recipe.stages()] == [("warmup at 16 px", 2), ("32 px", 3)]
    same = recipe.replace(warmup_size=32, warmup_epochs=3).stages()
    assert same[0] != same[1], "the engine starts the second one with its own schedule"
    assert recipe.unranked_epochs == 2
    network = bright()
    seen = network.segmenter.sizes  # pyright: ignore[reportAttributeAccessIssue]
    engine = engine_of(recipe, network)
    for stage, size in zip(recipe.stages(), (16, 32), strict=True):
        engine.enter(stage)
        seen.clear()
        engine.epoch(some())
        engine.finish_epoch(some)
        assert set(seen) == {size}


@pytest.mark.slow
def test_a_frozen_backbone_is_not_trained(tmp_path: Path) -> None:
    kept = str(tmp_path / "resnet18.pt")
    torch.save(torchvision.models.resnet18().state_dict(), kept)

    def changed(frozen: bool) -> set[str]:
        recipe = SMALL.replace(
            architecture="fcn32s", backbone="resnet18", backbone_pretrained=kept, freeze_backbone=frozen
        )
        engine = engine_of(recipe)
        before = {name: value.clone() for name, value in engine.task.network.state_dict().items()}
        engine.epoch(some())
        engine.finish_epoch(some)
        after = engine.task.network.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        return {name.split(".")[1] for name in moved if name.startswith("segmenter.")}

    assert changed(False) == {"strided", "scores", "image_head"}
    assert changed(True) == {"scores", "image_head"}


@pytest.mark.parametrize("architecture", ["unet", "fcn8s"])
def test_a_backbone_starts_from_weights_at_a_uri(architecture: str, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(1)
    given = resnet18(weights=None).state_dict()
    torch.save(given, tmp_path / "resnet18.pt")
    recipe = SMALL.replace(
        architecture=architecture, backbone="resnet18", backbone_pretrained=str(tmp_path / "resnet18.pt")
    )
    recipe, _ = recipe.resolve_weights(str(tmp_path / "out"))
    network = engine_of(recipe).task.network
    assert isinstance(network, SegmentationModel)
    begun = network.segmenter.backbone.state_dict()
    weights = [name for name in begun if name in given and not name.endswith("tracked")]
    assert len(weights) >= 100
    assert all(torch.equal(begun[name], given[name]) for name in weights)
    with pytest.raises(UserError, match=r"backbone_pretrained=.*does not fit: they lack"):
        recipe.replace(backbone="resnet34", backbone_pretrained=str(tmp_path / "resnet18.pt")).resolve_weights(
            str(tmp_path / "other")
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"architecture": "segnet"}, "architecture: expected one of small_unet, unet, fcn32s"),
        ({"architecture": "unet", "backbone": "vgg16"}, "backbone: expected one of resnet18"),
        ({"backbone": "lenet"}, "backbone: expected one of alexnet"),
        ({"attention": "yes"}, "attention: expected one of none, scse"),
        ({"upsampling": "none"}, "upsampling: expected one of published"),
        ({"warmup_size": 16}, "both or neither of warmup_size and warmup_epochs, got 16 and 0"),
        ({"warmup_size": 64, "warmup_epochs": 1}, "warmup_size: expected at most size=32, got 64"),
        ({"image_weight": -1.0}, "image_weight: expected 0 or more, got -1.0"),
        ({"bce_weight": 0.0, "dice_weight": 0.0, "focal_weight": 0.0}, "at least one loss weight above 0"),
        ({"freeze_backbone": True}, "freeze_backbone without backbone_pretrained"),
        ({"max_zoom": 0.5}, "max_zoom >= 1, gamma >= 1"),
    ],
)
def test_invalid_settings_are_rejected(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SMALL.replace(**wrong)


def curve(workers: Communicator) -> tuple[list[float], dict[str, float]]:
    """Loss of two epochs, and what validation says after them."""
    engine = engine_of(SMALL.replace(epochs=2), workers=workers)
    losses = [engine.epoch(some(workers))["loss"] for _ in range(2)]
    return losses, engine.finish_epoch(lambda: some(workers))


def train_together(_: int) -> tuple[list[float], dict[str, float]]:
    return curve(ProcessGroup())


@pytest.mark.slow
def test_two_workers_have_the_loss_and_the_masks_of_one_worker(two_workers: TwoWorkers) -> None:
    (losses, found), second = two_workers.run(train_together)
    assert (losses, found) == second
    alone, alike = curve(SingleProcess())
    assert losses == pytest.approx(alone, rel=1e-3)
    assert losses[1] < losses[0]
    assert found == pytest.approx(alike, abs=0.02)


def twin(source: Path, target: Path) -> None:
    """The same picture stored the other way round, as MONOCHROME1 says it is."""
    file = pydicom.dcmread(source)
    file.decompress(decoding_plugin="pillow")  # the same decoder as ours; others differ by one level
    stored = file.pixel_array
    file.PixelData = (255 - stored).astype(np.uint8).tobytes()
    file.PhotometricInterpretation = "MONOCHROME1"
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    file.save_as(target)


def network_that_finds_half(folder: Path, rows: pa.Table) -> Checkpoint:
    """A checkpoint of random weights whose threshold selects the more probable half of the first row's pixels."""
    recipe = SMALL.replace(size=64)
    torch.manual_seed(0)
    network = recipe.network(())
    with torch.inference_mode():
        p, _ = recipe.probabilities(network, unit_pixels(batch_of(rows), 64))
    network.rule.copy_(torch.tensor([0, 0, p[0].median().item()]))
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=(), metrics={})
    return checkpoint.load(str(folder))


def batch_of(rows: pa.Table) -> Batch:
    pixels = PixelFormat(64)
    return to_tensors(to_columns(rows, [schema.PIXELS], pixels), pixels)


def test_a_real_image_and_its_inverted_twin_have_the_same_scores(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "siim" / "dicom"
    (original,) = (path for path in folder.glob("*.dcm") if "Fake" not in path.name)
    (tmp_path / "images").mkdir()
    shutil.copyfile(original, tmp_path / "images" / "a.dcm")
    twin(original, tmp_path / "images" / "b.dcm")
    shutil.copyfile(folder / "Fake_MONOHR1.dcm", tmp_path / "images" / "c.dcm")  # the tag alone is another
    table = open_manifest(str(tmp_path / "images"), ReadOptions(source="folder")).table.sort_by(schema.IMAGE_ID)
    whole = schema.pixels_array(make_rows(table, PixelFormat(1024))[schema.PIXELS], PixelFormat(1024))
    assert np.array_equal(whole[0], whole[1])
    halfway = whole[0] == 128  # the shade between 127 and 128 is rounded to 128 in both
    assert np.array_equal(whole[0][~halfway], 255 - whole[2][~halfway])
    rows = make_rows(table, PixelFormat(64))
    kept = network_that_finds_half(tmp_path / "kept", rows)
    with torch.inference_mode():
        predicted = kept.recipe.predict(kept.network, batch_of(rows))
    same, alike, negative = kept.recipe.scored(predicted, rows, ScoringContext((), 64)).to_pylist()
    assert same.pop(schema.PRED_MASK_PROBABILITY) == pytest.approx(alike.pop(schema.PRED_MASK_PROBABILITY), abs=1e-6)
    assert same == alike
    assert same[schema.PRED_MASK_RLE] != negative[schema.PRED_MASK_RLE]
    assert 0.2 < same[schema.PRED_MASK_AREA_PX] / 1024**2 < 0.8
