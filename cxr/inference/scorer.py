"""A checkpoint's network applied to decoded rows, for archives on Ray and for `cxr.load` without it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.data.batch import Batch, to_columns, to_device, to_tensors
from cxr.data.device_time import DeviceTime
from cxr.errors import UserError
from cxr.families.base import ScoringContext
from cxr.families.capabilities import embedder, latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.inference import latents, panel
from cxr.inference.options import Precision, TtaFlip, resolved
from cxr.schema import PixelFormat

T = TypeVar("T")
_CLOSE = 0.005  # distance of a probability from its threshold within which bfloat16 may change the decision
_LOGGER = logging.getLogger("cxr")


@dataclass(frozen=True)
class ScoredBatch:
    """Some rows without an error, and what the network makes of them, in their order."""

    rows: pa.Table
    scores: pa.Table
    """The family's `score_columns`."""
    pictures: dict[str, Tensor]
    """As `Recipe.render` returns them; empty unless requested."""
    latents: pa.Table | None
    """Rows with latents instead of pixels, if requested."""
    embeddings: np.ndarray | None
    """(B, D) float32, if requested."""


def with_tta_flip(model: Checkpoint, choice: TtaFlip) -> Checkpoint:
    """A checkpoint that averages predictions over mirror images or does not, if its family has this choice."""
    recipe = None if choice == "checkpoint" else model.recipe.with_tta_flip(choice == "on")
    return replace(model, recipe=recipe) if recipe else model


