"""What a training run reads: shards, by our own loader or by Ray Data, or a raw archive that Ray Data streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ray.data import Dataset

from cxr import schema, storage
from cxr.data import shards
from cxr.data.batch import stored
from cxr.data.ray_input import RowStream, Streams, archive_streams, shard_streams
from cxr.data.sampling import rows_of, sampled_findings, showing, store_selections
from cxr.families import image_crop
from cxr.families.base import Recipe
from cxr.families.compatibility import RawArchive, check_compatible, check_ray_reader, fold_of, sampling_of
from cxr.schema import PixelFormat
from cxr.sources import find_source
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, Labeling, ReadOptions
from cxr.training.options import ShardReader
from cxr.training.raw_stream import order_seed
from cxr.training.run_log import read_metrics

CACHE_BYTES = 1 << 28  # of pixels that each worker keeps in memory
SELECTIONS = "selections.npz"  # file in OUT, see `select_images`
_STREAMED = "stream"  # folder in OUT with the manifest of an archive that is streamed
_SHUFFLED_BATCHES = 4  # of a raw archive, among which images are drawn; more would delay the first batch of an epoch


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Args:
        about: what workers must know to open it, as plain data: see `raw_stream.open_streams`.
        findings: the findings of its labels, in order.
        trained_on: what the model card says of it.
        streams: what Ray Data reads and the workers share; empty if they read shards themselves.
    """

    about: dict[str, Any]
    findings: tuple[str, ...]
    trained_on: dict[str, Any]
    streams: Streams = field(default_factory=dict)

    def datasets(self, seed: int, out: str) -> dict[str, Callable[[], Dataset]]:
        """For each split, a function that makes its dataset whenever workers start.

        The order of the rows depends on the seed and on the epoch with which the workers begin, so that a run that
        resumes does not show images in the order of its first epochs again.
        """
        return {split: partial(_begin, stream, seed, out) for split, stream in self.streams.items()}


def _begin(stream: RowStream, seed: int, out: str) -> Dataset:
    finished = read_metrics(out)
    return stream.dataset(order_seed(seed, finished[-1]["epoch"] if finished else 0))


def describe(
    archive: str,
    recipe: Recipe,
    out: str,
    reading: ReadOptions = ALL_IMAGES,
    labeling: Labeling = SOURCE_LABELS,
    shard_reader: ShardReader = "own",
    selections: str = "",
) -> TrainingData:
    """The data of a run on shards or a raw archive.

    Args:
        selections: what `select_images` stored for this and other recipes; by default it is stored in OUT.

    Raises:
        UserError: the recipe cannot learn from this archive, or not through Ray Data.
    """
    archive = storage.normalize(archive)
    if not shards.is_shards(archive):
        return _raw(archive, recipe, out, reading, labeling)
    info = shards.read_info(archive)
    check_compatible([info], recipe)
    images = {split: info.rows(split) for split in schema.SPLITS if info.rows(split)}
    trained_on = {"source": info.source, "images": images, "rejects": info.rejects}
    about: dict[str, Any] = {"shards": archive, "cache_bytes": CACHE_BYTES}
    if shard_reader == "own":
        about["selections"] = selections or select_images(archive, [recipe], storage.join(out, SELECTIONS))
        return TrainingData(about, info.findings, trained_on)
    check_ray_reader(recipe)
    streams = shard_streams(info, stored(recipe.columns))
    about["streamed"] = _streamed(
        streams, info.pixels, info.findings, info.most_boxes, CACHE_BYTES // info.pixels.row_bytes
    )
    return TrainingData(about, info.findings, trained_on, streams)


def select_images(archive: str, recipes: Iterable[Recipe], uri: str) -> str:
    """Read the index of shards once for the folds and the sampling of these recipes, so that workers need not.

    Returns:
        `uri`, where the result is stored for `describe`; empty if there are no shards, or the recipes need no index.

    Raises:
        UserError: there are fewer patients than folds.
    """
    if not shards.is_shards(archive):
        return ""
    info = shards.read_info(archive)
    for recipe in recipes:
        fold, sampling = fold_of(recipe), sampling_of(recipe)
        rows_of(info, "train", fold)
        if sampling and {*(sampled := sampled_findings(info, sampling))} <= {*info.findings}:
            showing(info, "train", sampled, fold)
    if not info.selections:
        return ""
    store_selections(info, uri)
    return uri


def _raw(archive: str, recipe: Recipe, out: str, reading: ReadOptions, labeling: Labeling) -> TrainingData:
    pixels = PixelFormat(recipe.size)
    streams, manifest = archive_streams(
        archive,
        storage.join(out, _STREAMED),
        pixels,
        reading,
        labeling,
        columns=stored(recipe.columns),
        crop=image_crop.of_recipe(recipe),
        enhance=recipe.enhancement,
        seed=recipe.seed,
    )
    raw = RawArchive(archive, manifest, None)
    check_compatible([raw], recipe)
    images = {split: stream.rows for split, stream in streams.items()}
    trained_on = {"source": find_source(archive, reading.source).name, "images": images}
    streamed = _streamed(streams, pixels, raw.findings, schema.MOST_BOXES, _SHUFFLED_BATCHES * recipe.batch_size)
    return TrainingData({"streamed": streamed}, raw.findings, trained_on, streams)


def _streamed(
    streams: Streams, pixels: PixelFormat, findings: tuple[str, ...], most_boxes: int, shuffle_rows: int
) -> dict[str, Any]:
    return {
        "rows": {split: stream.rows for split, stream in streams.items()},
        "pixels": asdict(pixels),
        "findings": list(findings),
        "most_boxes": most_boxes,
        "shuffle_rows": shuffle_rows,
    }
