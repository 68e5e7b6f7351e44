"""`cxr.load`: a checkpoint as a Python object that scores images in this process, without Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch, best_device
from cxr.data.decode import make_rows
from cxr.data.prefetch import prefetched
from cxr.errors import ImageRejectedError, UserError
from cxr.families import checkpoint, image_crop
from cxr.families.base import one_of
from cxr.families.capabilities import HeatMaps, MaskProbabilities, embedder
from cxr.families.checkpoint import Checkpoint
from cxr.imaging.geometry import ResizeTransform
from cxr.inference.explanation import HeatMap
from cxr.inference.inputs import Images, archive_uri, chunks
from cxr.inference.options import Precision
from cxr.inference.plan import plan_scoring, rows_per_part
from cxr.inference.read import InputFormat, PartReader
from cxr.inference.scorer import Scorer
from cxr.schema import PixelFormat
from cxr.sources.options import ALL_IMAGES, GateMode, ReadOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OnError = Literal["row", "raise"]
Decoded = tuple[pa.Table, PixelFormat, bool]
"""Decoded rows, the format of their pixels, and whether these are latents."""
MOST_SHOWN = 8  # images in a figure
_LOGGER = logging.getLogger("cxr")


def load(
    uri: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: Precision = "auto",
    batch_size: int = 64,
) -> Predictor:
    """Load a checkpoint of any family from a folder, S3 or Google Cloud Storage.

    Args:
        uri: folder or URI of the checkpoint.
        device: "cpu", "cuda", "cuda:1", …; None: the GPU if there is one, else the CPU.
        precision: "auto" is bfloat16 on GPUs and float32 on CPUs. bfloat16 is faster on GPUs and on CPUs with AMX or
            AVX512-BF16; scores differ slightly.
        batch_size: number of images per forward pass, and the most that are decoded together. It is halved if the
            device has too little memory.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or this machine does not have the device.
    """
    if not isinstance(uri, (str, os.PathLike)):
        raise UserError(f"expected the path or URI of a checkpoint, got {type(uri).__name__}: use a string")
    one_of("precision", precision, get_args(Precision))
    if batch_size < 1:
        raise UserError(f"batch_size: expected 1 or more, got {batch_size}")
    return Predictor(checkpoint.load(os.fspath(uri)), _device(device), precision, batch_size)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name; a device that this build or machine does not have
        known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UserError(f"device: expected one of {', '.join(known)}, got {name}: use one of these") from None
    return device


class Predictor:
    """A checkpoint that scores images in this process.

    Every method takes one image or several: paths or URIs, the bytes of files (DICOM, PNG, JPEG), NumPy arrays,
    pydicom datasets, any mix of these, or an iterator over them; or the path or URI of an archive (a folder, a ZIP
    or TAR file, a list of images, shards). Images are decoded, cropped, enhanced and scored by the same code as in
    `cxr score`, and scores are the same.

    An array is (height, width), uint8 or uint16, or float in [0, 1], with dense tissue bright.

    Thread-safe: several threads may use one predictor. They decode images in parallel and take turns with the
    network. Files are decoded in two child processes, which all predictors of this process share and which end with
    it.
    """

    def __init__(self, model: Checkpoint, device: torch.device, precision: Precision, batch_size: int) -> None:
        self._model = model
        self._scorer = Scorer(model, device, batch_size, precision=precision)
        self._pixels = model.recipe.pixel_format
        self._input = InputFormat(self._pixels, image_crop.of_checkpoint(model), model.recipe.enhancement)

    def __repr__(self) -> str:
        return f"<cxr.Predictor: {self.family}, {self._model.uri}, on {self._scorer.device}>"

    @property
    def family(self) -> str:
        """The family of the checkpoint, such as "detect"."""
        return self._model.recipe.family

    @property
    def sha256(self) -> str:
        """SHA-256 of the checkpoint's weights."""
        return self._model.about["sha256"]

    @property
    def findings(self) -> tuple[str, ...]:
        """The findings of the checkpoint, in the order of the columns `probabilities` and `decisions`."""
        return self._model.findings

    def predict(self, images: Images, *, on_error: OnError = "row", reading: ReadOptions = ALL_IMAGES) -> pa.Table:
        """Scores: one row per image, in order, with the columns that `cxr score` writes.

        Args:
            on_error: "row": an image that cannot be used is a row with `error`. "raise": it is an exception.
            reading: how an archive is read, which of its images, and whether images are checked to be frontal chest
                X-rays (`gate`).

        Raises:
            UserError: something is not an image, or a path, archive or bucket does not exist.
            ImageRejectedError: an image cannot be used, and `on_error` is "raise".
        """
        return pa.concat_tables(self.predict_batches(images, on_error=on_error, reading=reading))

    def predict_batches(
        self, images: Images, *, on_error: OnError = "row", reading: ReadOptions = ALL_IMAGES
    ) -> Iterator[pa.Table]:
        """`predict` for more images than fit into memory: yields the scores of one batch of images at a time."""
        for rows, pixels, encoded in self._decoded(images, on_error, reading):
            batches = self._scorer.batches(rows, pixels, encoded=encoded)
            yield self._scorer.table(rows, [batch.scores for batch in batches])

    def explain(
        self, images: Images, *, on_error: OnError = "row", reading: ReadOptions = ALL_IMAGES
    ) -> Iterator[HeatMap]:
        """Yield the heat maps of each image, in order; one with an error has no maps.

        Raises:
            UserError: the family has no heat maps; otherwise as `predict`.
        """
        recipe = self._model.recipe
        if not isinstance(recipe, HeatMaps):
            raise UserError(
                f"expected a checkpoint of a family with heat maps, such as classify, localize or attend, got one of "
                f"family {self.family!r}: use predict or show"
            )
        return self._maps(recipe.heat_maps, self.findings, self._decoded(images, on_error, reading))

    def segment(
        self, images: Images, *, on_error: OnError = "row", reading: ReadOptions = ALL_IMAGES
    ) -> Iterator[HeatMap]:
        """Yield, for each image in order, the probability that each pixel belongs to the mask: one map, named like
        the mask ("Lungs", "Pneumothorax"); none for an image with an error.

        `predict` converts these probabilities to a mask by the rule that training selected.

        Raises:
            UserError: the family does not predict masks; otherwise as `predict`.
        """
        recipe = self._model.recipe
        if not isinstance(recipe, MaskProbabilities):
            raise UserError(
                f"expected a checkpoint of a family that predicts masks, such as lungs or pneumothorax, got one of "
                f"family {self.family!r}: use predict or explain"
            )

        def one_map(network: nn.Module, batch: Batch) -> Tensor:
            return recipe.mask_probabilities(network, batch)[:, None]

        return self._maps(one_map, (recipe.mask_label,), self._decoded(images, on_error, reading))

    def _maps(
        self,
        compute: Callable[[nn.Module, Batch], Tensor],
        names: tuple[str, ...],
        decoded: Iterable[Decoded],
    ) -> Iterator[HeatMap]:
        """The maps (names, h, w) that `compute` makes of each image."""
        for rows, pixels, encoded in decoded:
            of_good = self._per_image(compute, rows, pixels, encoded)
            for row in rows.drop_columns([schema.PIXELS]).to_pylist():
                if row[schema.ERROR] is not None:
                    nothing = np.zeros((0, 0, 0), np.float32)
                    yield HeatMap(row[schema.IMAGE_ID], (), nothing, ResizeTransform(), 0, 0, row[schema.ERROR])
                    continue
                maps_Fhw = next(of_good)
                height, width = maps_Fhw.shape[1:]
                to_stored = ResizeTransform(pixels.size / width, pixels.size / height)
                to_original = to_stored.then(ResizeTransform.from_dict(row[schema.RESIZE_TRANSFORM]))
                size = row[schema.HEIGHT_PX], row[schema.WIDTH_PX]
                yield HeatMap(row[schema.IMAGE_ID], names, maps_Fhw, to_original, *size)

    def _per_image(
        self, compute: Callable[[nn.Module, Batch], Tensor], rows: pa.Table, pixels: PixelFormat, encoded: bool
    ) -> Iterator[np.ndarray]:
        """What `compute` makes of each image without an error, float32, a batch at a time."""
        if encoded:
            raise UserError("expected images, got an archive of latents: use the archive that they were made of")
        scorer = self._scorer

        def computed(good: pa.Table) -> np.ndarray:
            batch = scorer.to_batch(good, pixels)
            with scorer.computing():
                return compute(scorer.network, batch).float().cpu().numpy()

        for values in scorer.in_batches(rows, computed):
            yield from values

    def embed(self, images: Images, *, on_error: OnError = "row", reading: ReadOptions = ALL_IMAGES) -> np.ndarray:
        """The embedding of each image: float32 (images, D), in order; NaN if an image cannot be used.

        Raises:
            UserError: the family has no embeddings; otherwise as `predict`.
        """
        embed = embedder(self._model.recipe).embed
        vectors: list[np.ndarray | None] = []
        for rows, pixels, encoded in self._decoded(images, on_error, reading):
            of_good = self._per_image(embed, rows, pixels, encoded)
            vectors += [None if error else next(of_good) for error in rows[schema.ERROR].to_pylist()]
        width = next((len(vector) for vector in vectors if vector is not None), 0)
        missing = np.full(width, np.nan, np.float32)
        return np.stack([missing if vector is None else vector for vector in vectors])

    def show(self, images: Images, *, finding: str | None = None, min_score: float = 0.25) -> Figure:
        """A matplotlib figure of each image with its predicted boxes, mask, heat map or other prediction.

        Args:
            images: at most 8, not an archive.
            finding: whose heat maps to show. None: the most probable finding of each image.
            min_score: boxes with a lower score are not shown.

        Raises:
            UserError: too many images, an archive, or an unknown finding; otherwise as `predict`.
        """
        from cxr.inference.figure import PICTURE, prediction_figure  # imports matplotlib

        if finding is not None:
            one_of("finding", finding, self.findings)
        if archive_uri(images) is not None:
            raise UserError(f"expected images to show, got the archive {images}: use some of its files")
        first, *others = chunks(images, MOST_SHOWN + 1)
        if others or first.manifest.num_rows > MOST_SHOWN:
            raise UserError(f"expected at most {MOST_SHOWN} images in a figure, got more: make several figures")
        recipe, pixels = self._model.recipe, self._pixels
        rows = self._reader(ALL_IMAGES.gate).rows(first.manifest, first.contents)
        originals = make_rows(first.manifest, PICTURE, contents=first.contents)
        has_heat_maps = isinstance(recipe, HeatMaps)
        located = has_heat_maps or {schema.PRED_BOXES, schema.PRED_MASK_RLE} & {*recipe.score_columns.names}
        batches = list(self._scorer.batches(rows, pixels, render=not located))
        pictures: dict[str, list[np.ndarray | None]] = {}
        for name in batches[0].pictures if batches else ():
            made = iter([picture for batch in batches for picture in batch.pictures[name].cpu().numpy()])
            pictures[name] = [None if error else _unit(next(made)) for error in rows[schema.ERROR].to_pylist()]
        return prediction_figure(
            self._scorer.table(rows, [batch.scores for batch in batches]),
            originals,
            self.findings,
            list(self._maps(recipe.heat_maps, self.findings, [(rows, pixels, False)])) if has_heat_maps else [],
            pictures,
            finding=finding,
            min_score=min_score,
        )

    def _decoded(self, images: Images, on_error: OnError, reading: ReadOptions) -> Iterator[Decoded]:
        one_of("on_error", on_error, ("row", "raise"))
        for rows, pixels, encoded in self._read(images, reading):
            if on_error == "raise" and (bad := rows.filter(pc.is_valid(rows[schema.ERROR]))).num_rows:
                raise ImageRejectedError(f"image {bad[schema.IMAGE_ID][0]}: {bad[schema.ERROR][0]}")
            yield rows, pixels, encoded

    def _read(self, images: Images, reading: ReadOptions) -> Iterator[Decoded]:
        archive = archive_uri(images)
        if archive is not None:
            plan = plan_scoring(archive, {"": self._model}, reading)
            for note in plan.notes:
                _LOGGER.info(note)
            parts = (plan.reader(reading.gate).rows(part.rows) for part in plan.parts)
            pixels = plan.formats[0].pixels
            yield from ((rows, pixels, plan.encoded) for rows in prefetched(parts, depth=1))
            return
        for chunk in chunks(images, min(self._scorer.batch_size, rows_per_part([self._input]))):
            yield self._reader(reading.gate).rows(chunk.manifest, chunk.contents), self._pixels, False

    def _reader(self, check: GateMode) -> PartReader:
        return PartReader((self._input,), check)


def _unit(picture: np.ndarray) -> np.ndarray:
    """A rendered picture as figures expect it: gray in [0, 1], or uint8 in red, green, blue."""
    return picture if picture.ndim == 3 else picture / np.float32(255)
