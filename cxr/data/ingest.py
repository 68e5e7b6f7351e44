"""Archive -> shards: every image decoded once, into Parquet files of fixed-size pixels that are only scanned.

OUT/train/part-00000.parquet …    good rows (schema.row_schema); the part's rejects stand in its footer
OUT/plan/                         the images that are decoded, part by part (`cxr.data.ingest_plan`)
OUT/index.parquet                 where each image is, its patient and labels (`cxr.data.shard_index`)
OUT/rejects.parquet               images that could not be used, and why (schema.REJECTS)
OUT/archive.json                  contents of the shards; written last, so that shards without it are incomplete
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.data import gate
from cxr.data.decode import CropSettings, make_counted_rows
from cxr.data.dicom_headers import read_large_archive
from cxr.data.ingest_plan import IngestPlan, read_plan, write_plan
from cxr.data.ledger import Ledger, Part, check_settings, open_ledger, plan, rows_at
from cxr.data.manifest_files import StoredPart, read_piece
from cxr.data.prefetch import read_ahead
from cxr.data.ray_data import map_parts
from cxr.data.shard_index import IMAGE_COLUMNS, write_index
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
from cxr.storage.files import atomic_writer
from cxr.wording import counted

_REJECTS = b"cxr.rejects"  # key of a part's rejects in its Parquet footer
_BOXES, _MOST_BOXES = b"cxr.boxes", b"cxr.most_boxes"  # keys of how its boxes lie, and of an image's most boxes
_GATE = b"cxr.gate"  # key of the counts of images that are not upright frontal chest X-rays, by kind
_DECODED_BYTES = 64 << 20  # of pixels that a worker decodes before it writes them
_SMALLEST_PART, _PARTS = 16, 256  # rows of a part, and number of parts at which they begin to grow
_TOP_REASONS = 10
_FINISHED_AHEAD = 16  # finished parts whose metadata are read at a time


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

    rows: int
    rejects: pa.Table  # schema.REJECTS
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
        crop: store a part of each image instead of the whole image, such as the square around the lungs.
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
    source = find_source(archive, reading.source).name
    origin = {"version": VERSION, "archive": archive, "source": source, "pixels": asdict(pixels)}
    origin |= {"crop": recorded} if crop and (recorded := crop.describe()) else {}
    origin |= {"enhancement": enhance.describe()} if enhance else {}
    origin |= reading.describe() | labeling.describe()
    settings = json.loads(json.dumps({"job": "ingest", **origin, "limit": limit}))
    with lease.held(out):
        check_settings(out, settings)
        planned = _continued_plan(out, settings)
        if planned is None:
            planned = _new_plan(archive, out, settings, reading, labeling, pixels, limit)
        ledger = open_ledger(out, settings, planned.fingerprint)
        how = (pixels, crop, enhance, reading.gate, labeling.reader_boxes)
        progress = _write_parts(ledger, planned.parts, how, on_start)
        about = _finish(ledger, planned, origin)
        storage.write_json(storage.join(out, ARCHIVE_FILE), about)
    _check_rejects(about, planned.images, max_rejects, out)
    return IngestResult(
        shards=out,
        **{name: about[name] for name in ("counts", "rejects", "reasons", "not_frontal", "notes")},
        seconds=round(progress.seconds, 1),
        images_per_second=round(progress.images_per_second, 1),
    )


def _continued_plan(out: str, settings: Mapping[str, Any]) -> IngestPlan | None:
    """The plan of an interrupted ingest, if it has these settings and the archive's lists have not changed."""
    if storage.exists(storage.join(out, ARCHIVE_FILE)):  # the work of a finished ingest is compared with the archive
        return None
    planned = read_plan(out)
    if planned is None or planned.settings != settings:
        return None
    if changed := planned.changed_files():
        console.note(f"listing the images again, because these files have changed: {', '.join(changed)}")
        return None
    console.note(f"continuing with the {counted(planned.images, 'image')} that were listed when this ingest started")
    for note in planned.notes:
        console.note(note)
    return planned


def _new_plan(
    archive: str,
    out: str,
    settings: Mapping[str, Any],
    reading: ReadOptions,
    labeling: Labeling,
    pixels: PixelFormat,
    limit: int | None,
) -> IngestPlan:
    reading = reading.with_headers(out)
    read_large_archive(archive, reading)
    with storage.recorded_reads() as files:
        manifest = open_manifest(archive, reading, labeling)
    notes = [*manifest.notes, *readers_note(manifest, labeling.reader_boxes)]
    for note in notes:
        console.note(note)
    images = _thinned(manifest.table, limit)
    parts = plan(images, rows_per_part(images.num_rows, pixels), by=schema.SPLIT)
    return write_plan(out, settings, parts, manifest.findings, notes, files)


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
    return rows_at(manifest, pc.sort_indices(manifest[schema.IMAGE_ID]).to_numpy().astype(np.int64)[chosen])