class Scorer:
    """A checkpoint's network on a device.

    Args:
        model: its network is moved to the device.
        batch_size: number of images per forward pass. If the device has too little memory for them, it is halved.
        precision: "auto" computes convolutions and matrix products in bfloat16 on GPUs and in float32 on CPUs.
            Images with a probability close to its threshold are predicted again in float32, so that bfloat16 does
            not change decisions.
        compiled: compile the network with torch.compile.
        note: called with what the user should know.
        turn: held by the thread that uses the network; one for all networks on a device.

    Thread-safe: one batch at a time goes through the network, while other threads copy batches to the device or turn
    predictions into scores.
    """

    def __init__(
        self,
        model: Checkpoint,
        device: torch.device,
        batch_size: int,
        *,
        precision: Precision = "float32",
        compiled: bool = False,
        note: Callable[[str], None] = _LOGGER.warning,
        turn: threading.Lock | None = None,
    ) -> None:
        self.recipe, self.findings, self.thresholds = model.recipe, model.findings, model.thresholds
        self.device, self.batch_size = device, batch_size
        self.bfloat16 = resolved(precision, device.type) == "bfloat16"
        self._note = note
        self._record = panel.member_record("", model)
        self._lock = turn or threading.Lock()
        self.device_time = DeviceTime(device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        memory = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.network = model.network.to(device, memory_format=memory)  # pyright: ignore[reportCallIssue]
        if schema.DECISIONS in self.recipe.score_columns.names:
            own_F = self.network.get_buffer("thresholds").tolist()
            used_F = [self.thresholds.get(finding, own) for finding, own in zip(self.findings, own_F, strict=True)]
            self._thresholds_F = torch.tensor(used_F, dtype=torch.float64, device=device)
        if compiled:  # families call the network, its parts or parts of these; what is never called is not compiled
            for name, module in self.network.named_modules():
                if name.count(".") < 2:
                    module.compile()

    def batches(
        self,
        rows: pa.Table,
        pixels: PixelFormat,
        *,
        encoded: bool = False,
        render: bool = False,
        save_latents: bool = False,
        save_embeddings: bool = False,
    ) -> Iterator[ScoredBatch]:
        """Score the rows that have no error.

        Args:
            rows: `schema.row_schema(pixels)`.
            encoded: the pixels are latents.
            render: also make pictures.
            save_latents: also return latents, from which the scores are made then.
            save_embeddings: also return embeddings.
        """
        score = partial(
            self._batch,
            pixels=pixels,
            encoded=encoded,
            render=render,
            save_latents=save_latents,
            save_embeddings=save_embeddings,
        )
        return self.in_batches(rows, score)

    def in_batches(self, rows: pa.Table, compute: Callable[[pa.Table], T]) -> Iterator[T]:
        """What `compute` returns for each batch of the rows that have no error.

        If the device runs out of memory, batches are halved from then on.

        Raises:
            UserError: the device has too little memory for a single image.
        """
        good, at = rows.filter(pc.is_null(rows[schema.ERROR])), 0
        while at < good.num_rows:
            size = self.batch_size
            try:
                computed = compute(good.slice(at, size))
            except torch.OutOfMemoryError as error:
                self._halve(size, error)
                continue
            at += size
            yield computed

    def _halve(self, size: int, error: torch.OutOfMemoryError) -> None:
        with self._lock:
            if size == 1:
                raise UserError(
                    f"{self.device} has too little memory for one image of {self.recipe.size} px: use a device with "
                    f"more memory, or one that nothing else uses"
                ) from error
            if self.batch_size == size:  # else another thread has halved it
                self.batch_size = size // 2
                self._note(
                    f"{self.device} has too little memory for {size} images at a time: scoring "
                    f"{self.batch_size} at a time"
                )
        torch.cuda.empty_cache()

    def _batch(
        self,
        rows: pa.Table,
        pixels: PixelFormat,
        encoded: bool,
        render: bool,
        save_latents: bool,
        save_embeddings: bool,
    ) -> ScoredBatch:
        latent_rows = vectors_BD = None
        batch = self.to_batch(rows, pixels)
        with self.computing():
            if save_latents:
                encoder = latent_encoder(self.recipe)
                batch = {schema.PIXELS: encoder.encode(self.network, batch)}
                stored = batch[schema.PIXELS].cpu().numpy()
                latent_rows = latents.with_latents(rows, pixels, stored, encoder.latent_format())
            if save_embeddings:
                predicted, vectors_BD = embedder(self.recipe).predict_and_embed(self.network, batch)
                predict, draw = self.recipe.predict, self.recipe.render
            elif encoded or save_latents:
                encoder = latent_encoder(self.recipe)
                predict, draw = encoder.predict_latents, encoder.render_latents
                predicted = predict(self.network, batch)
            else:
                predict, draw = self.recipe.predict, self.recipe.render
                predicted = predict(self.network, batch)
            predicted = self._decided(predicted, predict, batch)
            pictures = draw(self.network, batch) if render else {}
            embeddings_BD = None if vectors_BD is None else vectors_BD.float().cpu().numpy()
        predicted = {name: v.float() if v.dtype == torch.bfloat16 else v for name, v in predicted.items()}
        scores = self.recipe.scored(predicted, rows, ScoringContext(self.findings, pixels.size, self.thresholds))
        return ScoredBatch(rows, scores, pictures, latent_rows, embeddings_BD)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Whoever uses the network does so in this context: one thread at a time, in inference mode."""
        with (
            self._lock,
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16),
            self.device_time.measured(),
        ):
            yield

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """The predictions of the family for a batch on the network's device."""
        with self.computing():
            return self._decided(self.recipe.predict(self.network, batch), self.recipe.predict, batch)

    def to_batch(self, rows: pa.Table, pixels: PixelFormat) -> Batch:
        """The pixels of rows without an error, on the network's device. Copied while the network computes."""
        tensors = to_tensors(to_columns(rows, [schema.PIXELS], pixels), pixels)
        if self._copies is None:
            return to_device(tensors, self.device)
        with torch.cuda.stream(self._copies):
            batch = to_device(tensors, self.device)
        for values in batch.values():  # otherwise their memory could be reused before the network has read them
            values.record_stream(torch.cuda.current_stream(self.device))
        self._copies.synchronize()
        return batch

    def _decided(
        self, predicted: dict[str, Tensor], predict: Callable[[nn.Module, Batch], dict[str, Tensor]], batch: Batch
    ) -> dict[str, Tensor]:
        """The predictions of a batch, with those of float32 where bfloat16 may have changed a decision."""
        if not self.bfloat16 or schema.DECISIONS not in predicted:
            return predicted
        distances_BF = predicted[schema.PROBABILITIES].float() - self._thresholds_F
        close = (distances_BF.abs() < _CLOSE).any(1).nonzero()[:, 0]
        if not len(close):
            return predicted
        with torch.autocast(self.device.type, enabled=False):
            again = predict(self.network, {name: values[close] for name, values in batch.items()})
        return {
            name: values.to(again[name].dtype).index_copy(0, close, again[name]) for name, values in predicted.items()
        }

    def table(self, rows: pa.Table, scores_of_batches: Sequence[pa.Table]) -> pa.Table:
        """The scores of all `rows` in their order: `schema.SCORES` and the family's columns, null where there is an
        error.

        Args:
            scores_of_batches: the scores of all that `batches` yielded for these rows.
        """
        scores = pa.concat_tables([self.recipe.score_columns.empty_table(), *scores_of_batches])
        good = pc.is_null(rows[schema.ERROR]).to_numpy()
        where = np.where(good, np.cumsum(good) - 1, -1)
        index = pa.array(where, mask=~good)
        identity = {field.name: rows[field.name] for field in schema.SCORES}
        table = pa.table(identity | {name: scores[name].take(index) for name in scores.column_names})
        return table.replace_schema_metadata(
            {
                schema.FINDINGS_KEY: json.dumps(self.findings),
                schema.MEMBERS_KEY: json.dumps([self._record]),
                schema.SCORES_VERSION_KEY: str(schema.SCORES_VERSION),
            }
        )
