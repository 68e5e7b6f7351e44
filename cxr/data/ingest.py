"""Archive -> shards: every image decoded once, into Parquet files of fixed-size pixels that are only scanned.

OUT/train/part-00000.parquet …    good rows (schema.row_schema); the part's rejects stand in its footer
OUT/index.parquet                 where each image is, its patient and labels (`cxr.data.shard_index`)
OUT/rejects.parquet               images that could not be used, and why (schema.REJECTS)
OUT/archive.json                  contents of the shards; written last, so that shards without it are incomplete
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data import gate
from cxr.data.decode import CropSettings, make_counted_rows
from cxr.data.dicom_headers import read_large_archive
from cxr.data.ledger import Ledger, Part, open_ledger, plan, rows_at
from cxr.data.ray_data import map_parts
from cxr.data.shard_index import write_index
from cxr.data.shard_writer import FILE_BYTES, FILE_ROWS, row_group_rows, shard_writer
from cxr.data.shards import ARCHIVE_FILE, KIND, REJECTS_FILE, VERSION
from cxr.errors import UserError
from cxr.imaging.enhance import Enhancement
from cxr.runtime import cluster, console, lease, metrics
from cxr.runtime.progress import Progress
from cxr.runtime.step_times import StepTimes
from cxr.schema import PixelFormat
from cxr.sources import find_source, open_manifest
from cxr.sources.labeling import one_reader, readers_note
from cxr.sources.manifest import Manifest
from cxr.sources.options import ALL_IMAGES, SOURCE_LABELS, GateMode, Labeling, ReaderBoxes, ReadOptions
from cxr.sources.true_boxes import PART_SHARE, BoxCounts

_REJECTS = b"cxr.rejects"  # key of a part's rejects in its Parquet footer
_BOXES, _MOST_BOXES = b"cxr.boxes", b"cxr.most_boxes"  # keys of how its boxes lie, and of an image's most boxes
_GATE = b"cxr.gate"  # key of the counts of images that are not upright frontal chest X-rays, by kind
_DECODED_BYTES = 64 << 20  # of pixels that a worker decodes before it writes them
_SMALLEST_PART, _PARTS = 16, 256  # rows of a part, and number of parts at which they begin to grow
_TOP_REASONS = 10


@dataclass(frozen=True)
class IngestResult:
    """Result of an ingest. `images_per_second` is that of this run with start-up; 0 if all parts were finished."""

    shards: str
    counts: dict[str, int]  # good rows by split
    rejects: int
    reasons: dict[str, int]  # the most frequent ones
    not_frontal: dict[str, int]  # images that are not upright frontal chest X-rays, by kind
    notes: list[str]
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class _Contents:
    """The metadata of a finished part."""

    path: str
    split: str
    rows: int
    rejects: list[dict[str, Any]]
    boxes: BoxCounts
    most_boxes: int  # of an image
    not_frontal: dict[str, int]


def ingest(
    archive_uri: str,
    out_uri: str,
    *,
    reading: ReadOptions = ALL_IMAGES,
    pixels: PixelFormat | None = None,
    max_rejects: float = 0.05,
    limit: int | None = None,
    crop: CropSettings | None = None,
    enhance: Enhancement | None = None,
    labeling: Labeling = SOURCE_LABELS,
    on_start: Callable[[int], object] = lambda images: None,
) -> IngestResult:
    """Decode an archive into shards. After an interruption, another call continues with the missing parts.

    Args:
        pixels: what is stored; 256 x 256, 8 bits by default.
        max_rejects: share of images that may be unusable; with more, UserError is raised once all is written.
        limit: maximum number of images, spread evenly over the archive.
        crop: store squares that are cut out of the images, such as those around the lungs, instead of whole images.
        enhance: changes to the images before they are stored.
        labeling: labels and boxes other than the source's own, and how those of several readers become one set.
        on_start: called with the number of images that are left, before the first one, if there is any.

    Raises:
        UserError: no such archive; OUT has the work of another ingest or is in use by another run; too many rejects,
            or boxes outside their images.
    """
    archive, out, pixels = storage.normalize(archive_uri), storage.normalize(out_uri), pixels or PixelFormat()
    for uri in (archive, out):
        cluster.check_shared(uri)
    reading = reading.with_headers(out)
    read_large_archive(archive, reading)
    source = find_source(archive, reading.source).name
    manifest = open_manifest(archive, reading, labeling)
    manifest.notes += readers_note(manifest, labeling.reader_boxes)
    manifest.print_notes()
    table = _thinned(manifest.table, limit)
    parts = plan(table, rows_per_part(table.num_rows, pixels), by=schema.SPLIT)
    origin = {"version": VERSION, "archive": archive, "source": source, "pixels": asdict(pixels)}
    origin |= {"lung_crop": crop.describe()} if crop else {}
    origin |= {"enhancement": enhance.describe()} if enhance else {}
    origin |= reading.describe() | labeling.describe()
    with lease.held(out):
        ledger = open_ledger(out, {"job": "ingest", **origin, "limit": limit}, parts)
        how = (pixels, crop, enhance, reading.gate, labeling.reader_boxes)
        progress = _write_parts(ledger, parts, how, on_start)
        contents = _read_footers(ledger, parts)
        boxes = sum((part.boxes for part in contents), BoxCounts())
        boxes.check(whole=True)
        for note in boxes.notes():
            console.note(note)
        manifest.notes += boxes.notes()
        about = _describe(contents, manifest, origin)
        _write_rejects(out, contents)
        write_index(out, ((part.path, _good(part, of)) for part, of in zip(parts, contents, strict=True)))
        storage.write_json(storage.join(out, ARCHIVE_FILE), about)
    _check_rejects(about, table.num_rows, max_rejects, out)
    return IngestResult(
        shards=out,
        **{name: about[name] for name in ("counts", "rejects", "reasons", "not_frontal", "notes")},
        seconds=round(progress.seconds, 1),
        images_per_second=round(progress.images_per_second, 1),
    )


def rows_per_part(images: int, pixels: PixelFormat) -> int:
    """Rows of a part, which is a shard file: few enough for a small archive to keep several workers busy.

    Depends only on the archive and the pixel format, so that a run on another cluster plans the same parts.
    """
    balanced = min(max(-(-images // _PARTS), _SMALLEST_PART), FILE_ROWS)
    return min(balanced, max(1, FILE_BYTES // pixels.row_bytes))


def _thinned(manifest: pa.Table, limit: int | None) -> pa.Table:
    if limit is None or limit >= manifest.num_rows:
        return manifest
    if limit < 1:
        raise UserError(f"limit={limit}: expected 1 or more images")
    chosen = np.linspace(0, manifest.num_rows - 1, limit).astype(np.int64)
    return rows_at(manifest, pc.sort_indices(manifest[schema.IMAGE_ID]).take(pa.array(chosen)))


# ---- Parts


def _write_parts(
    ledger: Ledger, parts: Sequence[Part], how: tuple[Any, ...], on_start: Callable[[int], object]
) -> Progress:
    """Write the missing parts; `how` contains the arguments of `PartWriter` apart from the ledger."""
    todo = ledger.todo(parts)
    total, left = (sum(part.rows.num_rows for part in some) for some in (parts, todo))
    if todo:
        on_start(left)
    progress = Progress("ingest", total, done=total - left)
    progress.show()
    for summary in map_parts(todo, PartWriter, (ledger, *how)):
        progress.add(summary["images"], len(summary["errors"]), summary["seconds"])
        metrics.count_reasons("ingest", summary["errors"])
    if todo:
        progress.show()
    return progress


class PartWriter:
    """Decodes a part of the manifest and writes its file, good rows and rejects in one piece.

    Memory is that of the images decoded together, whatever the size of the part.
    """

    def __init__(
        self,
        ledger: Ledger,
        pixels: PixelFormat,
        crop: CropSettings | None = None,
        enhance: Enhancement | None = None,
        check: GateMode = "off",
        reader_boxes: ReaderBoxes = "wbf",
    ) -> None:
        self._ledger, self._pixels, self._crop, self._enhance = ledger, pixels, crop, enhance
        self._check: GateMode = check
        self._reader_boxes: ReaderBoxes = reader_boxes

    def __call__(self, part: Part) -> dict[str, Any]:
        crop = self._crop.loaded() if self._crop else None
        rejects, boxes, most_boxes, not_frontal = list[dict[str, Any]](), BoxCounts(), 0, Counter[str]()
        images = one_reader(Manifest(part.rows, ()), self._reader_boxes).table
        together, times = max(1, _DECODED_BYTES // self._pixels.row_bytes), StepTimes()
        with shard_writer(self._ledger.file(part), self._pixels) as shard:
            for start in range(0, images.num_rows, together):
                manifest = images.slice(start, together)
                rows, counts = make_counted_rows(
                    manifest, self._pixels, crop=crop, enhance=self._enhance, check=self._check, times=times
                )
                boxes += counts
                boxes.check(PART_SHARE)
                bad = rows.filter(rows[schema.ERROR].is_valid()).select(schema.REJECTS.names)
                good = rows.filter(rows[schema.ERROR].is_null()) if bad.num_rows else rows
                shard.add(good)
                rejects += bad.to_pylist()
                most_boxes = max(most_boxes, pc.max(pc.list_value_length(good[schema.BOXES])).as_py() or 0)
                not_frontal.update(gate.not_frontal(rows[schema.GATE]))
            values = {_REJECTS: rejects, _BOXES: asdict(boxes), _MOST_BOXES: most_boxes, _GATE: not_frontal}
            shard.finish({key.decode(): json.dumps(value) for key, value in values.items()})
        errors = [reject[schema.ERROR] for reject in rejects]
        return {"images": part.rows.num_rows, "errors": errors, "seconds": times.seconds}


def _read_footers(ledger: Ledger, parts: Sequence[Part]) -> list[_Contents]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda part: _contents(ledger, part), parts))


def _contents(ledger: Ledger, part: Part) -> _Contents:
    try:
        footer = storage.read_parquet_footer(ledger.file(part))
        keys = (_REJECTS, _BOXES, _MOST_BOXES, _GATE)
        rejects, boxes, most, not_frontal = (json.loads((footer.metadata or {})[key]) for key in keys)
    except (pa.ArrowInvalid, KeyError) as error:
        raise _foreign(ledger, part) from error
    if footer.num_rows + len(rejects) != part.rows.num_rows:
        raise _foreign(ledger, part)
    split = part.rows[schema.SPLIT][0].as_py()
    return _Contents(part.path, split, footer.num_rows, rejects, BoxCounts(**boxes), most, not_frontal)


def _foreign(ledger: Ledger, part: Part) -> UserError:
    return UserError(f"{ledger.file(part)} is not the part that this ingest wrote: delete it and run again")


# ---- The whole


def _describe(contents: Sequence[_Contents], manifest: Manifest, origin: dict[str, Any]) -> dict[str, Any]:
    """What goes into archive.json."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for part in contents:
        parts.setdefault(part.split, []).append({"path": part.path, "rows": part.rows})
    reasons = Counter(_kind(reject[schema.ERROR]) for part in contents for reject in part.rejects)
    return {
        "kind": KIND,
        **origin,
        "findings": list(manifest.findings),
        "most_boxes": max((part.most_boxes for part in contents), default=0),
        "row_group_rows": row_group_rows(PixelFormat(**origin["pixels"])),
        "counts": {split: sum(part["rows"] for part in listed) for split, listed in parts.items()},
        "rejects": reasons.total(),
        "reasons": dict(reasons.most_common(_TOP_REASONS)),
        "not_frontal": dict(sum((Counter(part.not_frontal) for part in contents), Counter()).most_common()),
        "excluded": sum(gate.is_excluded(reject[schema.ERROR]) for part in contents for reject in part.rejects),
        "notes": manifest.notes,
        "parts": parts,
    }


