"""A checkpoint's network applied to decoded rows, for archives on Ray and for `cxr.load` without it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cxr import schema
from cxr.data.batch import Batch, to_columns, to_device, to_tensors
from cxr.families.base import ScoringContext
from cxr.families.capabilities import embedder, latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.inference import latents
from cxr.schema import PixelFormat


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


class Scorer:
    """A checkpoint's network on a device.

    Args:
        model: its network is moved to the device.
        batch_size: number of images per forward pass.
        bfloat16: compute convolutions and matrix products in bfloat16.

    Thread-safe: one batch at a time goes through the network.
    """

    def __init__(self, model: Checkpoint, device: torch.device, batch_size: int, *, bfloat16: bool = False) -> None:
        self.recipe, self.findings = model.recipe, model.findings
        self.device, self.batch_size, self.bfloat16 = device, batch_size, bfloat16
        self._lock = threading.Lock()
        memory = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.network = model.network.to(device, memory_format=memory)  # pyright: ignore[reportCallIssue]

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
        good = rows.filter(pc.is_null(rows[schema.ERROR]))
        for at in range(0, good.num_rows, self.batch_size):
            yield self._batch(good.slice(at, self.batch_size), pixels, encoded, render, save_latents, save_embeddings)

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
        with self.computing():
            batch = self.to_batch(rows, pixels)
            if save_latents:
                encoder = latent_encoder(self.recipe)
                batch = {schema.PIXELS: encoder.encode(self.network, batch)}
                stored = batch[schema.PIXELS].cpu().numpy()
                latent_rows = latents.with_latents(rows, pixels, stored, encoder.latent_format())
            if save_embeddings:
                predicted, vectors_BD = embedder(self.recipe).predict_and_embed(self.network, batch)
                pictures = self.recipe.render(self.network, batch) if render else {}
            else:
                predicted, pictures = self._predicted(batch, encoded or save_latents, render)
            embeddings_BD = None if vectors_BD is None else vectors_BD.float().cpu().numpy()
        predicted = {name: v.float() if v.dtype == torch.bfloat16 else v for name, v in predicted.items()}
        scores = self.recipe.scored(predicted, rows, ScoringContext(self.findings, pixels.size))
        return ScoredBatch(rows, scores, pictures, latent_rows, embeddings_BD)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Whoever uses the network does so in this context: one thread at a time, in inference mode."""
        with (
            self._lock,
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16),
        ):
            yield

    def to_batch(self, rows: pa.Table, pixels: PixelFormat) -> Batch:
        """The pixels of rows without an error, on the network's device."""
        return to_device(to_tensors(to_columns(rows, [schema.PIXELS], pixels), pixels), self.device)

    def _predicted(self, batch: Batch, encoded: bool, render: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predictions and pictures of a batch whose pixels are images or latents."""
        recipe, network = self.recipe, self.network
        if encoded:
            encoder = latent_encoder(recipe)
            predicted = encoder.predict_latents(network, batch)
            pictures = encoder.render_latents(network, batch) if render else {}
        else:
            predicted = recipe.predict(network, batch)
            pictures = recipe.render(network, batch) if render else {}
        return predicted, pictures

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
        return table.replace_schema_metadata({schema.FINDINGS_KEY: json.dumps(self.findings)})