# ---- Parts


def _write_parts(
    ledger: Ledger, parts: Sequence[StoredPart], how: tuple[Any, ...], on_start: Callable[[int], object]
) -> Progress:
    """Write the missing parts; `how` contains the arguments of `PartWriter` apart from the ledger."""
    todo = ledger.todo(parts)
    total, left = (sum(part.group.rows for part in some) for some in (parts, todo))
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


def _contents(ledger: Ledger, part: StoredPart) -> _Contents:
    try:
        footer = storage.read_parquet_footer(ledger.file(part))
        keys = (_REJECTS, _BOXES, _MOST_BOXES, _GATE)
        rejects, boxes, most, not_frontal = (json.loads((footer.metadata or {})[key]) for key in keys)
    except (pa.ArrowInvalid, KeyError) as error:
        raise _foreign(ledger, part) from error
    if footer.num_rows + len(rejects) != part.group.rows:
        raise _foreign(ledger, part)
    rejected = pa.Table.from_pylist(rejects, schema=schema.REJECTS)
    return _Contents(footer.num_rows, rejected, BoxCounts(**boxes), most, not_frontal)


def _foreign(ledger: Ledger, part: StoredPart) -> UserError:
    return UserError(f"{ledger.file(part)} is not the part that this ingest wrote: delete it and run again")


# ---- The whole


@dataclass
class _Totals:
    """The metadata of all parts together."""

    parts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by split
    reasons: Counter[str] = field(default_factory=Counter)
    excluded: int = 0
    boxes: BoxCounts = field(default_factory=BoxCounts)
    most_boxes: int = 0
    not_frontal: Counter[str] = field(default_factory=Counter)

    def add(self, part: StoredPart, contents: _Contents) -> None:
        split = part.name.partition("/")[0]
        self.parts.setdefault(split, []).append({"path": part.path, "rows": contents.rows})
        errors = contents.rejects[schema.ERROR].to_pylist()
        self.reasons.update(map(_kind, errors))
        self.excluded += sum(map(gate.is_excluded, errors))
        self.boxes += contents.boxes
        self.most_boxes = max(self.most_boxes, contents.most_boxes)
        self.not_frontal.update(contents.not_frontal)


def _finish(ledger: Ledger, planned: IngestPlan, origin: dict[str, Any]) -> dict[str, Any]:
    """Write the index and the rejects; returns what goes into archive.json."""
    totals, rejects_uri = _Totals(), storage.join(ledger.uri, REJECTS_FILE)
    with atomic_writer(rejects_uri) as stream, pq.ParquetWriter(stream, schema.REJECTS) as rejects:

        def good_rows() -> Iterator[tuple[str, pa.Table]]:
            finished = read_ahead(partial(_read_back, ledger), planned.parts, _FINISHED_AHEAD)
            for part, (contents, good) in zip(planned.parts, finished, strict=True):
                totals.add(part, contents)
                if contents.rejects.num_rows:
                    rejects.write_table(contents.rejects)
                yield part.path, good

        write_index(ledger.uri, good_rows())
    totals.boxes.check(whole=True)
    for note in totals.boxes.notes():
        console.note(note)
    return {
        "kind": KIND,
        **origin,
        "findings": list(planned.findings),
        "most_boxes": totals.most_boxes,
        "row_group_rows": row_group_rows(PixelFormat(**origin["pixels"])),
        "counts": {split: sum(part["rows"] for part in listed) for split, listed in totals.parts.items()},
        "rejects": totals.reasons.total(),
        "reasons": dict(totals.reasons.most_common(_TOP_REASONS)),
        "not_frontal": dict(totals.not_frontal.most_common()),
        "excluded": totals.excluded,
        "notes": [*planned.notes, *totals.boxes.notes()],
        "parts": totals.parts,
    }


def _read_back(ledger: Ledger, part: StoredPart) -> tuple[_Contents, pa.Table]:
    """The metadata of a part, and the rows of its manifest that are in its file, which has them in the same order."""
    contents = _contents(ledger, part)
    rows = read_piece(part.group, IMAGE_COLUMNS)
    rejected = pc.is_in(rows[schema.IMAGE_ID], value_set=contents.rejects[schema.IMAGE_ID].combine_chunks())
    return contents, rows.filter(pc.invert(rejected))


def _kind(reason: str) -> str:
    """A reason without its numbers, so that like ones are counted together."""
    return re.sub(r"\d+", "#", reason)


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
