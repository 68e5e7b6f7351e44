"""The actor that scores the parts of an archive: networks, and the files that it writes for each part."""

from __future__ import annotations

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from cxr import schema, storage
from cxr.data import embeddings
from cxr.data.batch import best_device
from cxr.data.decode import rows_in_format
from cxr.data.ledger import SUFFIX
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.base import Recipe
from cxr.families.capabilities import embedder, latent_encoder
from cxr.inference import latents
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Member, Panel, join_scores
from cxr.inference.plan import Plan
from cxr.inference.read import PART, PART_ROWS, TIMES, is_read
from cxr.inference.scorer import ScoredBatch, Scorer, with_tta_flip
from cxr.runtime.console import note
from cxr.runtime.step_times import NETWORKS, StepTimes
from cxr.schema import PixelFormat

_FILE_THREADS = 32  # that write pictures: on object stores, they wait
LATENTS = "latents"  # folder of the result, beside SCORES


def gives_latents(recipe: Recipe) -> bool:
    """Whether networks of this recipe compress images."""
    with suppress(UserError):
        latent_encoder(recipe).latent_format()
        return True
    return False


def gives_embeddings(recipe: Recipe) -> bool:
    """Whether networks of this recipe describe images by vectors."""
    with suppress(UserError):
        embedder(recipe)
        return True
    return False


class PartScorer:
    """The networks of a panel in an actor, which scores parts and writes each as one file.

    Called by a few threads at a time, each with a part: while one part is in the networks, the scores of others are
    made of predictions (masks at the size of the original, boxes, tables), compressed and written.

    Args:
        cpu_threads: of a network on the CPU.
        deadline: seconds since 1970 by which every part must have been scored; others are left.
        increment: number of the increment that the parts belong to.

    Raises:
        UserError: when called: a checkpoint is missing or damaged, or the networks do not fit in the memory of the
            GPU. Ray would report an error of the constructor as the death of a process, without its message.
    """

    def __init__(
        self,
        panel: Panel,
        out: str,
        plan: Plan,
        options: ScoreOptions,
        cpu_threads: int = 1,
        deadline: float | None = None,
        increment: int = 0,
    ) -> None:
        cv2.setNumThreads(0)  # parts are worked on by several threads
        torch.set_num_threads(cpu_threads)  # Ray sets it to the CPUs that the actor reserves, which reading also uses
        self.panel, self.out, self.plan, self.options = panel, out, plan, options
        self.deadline, self.increment, self.slowest_s = deadline, increment, 0.0
        self._turn = threading.Lock()
        self._files = ThreadPoolExecutor(_FILE_THREADS)
        self.scorers: list[Scorer] = []
        self._mistake: UserError | None = None
        try:
            self.scorers += [self._loaded(member) for member in panel.members]
        except UserError as mistake:
            self._mistake = mistake

    def _loaded(self, member: Member) -> Scorer:
        try:
            return Scorer(
                with_tta_flip(
                    replace(checkpoint.load(member.checkpoint), thresholds=member.thresholds), self.options.tta_flip
                ),
                best_device(),
                member.batch_size or self.options.batch_size,
                precision=member.precision or self.options.precision,
                compiled=self.options.compile,
                note=note,
                turn=self._turn,
            )
        except torch.OutOfMemoryError as error:
            if self.panel.is_single:
                message = "expected the network to fit in the memory of the GPU: use a GPU with more memory"
            else:
                names = " and ".join(self.panel.names)
                message = (
                    f"expected the networks of {names} to fit together in the memory of one GPU, got too little "
                    f"memory for {member.name}: divide the panel into several runs, or use GPUs with more memory"
                )
            raise UserError(message) from error

    def __call__(self, rows: pa.Table) -> dict[str, Any]:
        if self._mistake:
            raise self._mistake
        name, count = rows[PART][0].as_py(), rows[PART_ROWS][0].as_py()
        if self._is_too_late(rows):
            return {"name": [name], "images": [0], "errors": [[]], "seconds": ["{}"]}
        start = time.monotonic()
        assert rows.num_rows == count, f"Ray Data split {name}: {rows.num_rows} of {count} rows"
        tables = {}
        for member, scorer, number in zip(self.panel.members, self.scorers, self.plan.format_of, strict=True):
            pixels = self.plan.formats[number].pixels
            tables[member.name] = self._score(name, member, scorer, rows_in_format(rows, number, pixels), pixels)
        table = join_scores(tables)
        table = table.append_column(schema.INCREMENT, pa.array([self.increment] * count, pa.int32()))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.write_bytes(storage.join(self.out, name + SUFFIX), sink.getvalue())
        self.slowest_s = max(self.slowest_s, time.monotonic() - start)
        times = StepTimes(json.loads(rows[TIMES][0].as_py()))
        times.add(NETWORKS, sum(scorer.device_time.taken() for scorer in self.scorers))
        errors = pc.drop_null(table[schema.ERROR]).to_pylist()
        return {"name": [name], "images": [count], "errors": [errors], "seconds": [times.to_json()]}

    def _is_too_late(self, rows: pa.Table) -> bool:
        """Whether a part is to be left for the next run: it would probably not be scored by the deadline."""
        return not is_read(rows) or (self.deadline is not None and time.time() + self.slowest_s >= self.deadline)

    def _score(self, part: str, member: Member, scorer: Scorer, rows: pa.Table, pixels: PixelFormat) -> pa.Table:
        """The scores of a part by a member; writes its latents, embeddings and pictures."""
        folder = member.folder(self.out)
        save_latents = self.options.save_latents and gives_latents(scorer.recipe)
        save_embeddings = self.options.save_embeddings and gives_embeddings(scorer.recipe)
        scores, encoded, vectors = [], [], []
        for batch in scorer.batches(
            rows,
            pixels,
            encoded=self.plan.encoded,
            render=self.options.save_images,
            save_latents=save_latents,
            save_embeddings=save_embeddings,
        ):
            scores.append(batch.scores)
            if batch.latents is not None:
                encoded.append(batch.latents)
            if batch.embeddings is not None:
                vectors.append(batch.embeddings)
            self._write_pictures(folder, batch)
        if encoded:
            latents.write_part(storage.join(folder, LATENTS), part, pa.concat_tables(encoded))
        if save_embeddings:
            good = rows.filter(pc.is_null(rows[schema.ERROR]))
            vectors_BD = np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)
            embeddings.write_part(storage.join(folder, embeddings.FOLDER), part, good, vectors_BD)
        return scorer.table(rows, scores)

    def _write_pictures(self, folder: str, batch: ScoredBatch) -> None:
        image_ids = batch.rows[schema.IMAGE_ID].to_pylist()
        for kind, images in batch.pictures.items():
            uris = [storage.join(folder, kind, picture_name(image_id)) for image_id in image_ids]
            for _ in self._files.map(
                lambda uri, image: storage.write_bytes(uri, png(image)), uris, images.cpu().numpy()
            ):
                pass


def png(image: np.ndarray) -> bytes:
    """A picture, uint8 (H, W), or (H, W, 3) in red, green, blue, as a PNG file."""
    good, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)  # OpenCV expects blue first
    assert good
    return data.tobytes()


def picture_name(image_id: str) -> str:
    """File name of an image's picture, unique per id: "a/b" -> "a/b.png", "a/b.png" -> "a/b.png.png"."""
    return storage.safe_path(image_id, ".png")
