"""Latent archives: shards whose pixels are X-rays compressed by an encoder, with a record of that encoder.

LATENTS/train/part-00003.parquet …   rows (schema.row_schema) of one part of scores, by split
LATENTS/index.parquet                file and row of each image
LATENTS/rejects.parquet              images that could not be used, and why (schema.REJECTS)
LATENTS/archive.json                 as of other shards, and the encoder; written last
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data.shard_index import write_index
from cxr.data.shards import ARCHIVE_FILE, KIND, REJECTS_FILE, VERSION, ShardInfo
from cxr.errors import UserError
from cxr.families import image_crop
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.imaging.geometry import ResizeTransform, fit_mask
from cxr.schema import PixelFormat

# The Parquet compression with the smallest latents at a few ms per image; levels 10 and 11 take tens of ms.
COMPRESSION, LEVEL = "brotli", 9
_TOP_REASONS = 10


@dataclass(frozen=True)
class Origin:
    """The images that were encoded: their archive, its layout, its findings in the order of the labels."""

    archive: str
    source: str
    findings: tuple[str, ...]


def encoder_fingerprint(model: Checkpoint) -> str:
    """SHA-256 of everything that latents depend on: the encoder's tensors, input size and output format.

    Checkpoints with the same encoder and different classifiers have the same fingerprint.

    Raises:
        UserError: the family has no latents.
    """
    recipe, encoder = model.recipe, latent_encoder(model.recipe)
    digest = hashlib.sha256(json.dumps([recipe.family, recipe.size, asdict(encoder.latent_format())]).encode())
    for name, values in sorted(encoder.encoder_state(model.network).items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_encoder(info: ShardInfo, model: Checkpoint) -> None:
    """Raise UserError unless the encoder of this checkpoint made the latents of `info`."""
    about = info.latents or {}
    same_family = model.recipe.family == about["recipe"]["family"]
    if not same_family or encoder_fingerprint(model) != about["encoder_sha256"]:
        difference = "has another encoder" if same_family else f"is of family {model.recipe.family!r}"
        raise UserError(
            f"{model.uri} {difference}: latents can be scored only with the encoder that made them. Use "
            f"{about['checkpoint']}, which made {info.uri}, or a checkpoint with the same encoder"
        )


# ---- Parts


def with_latents(rows: pa.Table, pixels: PixelFormat, latents_Bhw: np.ndarray, latents: PixelFormat) -> pa.Table:
    """Rows without an error, with latents instead of pixels, and transforms and masks at the size of the latents."""
    expected, ratio = schema.row_schema(latents), pixels.size / latents.size
    columns: dict[str, Any] = {name: rows[name] for name in expected.names}
    flat = pa.py_buffer(np.ascontiguousarray(latents_Bhw, latents.dtype).reshape(-1))
    columns[schema.PIXELS] = pa.Array.from_buffers(pa.binary(latents.row_bytes), rows.num_rows, [None, flat])
    columns[schema.RESIZE_TRANSFORM] = pa.array(
        [_coarser(f, ratio) for f in rows[schema.RESIZE_TRANSFORM].to_pylist()], schema.RESIZE_TRANSFORM_TYPE
    )
    masks = [_smaller(of_row, pixels.size, latents.size) for of_row in rows[schema.MASKS].to_pylist()]
    columns[schema.MASKS] = pa.array(masks, expected.field(schema.MASKS).type)
    return pa.table([columns[name] for name in expected.names], schema=expected)


def _coarser(transform: Mapping[str, float] | None, ratio: float) -> dict[str, float] | None:
    """The resize transform of pixels that are `ratio` times as wide and high."""
    if transform is None:
        return None
    return ResizeTransform(ratio, ratio).then(ResizeTransform.from_dict(transform)).as_dict()


def _smaller(masks: Sequence[Mapping[str, Any]] | None, size: int, new_size: int) -> list[dict[str, Any]] | None:
    """Packed masks at another size: true where at least half of a pixel is covered."""
    if masks is None:
        return None
    ratio, resized = size / new_size, []
    for mask in masks:
        bits = np.unpackbits(np.frombuffer(mask[schema.MASK_BITS], np.uint8), count=size * size)
        fitted = fit_mask(bits.reshape(size, size), new_size, ResizeTransform(ratio, ratio))
        resized.append({**mask, schema.MASK_BITS: np.packbits(fitted).tobytes()})
    return resized


def write_part(folder: str, part: str, rows: pa.Table) -> None:
    """Write `rows` (from `with_latents`) of a part of scores, one file per split."""
    for split in rows[schema.SPLIT].unique().to_pylist():
        of_split = rows.filter(pc.field(schema.SPLIT) == split)
        storage.write_bytes(storage.join(folder, part_path(split, part)), parquet_bytes(of_split))


def part_path(split: str, part: str) -> str:
    """Path in a latent archive of the rows of a part of scores, such as "scores/part-00003"."""
    return f"{split}/{part.rpartition('/')[2]}.parquet"


def parquet_bytes(rows: pa.Table) -> bytes:
    """A Parquet file of one row group."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows,
        sink,
        row_group_size=max(1, rows.num_rows),
        compression=COMPRESSION,
        compression_level=LEVEL,
        use_dictionary=[schema.SPLIT, schema.VIEW, schema.PATIENT_ID],  # pyright: ignore[reportArgumentType]
        write_statistics=[schema.IMAGE_ID, schema.PATIENT_ID],  # pyright: ignore[reportArgumentType]
    )
    return sink.getvalue()


