"""The window of partner images for mosaics: its size on any number of workers, and its contents after resuming."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from cxr import schema
from cxr.data.batch import HAS_BOXES, Batch
from cxr.families.base import SingleProcess
from cxr.families.detect import DetectRecipe, DetectTask
from cxr.families.partner_window import USABLE, PartnerWindow
from cxr.schema import MOST_BOXES
from cxr.training.engine import Engine

SIZE = 32


def numbered(numbers: Sequence[int], usable: Tensor | None = None) -> Batch:
    rows = torch.tensor(numbers)
    return {"number": rows, USABLE: torch.ones(len(rows), dtype=torch.bool) if usable is None else usable}


def steps(count: int, own: int) -> Iterator[Batch]:
    return (numbered(range(step * own, (step + 1) * own)) for step in range(count))


def drawn(window: PartnerWindow, count: int = 400) -> set[int]:
    return set(window.draw(count)["number"].tolist())


@pytest.mark.parametrize("own", [1, 2, 3, 8])
def test_every_step_has_a_full_window_that_contains_its_images(own: int) -> None:
    window, seen = PartnerWindow(8, lambda batch: batch), []
    for batch in window.look_ahead(steps(12, own)):
        seen += batch["number"].tolist()
        assert len(window) == 8
        shown = drawn(window)
        assert shown >= set(batch["number"].tolist()[-8 % own or own :])
        assert len(shown) == 8
    assert seen == list(range(12 * own)), "each batch once, in order"


def test_a_short_epoch_uses_all_of_its_images_and_none_of_the_previous_epoch() -> None:
    window = PartnerWindow(64, lambda batch: batch)
    for _ in window.look_ahead(steps(40, 2)):
        pass
    for _ in window.look_ahead(numbered([100 + i]) for i in range(5)):
        assert drawn(window) == {100, 101, 102, 103, 104}


@pytest.mark.parametrize("own", [1, 2, 3, 8])
def test_after_skipped_batches_the_window_is_the_same(own: int) -> None:
    window = PartnerWindow(8, lambda batch: batch)

    def windows(batches: Iterator[Batch], skipped: int = 0) -> list[list[int]]:
        return [window.draw(8)["number"].tolist() for _ in window.look_ahead(batches, skipped)]

    torch.manual_seed(0)
    whole = windows(steps(12, own))
    for done in range(12):
        skipped = max(0, done - window.batches_before(own))
        torch.manual_seed(0)
        torch.rand(8 * skipped)
        assert windows(islice(steps(12, own), skipped, None), skipped)[done - skipped :] == whole[done:]


def test_without_reading_ahead_a_step_depends_on_its_batch_alone() -> None:
    window = PartnerWindow(6, lambda batch: batch)
    for batch in window.look_ahead(steps(5, 2)):
        window.show(batch)
        assert len(window) == 6, "what was read ahead stays"
    for batch in steps(5, 2):
        window.show(batch)
        assert drawn(window) == set(batch["number"].tolist())


def test_partners_are_sampled_uniformly_from_usable_rows_with_the_seed() -> None:
    window = PartnerWindow(8, lambda batch: batch)
    window.show(numbered(range(8), torch.tensor([True, False] * 4)))
    torch.manual_seed(0)
    values, counts = window.draw(4000)["number"].unique(return_counts=True)
    assert values.tolist() == [0, 2, 4, 6]
    assert counts.min() > 900
    torch.manual_seed(0)
    again = window.draw(4000)["number"]
    assert torch.equal(again.unique(return_counts=True)[1], counts)
    window.show(numbered(range(8), torch.zeros(8, dtype=torch.bool)))
    assert len(window.draw(3)["number"]) == 3, "any rows where none is usable"


def shares(own: int, epoch: int = 0, count: int = 24) -> Iterator[Batch]:
    """Steps of `own` images, each of one gray value."""
    rng = torch.Generator().manual_seed(epoch)
    for _ in range(count):
        gray = torch.randint(1, 255, (own, 1, 1), generator=rng).to(torch.uint8)
        boxes = torch.full((own, MOST_BOXES, 5), math.nan)
        boxes[:, 0] = torch.tensor([0, 0.0, 0.0, 1.0, 1.0])
        boxes[:, 0, 0] = gray[:, 0, 0].float()
        yield {
            schema.PIXELS: gray.expand(own, SIZE, SIZE).clone(),
            schema.BOXES: boxes,
            schema.LABELS: torch.zeros(own, 1, dtype=torch.int8),
            HAS_BOXES: torch.ones(own, dtype=torch.bool),
        }


def task_of(batch_size: int = 16, **changes: float) -> DetectTask:
    still = {"mosaic": 1.0, "translate": 0.0, "scale_jitter": 0.0, "flip": 0.0, "hsv_v": 0.0, "close_mosaic": 0}
    recipe = DetectRecipe(size=SIZE, batch_size=batch_size, **(still | changes))  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    return recipe.task(recipe.network(("a",))).train()


def sources(task: DetectTask, given: Iterator[Batch]) -> float:
    """Mean number of different images that a mosaic is made of."""
    asked: list[Tensor] = []
    draw = task.window.draw

    def spy(count: int) -> dict[str, Tensor]:
        rows = draw(count)
        asked.append(rows[schema.BOXES][:, 0, 0])
        return rows

    task.window.draw = spy  # pyright: ignore[reportAttributeAccessIssue]
    different = []
    for batch in task.look_ahead(given):
        asked.clear()
        task.augment(batch)
        made_of = torch.stack([batch[schema.BOXES][:, 0, 0], *asked], 1)
        different += [len(set(one)) for one in made_of.tolist()]
    return sum(different) / len(different)


def test_a_mosaic_shows_as_many_images_on_8_workers_as_on_one() -> None:
    """Sixteen images per step are two on each of 8 workers; without a window, a mosaic would show 1.9 images on
    average."""
    torch.manual_seed(0)
    one, eight = sources(task_of(), shares(16)), sources(task_of(), shares(2, count=150))
    assert one > 3.7
    assert eight == pytest.approx(one, abs=0.15)


@pytest.mark.parametrize("changes", [{"mosaic": 0.0, "mixup": 1.0}, {"mosaic": 1.0, "mixup": 1.0}])
def test_mixup_takes_partners_from_the_window(changes: dict[str, float]) -> None:
    task = task_of(**changes)
    others = set()
    for batch in task.look_ahead(shares(1, count=100)):
        listed = task.augment(batch)[schema.BOXES][..., 0]
        others |= set(listed[~listed.isnan()].tolist())
    assert len(others) > 40


def test_a_resumed_epoch_has_the_same_augmentation() -> None:
    def epochs(task: DetectTask, numbers: Sequence[int]) -> list[Tensor]:
        shown = []
        for epoch in numbers:
            torch.manual_seed(epoch)
            shown += [task.augment(batch)[schema.PIXELS] for batch in task.look_ahead(shares(2, epoch))]
        return shown

    straight, resumed = epochs(task_of(), (0, 1)), epochs(task_of(), (1,))
    assert all(torch.equal(one, other) for one, other in zip(straight[24:], resumed, strict=True))


def test_the_loop_reads_ahead_and_epochs_without_mosaic_do_not() -> None:
    recipe = DetectRecipe(size=SIZE, batch_size=2, epochs=2, close_mosaic=1)
    task = recipe.task(recipe.network(("a",)))
    engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=6, device=torch.device("cpu"))
    windows: list[int] = []

    def step(batch: Batch, *, last: bool) -> dict[str, Tensor]:
        windows.append(len(task.window))
        return {"nothing": torch.zeros(())}

    engine.step = step
    engine.epoch(shares(2, count=6))
    assert windows == [12] * 6
    task.end_epoch(SingleProcess())
    task.train()
    again = shares(2, count=6)
    assert task.look_ahead(again) is again
