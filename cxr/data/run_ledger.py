"""OUT/ledger.json of a scoring run: which increments of scores are finished, and with which settings they were made.

OUT/ledger.json                             generations and their increments; replaced as a whole by each commit
OUT/scores/part-00000.parquet …             the rows of increment 0
OUT/scores/increment-0001/part-00000.parquet …  the rows of increment 1
OUT/scores/increment-0001/removed.parquet   a row for each image that had left the archive, with REMOVED as its error
OUT/unfinished/part-0001-00000.parquet …    parts of the increment that is being scored, see `inference.joined_parts`
OUT/increments/0001/                        what was planned, see `inference.plan_store`

An increment is one pass over the images that were new or had changed. It counts once it is committed, which means
that the ledger lists it. A generation is a sequence of increments with the same settings; see `RunLedger.readable`
for the one that readers use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data.ledger import LEDGER_FILE, SUFFIX
from cxr.data.prefetch import read_ahead
from cxr.errors import UserError
from cxr.wording import counted

SCORES = "scores"  # folder of the scores in OUT
INCREMENTS = "increments"  # folder of the plans in OUT
REMOVED_FILE = f"removed{SUFFIX}"
_THREADS = 8
REMOVED = "removed from the archive"  # `schema.ERROR` of an image that had left the archive
UNFINISHED = "unfinished"  # folder of the open increment's parts in OUT


@dataclass(frozen=True)
class Increment:
    """A committed increment: numbers of images, unless said otherwise."""

    number: int
    files: int
    """Number of Parquet files with scores."""
    images: int
    """Number of rows in these files: new and changed images."""
    new: int
    changed: int
    unchanged: int = 0
    removed: int = 0
    moved: int = 0
    """Unchanged images whose file has another place."""
    remaining: int = 0
    """New and changed images that --until left for the next run."""
    unread: int = 0
    """Images whose file could not be read, which the next run tries again."""
    rejects: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Every error with its number of images."""
    not_frontal_chest: dict[str, int] = field(default_factory=dict)
    committed: str = ""
    """Local time."""
    images_per_s: float = 0.0
    """Of the run that finished it."""
    steady_images_per_s: float = 0.0
    """Of the same run, without its start."""
    cxr: str = ""
    """Version of the software that scored it."""


@dataclass(frozen=True)
class OpenIncrement:
    """An increment that is planned and perhaps partly scored."""

    number: int
    new: int
    changed: int
    unchanged: int = 0
    removed: int = 0
    moved: int = 0
    opened: str = ""
    """Local time."""


@dataclass(frozen=True)
class Generation:
    """Increments that were scored with the same settings."""

    settings: dict[str, Any]
    reason: str
    """Why it was begun."""
    began: str
    """Local time."""
    increments: tuple[Increment, ...] = ()
    open: OpenIncrement | None = None

    @property
    def remaining(self) -> int:
        """Images that --until left for the next run."""
        return self.increments[-1].remaining if self.increments else 0

    @property
    def has_been_complete(self) -> bool:
        """Whether all images of the archive have had scores at some time."""
        return any(not increment.remaining for increment in self.increments)