def _kind(reason: str) -> str:
    """A reason without its numbers, so that like ones are counted together."""
    return re.sub(r"\d+", "#", reason)


def _write_rejects(out: str, contents: Sequence[_Contents]) -> None:
    rejects = [reject for part in contents for reject in part.rejects]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rejects, schema=schema.REJECTS), sink)
    storage.write_bytes(storage.join(out, REJECTS_FILE), sink.getvalue())


def _good(part: Part, contents: _Contents) -> pa.Table:
    """The rows of a part's manifest that are in its file, which has them in the same order."""
    rejected = pa.array([reject[schema.IMAGE_ID] for reject in contents.rejects], pa.string())
    return part.rows.filter(pc.invert(pc.is_in(part.rows[schema.IMAGE_ID], value_set=rejected)))


def _check_rejects(about: dict[str, Any], images: int, max_rejects: float, out: str) -> None:
    unusable = about["rejects"] - about["excluded"]
    share = unusable / images
    if share > max_rejects:
        top = "; ".join(f"{count} x {reason}" for reason, count in list(about["reasons"].items())[:3])
        raise UserError(
            f"{unusable} of {images} images ({share:.1%}) cannot be used, more than --max-rejects "
            f"{max_rejects:g} allows: {top}. {storage.join(out, REJECTS_FILE)} lists them. "
            f"Repair them and ingest into another --out, or raise --max-rejects. All usable images have been written"
        )