def stored_bytes(pictures_Bhw: np.ndarray) -> float:
    """Bytes per image of a Parquet file that contains only these pixels, (B, h, h) uint8 or uint16."""
    width = pictures_Bhw[0].nbytes
    flat = pa.py_buffer(np.ascontiguousarray(pictures_Bhw).reshape(-1))
    column = pa.Array.from_buffers(pa.binary(width), len(pictures_Bhw), [None, flat])
    return len(parquet_bytes(pa.table({schema.PIXELS: column}))) / len(pictures_Bhw)


# ---- The archive


def finish(folder: str, scores: Iterable[tuple[str, pa.Table]], model: Checkpoint, origin: Origin) -> None:
    """Write index.parquet, rejects.parquet and archive.json after all parts have been written.

    Args:
        scores: the name of each part, and `schema.REJECTS` of its rows. They determine which latents must exist.

    Raises:
        UserError: the latents of a part are missing although its scores exist.
    """
    existing = {entry.path for entry in storage.list_files(folder)}
    rejects = [schema.REJECTS.empty_table()]
    parts: dict[str, list[dict[str, Any]]] = {}

    def files() -> Iterator[tuple[str, pa.Table]]:
        """Each file of latents, and the ids and splits of its rows; fills `rejects` and `parts`."""
        for name, rows in scores:
            good = pc.is_null(rows[schema.ERROR])
            rejects.append(rows.select(schema.REJECTS.names).replace_schema_metadata().filter(pc.invert(good)))
            usable = rows.filter(good)
            for split in sorted(usable[schema.SPLIT].unique().to_pylist()):
                path = part_path(split, name)
                if path not in existing:
                    raise UserError(
                        f"{storage.join(folder, path)} is missing: restore it, or score the archive again into an "
                        f"empty --out"
                    )
                own = usable.filter(pc.equal(usable[schema.SPLIT], split))
                parts.setdefault(split, []).append({"path": path, "rows": own.num_rows})
                yield path, own

    write_index(folder, files())
    rejected = pa.concat_tables(rejects)
    _write_rejects(storage.join(folder, REJECTS_FILE), rejected)
    storage.write_json(storage.join(folder, ARCHIVE_FILE), _described(parts, rejected, model, origin))


def _write_rejects(uri: str, rejects: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(rejects.select(schema.REJECTS.names), sink)
    storage.write_bytes(uri, sink.getvalue())


def _described(
    parts: dict[str, list[dict[str, Any]]], rejects: pa.Table, model: Checkpoint, origin: Origin
) -> dict[str, Any]:
    """The contents of archive.json."""
    crop = image_crop.of_checkpoint(model)
    return {
        "kind": KIND,
        "version": VERSION,
        **asdict(origin),
        "pixels": asdict(latent_encoder(model.recipe).latent_format()),
        "row_group_rows": max((part["rows"] for listed in parts.values() for part in listed), default=1),
        "counts": {split: sum(part["rows"] for part in listed) for split, listed in parts.items()},
        "rejects": rejects.num_rows,
        "reasons": dict(Counter(rejects[schema.ERROR].to_pylist()).most_common(_TOP_REASONS)),
        "notes": [],
        "parts": parts,
        "latents": {
            "encoder_sha256": encoder_fingerprint(model),
            "checkpoint": model.uri,
            "recipe": model.recipe.to_dict(),
        },
        **({"crop": crop.describe()} if crop else {}),
        **({"enhancement": done.describe()} if (done := model.recipe.enhancement) else {}),
    }