@dataclass(frozen=True)
class RunLedger:
    """The contents of OUT/ledger.json."""

    uri: str
    """The run's folder."""
    generations: tuple[Generation, ...] = ()
    id: str = field(default_factory=lambda: uuid4().hex)
    """Stays the same if the folder is moved."""

    @property
    def latest(self) -> Generation | None:
        return self.generations[-1] if self.generations else None

    @property
    def readable(self) -> Generation | None:
        """The generation whose scores readers use: the last one that has scored all images, as long as there is one,
        else the last one that has scored any."""
        usable = [each for each in self.generations if any(increment.files for increment in each.increments)]
        complete = [each for each in usable if each.has_been_complete]
        return next(reversed(complete or usable), None)

    @property
    def note(self) -> str:
        """What readers should know about the scores that they use; empty if they are of all images."""
        used, latest = self.readable, self.latest
        if not used or not latest or (used is latest and not used.remaining):
            return ""
        left = counted(latest.remaining, "image")
        if used is latest:
            return f"{self.uri} is not complete: the next run of cxr score will score the remaining {left}"
        if not latest.increments:
            return ""
        return (
            f"{self.uri} has newer scores with different settings ({latest.reason}), but they are incomplete: until "
            f"cxr score has scored the remaining {left}, the earlier scores of all images are used"
        )

    @property
    def next_number(self) -> int:
        """Number of the next increment: above those of all generations, also of abandoned ones."""
        numbers = [each.number for generation in self.generations for each in generation.increments]
        numbers += [generation.open.number for generation in self.generations if generation.open]
        return max(numbers, default=-1) + 1

    def with_generation(self, generation: Generation) -> RunLedger:
        """The ledger with one more generation."""
        return replace(self, generations=(*self.generations, generation))

    def with_latest(self, **changes: Any) -> RunLedger:
        """The ledger with changes of its last generation."""
        return replace(self, generations=(*self.generations[:-1], replace(self.generations[-1], **changes)))

    def write(self) -> None:
        """Write OUT/ledger.json, completely or not at all."""
        content = {"id": self.id, "generations": [asdict(generation) for generation in self.generations]}
        storage.write_json(storage.join(self.uri, LEDGER_FILE), content)


def read_ledger(out: str) -> RunLedger:
    """The ledger of a run; without generations if there is none.

    Raises:
        UserError: OUT has the ledger of something else, such as shards.
    """
    out = storage.normalize(out)
    uri = storage.join(out, LEDGER_FILE)
    if not storage.exists(uri):
        return RunLedger(out)
    content = storage.read_json(uri)
    if "generations" not in content:
        raise UserError(f"expected the results of cxr score in {out}, got those of another job: use another folder")
    return RunLedger(out, tuple(_generation(each) for each in content["generations"]), content["id"])


def _generation(content: Mapping[str, Any]) -> Generation:
    increments = tuple(Increment(**each) for each in content["increments"])
    still_open = OpenIncrement(**content["open"]) if content["open"] else None
    return Generation(**{**content, "increments": increments, "open": still_open})


def family_of(recipe: Mapping[str, Any]) -> str:
    """The family of a recipe as ledgers and checkpoints store it; of an ensemble, that of its members."""
    return recipe["members"][0]["family"] if "members" in recipe else recipe["family"]


def folder_of(number: int) -> str:
    """The folder of an increment's scores in OUT."""
    return f"{SCORES}/increment-{number:04d}" if number else SCORES


def committed_files(out: str, generation: Generation) -> dict[int, list[str]]:
    """URIs of the score files of each committed increment of a generation, in order.

    Raises:
        UserError: a committed file is missing.
    """
    folder = storage.join(out, SCORES)
    try:
        existing = {entry.uri for entry in storage.list_files(folder)}
    except storage.NotFoundError:
        existing = set()
    files = {
        each.number: [score_file(out, each.number, n) for n in range(each.files)] for each in generation.increments
    }
    for number, uris in files.items():
        if (found := len(existing.intersection(uris))) < len(uris):
            raise UserError(
                f"expected {counted(len(uris), 'file')} of increment {number} in {folder}, got {found}: restore the "
                f"missing files, or score the archive again into an empty --out"
            )
    return files


