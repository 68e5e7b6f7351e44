"""Sampling: exact positive fractions for any number of workers, folds by patient, clear errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from cxr import schema
from cxr.data import sampling as selection
from cxr.data import shard_index, shards
from cxr.data.batch import to_columns
from cxr.data.sampling import Fold, Sampling
from cxr.data.shard_loader import ShardStream
from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import SingleProcess
from cxr.families.compatibility import check_raw, fold_of, sampling_of
from cxr.training.raw_stream import open_streams
from cxr.training.session import RayTrainSession
from cxr.training.training_data import SELECTIONS, describe, select_images
from tests.made_shards import write_shards

FINDING, TRAIN, VAL, POSITIVES, STEP = "Mass", 60, 20, 12, 12
SLIDING = (0.8, 0.6, 0.4)
SHOWN = 24  # 12 / .6 = 20 images, to the nearest number of steps of 12


def known(split: str, number: int) -> Mapping[str, object]:
    """Every fifth training image shows the finding, one of the others is unknown; each patient has three images."""
    labels = [schema.NEGATIVE] * len(schema.FINDINGS)
    labels[schema.FINDINGS.index(FINDING)] = schema.POSITIVE if number % 5 == 0 else schema.NEGATIVE
    labels[0] = schema.POSITIVE
    patient = f"{split} {number // 3}" if number % 7 else None
    return {schema.LABELS: None if number == 1 else labels, schema.PATIENT_ID: patient}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> shards.ShardInfo:
    folder = tmp_path_factory.mktemp("selection") / "shards"
    return shards.read_info(write_shards(folder, {"train": TRAIN, "val": VAL, "test": 9}, size=16, known=known))


def streams(info: shards.ShardInfo, world: int, **settings) -> list[ShardStream]:
    given = {"split": "train", "columns": (schema.PIXELS,), "batch_size": STEP // world, "world": world}
    return [ShardStream(info, rank=rank, **(given | settings)) for rank in range(world)]


def sampled(info: shards.ShardInfo, world: int, shares: tuple[float, ...] = SLIDING, **settings) -> list[ShardStream]:
    return streams(info, world, sampling=Sampling(FINDING, shares), **settings)


def shown(stream: ShardStream, epoch: int) -> list[list[int]]:
    """Image numbers of each batch."""
    return [batch[schema.PIXELS][:, 0, 0].tolist() for batch in stream.train(epoch)]


def together(workers: list[ShardStream], epoch: int) -> Counter[int]:
    return Counter(number for worker in workers for batch in shown(worker, epoch) for number in batch)


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0, 16 * 16 * 20])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_epoch_has_the_exact_positive_fraction(made: shards.ShardInfo, world: int, cache_bytes: int) -> None:
    workers = sampled(made, world, cache_bytes=cache_bytes)
    for epoch, positives in enumerate((19, 14, 10)):  # round(.8 * 24), round(.6 * 24), round(.4 * 24)
        batches = [shown(worker, epoch) for worker in workers]
        assert [[len(batch) for batch in share] for share in batches] == [[STEP // world] * 2] * world
        assert [worker.steps for worker in workers] == [SHOWN // STEP] * world
        times = together(workers, epoch)
        of_positives = [times[number] for number in range(0, TRAIN, 5)]
        assert (sum(times.values()), sum(of_positives)) == (SHOWN, positives)
        assert max(of_positives) - min(of_positives) <= 1
        assert max(times[number] for number in range(TRAIN) if number % 5) == 1


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
@pytest.mark.parametrize("shares", [SLIDING, None])
def test_an_epoch_shows_the_same_images_to_any_number_of_workers(
    made: shards.ShardInfo, shares: tuple[float, ...] | None, cache_bytes: int
) -> None:
    sampling = Sampling(FINDING, shares) if shares else None
    alone = together(streams(made, 1, sampling=sampling), 1)
    for world in (1, 2, 3):
        assert together(streams(made, world, sampling=sampling, cache_bytes=cache_bytes), 1) == alone


def test_several_workers_see_the_global_batches_of_one(made: shards.ShardInfo) -> None:
    one = [sorted(batch) for batch in shown(*sampled(made, 1), 2)]
    for world in (2, 3):
        shares = zip(*(shown(worker, 2) for worker in sampled(made, world)), strict=True)
        assert [sorted(number for batch in batches for number in batch) for batches in shares] == one


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_the_order_repeats_by_seed_and_epoch(made: shards.ShardInfo, cache_bytes: int) -> None:
    (first,), (again,), (other,) = (sampled(made, 1, seed=seed, cache_bytes=cache_bytes) for seed in (0, 0, 1))
    assert shown(first, 2) == shown(again, 2) != shown(other, 2)
    assert shown(first, 0) != shown(first, 1)


def test_images_repeat_only_if_there_are_too_few(made: shards.ShardInfo) -> None:
    """A tenth is positive: 12 of 120 images; the other 108 are sampled from 48."""
    workers = sampled(made, 2, (0.1,))
    times = together(workers, 0)
    assert workers[0].steps == 10
    assert {times[number] for number in range(0, TRAIN, 5)} == {1}
    assert {times[number] for number in range(TRAIN) if number % 5} == {2, 3}


def test_images_with_any_finding_can_be_sampled(tmp_path: Path) -> None:
    """Every tenth image shows the first finding, every fifth the second; image 1 is unknown."""

    def two(_split: str, number: int) -> Mapping[str, object]:
        return {schema.LABELS: None if number == 1 else [int(number % 10 == 0), int(number % 5 == 2)]}

    info = shards.read_info(write_shards(tmp_path, {"train": TRAIN}, size=16, known=two, findings=("Mass", "Hernia")))
    workers = streams(info, 2, sampling=Sampling(schema.ANY_FINDING, (0.5,)))
    times = together(workers, 0)
    assert {number for number in times if number % 10 in (0, 2, 7)} == {
        n for n in range(TRAIN) if n % 10 in (0, 2, 7)
    }
    assert sum(times.values()) == workers[0].steps * STEP == 36
    assert sum(count for number, count in times.items() if number % 10 in (0, 2, 7)) == 18
    assert sampling_of(AttendRecipe(epochs=2)) == Sampling(schema.ANY_FINDING, (0.5, 0.5))
    nameless = shards.read_info(write_shards(tmp_path / "nameless", {"train": 9}, findings=()))
    with pytest.raises(UserError, match=r"expected labels of any finding in .*, got no findings"):
        streams(nameless, 1, sampling=Sampling(schema.ANY_FINDING, (0.5,)))


def test_validation_shows_each_image_once(made: shards.ShardInfo) -> None:
    for cache_bytes in (1 << 30, 0):
        seen = [
            n for worker in sampled(made, 2, cache_bytes=cache_bytes) for b in worker.every() for n in b["pixels"]
        ]
        assert sorted(int(pixels[0, 0]) for pixels in seen) == list(range(TRAIN))


def test_findings_that_cannot_be_sampled_are_rejected(made: shards.ShardInfo, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected labels of Lungs in .*, got the findings Atel"):
        streams(made, 1, sampling=Sampling("Lungs", (0.5,)))
    with pytest.raises(
        UserError,
        match=r"got 60 images in the train split of .*, of which none show it",
    ):
        streams(made, 1, sampling=Sampling("Hernia", (0.5,)))
    every = {schema.LABELS: [schema.POSITIVE]}
    alike = shards.read_info(
        write_shards(tmp_path / "alike", {"train": 9}, known=lambda *_: every, findings=(FINDING,))
    )
    with pytest.raises(UserError, match=r"expected images with and without Mass, got .*, of which all show it"):
        sampled(alike, 1)
    for shares in ((0.0, 0.0), (0.5, 1.5), (float("nan"),)):
        with pytest.raises(UserError, match="from 0 to 1, not all 0"):
            Sampling(FINDING, shares)


def numbers_of(info: shards.ShardInfo, split: str, fold: Fold) -> list[tuple[str, int]]:
    """Original split and number of the images in `split` of a fold."""
    rows = selection.rows_of(info, split, fold)
    return [("train", int(n)) if n < TRAIN else ("val", int(n) - TRAIN) for n in rows.numbers_N]


def patients_of(images: list[tuple[str, int]]) -> set[object]:
    return {known(*image)[schema.PATIENT_ID] or image for image in images}


def test_each_patient_validates_in_one_fold_and_trains_in_the_others(made: shards.ShardInfo) -> None:
    folds = [Fold(number, 4) for number in range(4)]
    val = [numbers_of(made, "val", fold) for fold in folds]
    assert sorted(image for images in val for image in images) == sorted(
        [("train", n) for n in range(TRAIN)] + [("val", n) for n in range(VAL)]
    )
    shown = [sum(number % 5 == 0 for _, number in images) for images in val]
    assert max(shown) - min(shown) <= 1, "each fold has its share of the finding"
    for fold, images in zip(folds, val, strict=True):
        train = numbers_of(made, "train", fold)
        assert len(train) + len(images) == TRAIN + VAL
        assert not patients_of(train) & patients_of(images)
        assert {split for split, _ in train} == {"train", "val"}
        assert len(selection.rows_of(made, "test", fold)) == 9


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
@pytest.mark.parametrize("world", [1, 2])
def test_a_fold_is_read_whole_and_sampled_like_a_split(made: shards.ShardInfo, world: int, cache_bytes: int) -> None:
    fold = Fold(1, 4)
    val = streams(made, world, split="val", fold=fold, cache_bytes=cache_bytes)
    seen = [int(pixels[0, 0]) for worker in val for batch in worker.every() for pixels in batch[schema.PIXELS]]
    assert sorted(seen) == sorted(number for _, number in numbers_of(made, "val", fold))
    train = sampled(made, world, fold=fold, cache_bytes=cache_bytes)
    allowed = {number for _, number in numbers_of(made, "train", fold)}
    for epoch, share in enumerate(SLIDING):
        times = together(train, epoch)
        assert set(times) <= allowed
        images = train[0].steps * STEP
        assert sum(times.values()) == images
        assert sum(count for number, count in times.items() if number % 5 == 0) == round(share * images)


class Sliding(AlignRecipe):
    @property
    def sampled_finding(self) -> str:
        return self.mask_label

    def positive_fraction_of(self, epoch: int) -> float | None:
        return 0.5 if epoch else 0.75


def test_recipe_sets_fold_and_positive_fractions() -> None:
    recipe = AlignRecipe(epochs=3, folds=5, fold=4)
    assert fold_of(recipe) == Fold(4, 5)
    assert fold_of(AlignRecipe()) is None
    assert sampling_of(recipe) is None
    assert sampling_of(Sliding(epochs=3)) == Sampling("Lungs", (0.75, 0.5, 0.5))
    with pytest.raises(UserError, match=r"folds=5 without fold: .* Use --fold, from 0 to 4"):
        fold_of(AlignRecipe(folds=5))
    for wrong in ({"folds": 1}, {"folds": -2}, {"folds": 3, "fold": 3}, {"folds": 3, "fold": -1}, {"fold": 0}):
        with pytest.raises(UserError, match=r"folds?: expected"):
            AlignRecipe(**wrong)


class Massive(Sliding):
    mask_label = FINDING
    columns = (schema.PIXELS,)


def test_training_uses_the_recipe_fold_and_sampling(made: shards.ShardInfo) -> None:
    recipe = Massive(epochs=2, batch_size=STEP, folds=4, fold=1)
    train, val = open_streams({"shards": made.uri, "cache_bytes": 0}, recipe, SingleProcess(), RayTrainSession())
    assert isinstance(train, ShardStream)
    assert (train.fold, train.sampling) == (Fold(1, 4), Sampling(FINDING, (0.75, 0.5)))
    images = train.steps * STEP
    for epoch, share in enumerate((0.75, 0.5)):
        shown_now = [number for batch in shown(train, epoch) for number in batch]
        assert sum(number % 5 == 0 for number in shown_now) == round(share * images)
    assert sum(len(batch[schema.PIXELS]) for batch in val.every()) == len(numbers_of(made, "val", Fold(1, 4)))


@pytest.mark.parametrize("folds", [{"folds": 4, "fold": 1}, {}])
def test_workers_need_no_index_for_the_same_epochs(
    made: shards.ShardInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folds: dict[str, int]
) -> None:
    recipe = Massive(epochs=2, batch_size=STEP, **folds)
    data = {"shards": made.uri, "cache_bytes": 0}

    def epochs(data: dict[str, object]) -> list[object]:
        train, val = open_streams(data, recipe, SingleProcess(), RayTrainSession())
        assert isinstance(train, ShardStream)
        return [shown(train, 0), shown(train, 1), [batch[schema.PIXELS][:, 0, 0].tolist() for batch in val.every()]]

    expected = epochs(data)
    other = recipe.replace(fold=3) if folds else recipe  # what one fold needs serves all of them
    selections = select_images(made.uri, [AlignRecipe(), other], str(tmp_path / "selections.npz"))
    monkeypatch.setattr(shard_index, "read_index", None)
    assert epochs(data | {"selections": selections}) == expected
    assert select_images(made.uri, [AlignRecipe()], str(tmp_path / "none")) == ""


def test_a_run_stores_what_its_workers_need_of_the_index(made: shards.ShardInfo, tmp_path: Path) -> None:
    recipe = AlignRecipe(size=16, backbone="conv3", lungs=False, folds=4, fold=1)
    about = describe(made.uri, recipe, str(tmp_path)).about
    assert about["selections"] == str(tmp_path / SELECTIONS)
    assert Path(about["selections"]).exists()
    about = describe(made.uri, recipe, str(tmp_path), selections="/of/a/search.npz").about
    assert about["selections"] == "/of/a/search.npz"


def test_raw_archives_support_neither_folds_nor_sampling() -> None:
    check_raw(AlignRecipe(), "/data")
    for recipe in (Sliding(), AlignRecipe(folds=2, fold=0)):
        with pytest.raises(UserError, match=r"/data is not shards.* Leave --stream out"):
            check_raw(recipe, "/data")


@pytest.mark.parametrize("fold", [None, Fold(1, 4)])
@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_the_first_ids_are_those_of_the_first_images(
    made: shards.ShardInfo, fold: Fold | None, cache_bytes: int
) -> None:
    columns = (schema.PIXELS, schema.IMAGE_ID)
    (val,) = streams(made, 1, split="val", columns=columns, fold=fold, cache_bytes=cache_bytes)
    first = next(val.every())[schema.IMAGE_ID]
    ids = val.first_ids(len(first))
    hashed = to_columns(pa.table({schema.IMAGE_ID: ids}), [schema.IMAGE_ID], made.pixels)[schema.IMAGE_ID]
    assert hashed.tolist() == first.tolist()
    assert len(val.first_ids(10_000)) == val.rows