def current_rows(out: str, generation: Generation, read: Callable[[str, int], pa.Table]) -> Iterator[pa.Table]:
    """The rows of all images that are in the archive, each as the last increment has scored it.

    A few row groups are read ahead. Besides them, memory holds the ids of the images that later increments concern.
    If there are files but no such rows, one table without rows is yielded.

    Args:
        read: reads a row group of a file of scores, with `schema.IMAGE_ID`; called in several threads.

    Raises:
        UserError: a committed file is missing.
    """
    files = committed_files(out, generation)
    last, moved = _last_increments(out, generation, files), _places(out, generation)
    empty, any_rows = None, False
    for number, uris in files.items():
        for table in read_ahead(lambda group: read(*group), row_groups(uris), _THREADS):
            if len(last):
                found = pc.index_in(table[schema.IMAGE_ID], value_set=last[schema.IMAGE_ID].combine_chunks())
                is_current = pc.less_equal(last[schema.INCREMENT].take(found), number)
                table = table.filter(pc.fill_null(is_current, True))
            if table.num_rows:
                any_rows = True
                yield _with_places(table, number, moved)
            else:
                empty = table
    if empty is not None and not any_rows:
        yield empty


def row_groups(uris: Sequence[str]) -> Iterator[tuple[str, int]]:
    """All row groups of some files, in order."""
    footers = read_ahead(storage.read_parquet_footer, uris, _THREADS)
    for uri, footer in zip(uris, footers, strict=True):
        yield from ((uri, number) for number in range(footer.num_row_groups))


def _last_increments(out: str, generation: Generation, files: Mapping[int, Sequence[str]]) -> pa.Table:
    """For each image that an increment after the first has scored or marked as removed: the last one that did."""
    fields = pa.schema([(schema.IMAGE_ID, pa.string()), (schema.INCREMENT, pa.int32())])
    last = fields.empty_table()
    for increment in generation.increments[:0:-1]:
        uris = [*files[increment.number], *([removed_file(out, increment.number)] if increment.removed else [])]
        with ThreadPoolExecutor(_THREADS) as pool:
            read = pool.map(lambda uri: storage.read_parquet(uri, columns=[schema.IMAGE_ID]), uris)
            tables = [table.replace_schema_metadata() for table in read]
        for ids in (table[schema.IMAGE_ID] for table in tables):
            new = ids.filter(pc.invert(pc.is_in(ids, value_set=last[schema.IMAGE_ID].combine_chunks())))
            numbers = pa.array([increment.number] * len(new), pa.int32())
            last = pa.concat_tables([last, pa.table([new, numbers], schema=fields)])
    return last


def _places(out: str, generation: Generation) -> dict[str, tuple[int, str]]:
    """For each image whose file has been moved: the last increment that recorded it, and the new place."""
    moved: dict[str, tuple[int, str]] = {}
    for increment in generation.increments:
        if increment.moved:
            places = storage.read_parquet(moved_file(out, increment.number)).to_pydict()
            pairs = zip(places[schema.IMAGE_ID], places[schema.SOURCE_URI], strict=True)
            moved |= {image_id: (increment.number, place) for image_id, place in pairs}
    return moved


def _with_places(table: pa.Table, number: int, moved: Mapping[str, tuple[int, str]]) -> pa.Table:
    """A table of an increment, with the places of files that later increments have found elsewhere."""
    if not moved or schema.SOURCE_URI not in table.column_names:
        return table
    ids, places = (table[name].to_pylist() for name in (schema.IMAGE_ID, schema.SOURCE_URI))
    latest = (moved.get(image_id, (-1, "")) for image_id in ids)
    present = [new if when > number else place for (when, new), place in zip(latest, places, strict=True)]
    index = table.schema.get_field_index(schema.SOURCE_URI)
    return table.set_column(index, table.schema.field(index), pa.array(present, pa.string()))


def score_file(out: str, number: int, file: int) -> str:
    """URI of a file of an increment's scores."""
    return storage.join(out, folder_of(number), f"part-{file:05d}{SUFFIX}")


def removed_file(out: str, number: int) -> str:
    """URI of the rows of the images that an increment marks as removed; it exists if there are any."""
    return storage.join(out, folder_of(number), REMOVED_FILE)


def moved_file(out: str, number: int) -> str:
    """URI of the new places that an increment records; it exists if there are any."""
    return storage.join(out, INCREMENTS, f"{number:04d}", f"moved{SUFFIX}")
