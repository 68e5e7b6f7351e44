"""OUT/ledger.json of a scoring run: which increments of scores are finished, and with which settings they were made.

OUT/ledger.json                             generations and their increments; replaced as a whole by each commit
OUT/scores/part-00000.parquet …             the rows of increment 0
OUT/scores/increment-0001/part-00000.parquet …  the rows of increment 1
OUT/scores/increment-0001/removed.parquet   a row for each image that had left the archive, with REMOVED as its error
OUT/increments/0001/                        what was planned, see `inference.increments`

An increment is one pass over the images that were new or had changed. It counts once it is committed, which means
that the ledger lists it. A generation is a sequence of increments with the same settings; readers use the last one
that has a committed increment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data.ledger import LEDGER_FILE, SUFFIX
from cxr.errors import UserError
from cxr.wording import counted

SCORES = "scores"  # folder of the scores in OUT
INCREMENTS = "increments"  # folder of the plans in OUT
REMOVED_FILE = f"removed{SUFFIX}"
_THREADS = 8
REMOVED = "removed from the archive"  # `schema.ERROR` of an image that had left the archive
_PART = re.compile(rf"(?:increment-(\d+)/)?part-\d+\{SUFFIX}")


@dataclass(frozen=True)
class Increment:
    """A committed increment: numbers of images, unless said otherwise."""

    number: int
    parts: int
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
    rejects: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Every error with its number of images."""
    not_frontal_chest: dict[str, int] = field(default_factory=dict)
    committed: str = ""
    """Local time."""
    images_per_s: float = 0.0
    """Of the run that finished it."""
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
    fingerprint: str = ""
    """Of the parts of its first increment, see `data.ledger.fingerprint`."""
    increments: tuple[Increment, ...] = ()
    open: OpenIncrement | None = None


@dataclass(frozen=True)
class RunLedger:
    """The contents of OUT/ledger.json."""

    uri: str
    """The run's folder."""
    generations: tuple[Generation, ...] = ()

    @property
    def latest(self) -> Generation | None:
        return self.generations[-1] if self.generations else None

    @property
    def readable(self) -> Generation | None:
        """The last generation that has a committed increment."""
        return next((each for each in reversed(self.generations) if each.increments), None)

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
        content = {"generations": [asdict(generation) for generation in self.generations]}
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
    if "generations" in content:
        return RunLedger(out, tuple(_generation(each) for each in content["generations"]))
    settings = content.get("settings", {})
    if "archive" not in settings or not {"checkpoint_sha256", "members"} & set(settings):
        raise UserError(f"{out} contains something else than a scoring run: choose another --out")
    # A run of cxr 0.1: a single increment, which is not known to be complete.
    only = Increment(0, parts=0, images=0, new=0, changed=0)
    return RunLedger(out, (Generation(settings, "", "", content.get("fingerprint", ""), (only,)),))


def _generation(content: Mapping[str, Any]) -> Generation:
    increments = tuple(Increment(**each) for each in content["increments"])
    still_open = OpenIncrement(**content["open"]) if content["open"] else None
    return Generation(**{**content, "increments": increments, "open": still_open})


def folder_of(number: int) -> str:
    """The folder of an increment's scores in OUT."""
    return f"{SCORES}/increment-{number:04d}" if number else SCORES


def increment_of(part: str) -> int:
    """Number of the increment of a part of scores, such as "scores/increment-0001/part-00003"."""
    match = _PART.fullmatch(part.removeprefix(f"{SCORES}/") + SUFFIX)
    assert match, f"{part} is not a part of scores"
    return int(match[1] or 0)


def committed_files(out: str, generation: Generation) -> dict[int, list[str]]:
    """URIs of the score files of each committed increment of a generation, in order.

    Raises:
        UserError: a committed file is missing.
    """
    folder = storage.join(out, SCORES)
    files: dict[int, list[str]] = {increment.number: [] for increment in generation.increments}
    with suppress(storage.NotFoundError):
        for entry in storage.list_files(folder):
            match = _PART.fullmatch(entry.path)
            if match and int(match[1] or 0) in files:
                files[int(match[1] or 0)].append(entry.uri)
    for increment in generation.increments:
        if len(files[increment.number]) < increment.parts:
            expected = counted(increment.parts, "file")
            raise UserError(
                f"expected {expected} of increment {increment.number} in {folder}, got "
                f"{len(files[increment.number])}: restore the missing files, or score the archive again into an "
                f"empty --out"
            )
    return {number: sorted(uris) for number, uris in files.items()}


def current_rows(out: str, generation: Generation, read: Callable[[str], pa.Table]) -> list[pa.Table]:
    """The rows of all images that are in the archive, by file of scores, each as the last increment has scored it.

    Args:
        read: reads a file of scores, with `schema.IMAGE_ID`; called in several threads.

    Raises:
        UserError: a committed file is missing.
    """
    files = committed_files(out, generation)
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = {number: list(pool.map(read, uris)) for number, uris in files.items()}
    current: list[pa.Table] = []
    outdated = pa.array([], pa.string())
    moved: dict[str, str] = {}
    for increment in reversed(generation.increments):
        for table in reversed(tables[increment.number]):
            if len(outdated):
                table = table.filter(pc.invert(pc.is_in(table[schema.IMAGE_ID], value_set=outdated)))
            current.append(_with_places(table, moved))
        later = [outdated, *(chunk for table in tables[increment.number] for chunk in table[schema.IMAGE_ID].chunks)]
        if increment.removed:
            marked = storage.read_parquet(removed_file(out, increment.number), columns=[schema.IMAGE_ID])
            later += marked[schema.IMAGE_ID].chunks
        outdated = pa.concat_arrays(later)
        if increment.moved:
            with suppress(storage.NotFoundError):  # with pseudonyms, new places are not in OUT
                places = storage.read_parquet(moved_file(out, increment.number)).to_pydict()
                moved = dict(zip(places[schema.IMAGE_ID], places[schema.SOURCE_URI], strict=True)) | moved
    return [table for table in reversed(current) if table.num_rows] or current[:1]


def _with_places(table: pa.Table, moved: Mapping[str, str]) -> pa.Table:
    """The table with the present places of files that have been moved since."""
    if not moved or schema.SOURCE_URI not in table.column_names:
        return table
    ids, places = (table[name].to_pylist() for name in (schema.IMAGE_ID, schema.SOURCE_URI))
    present = [moved.get(image_id, place) for image_id, place in zip(ids, places, strict=True)]
    index = table.schema.get_field_index(schema.SOURCE_URI)
    return table.set_column(index, table.schema.field(index), pa.array(present, pa.string()))


def removed_file(out: str, number: int) -> str:
    """URI of the rows of the images that an increment marks as removed; it exists if there are any."""
    return storage.join(out, folder_of(number), REMOVED_FILE)


def moved_file(out: str, number: int) -> str:
    """URI of the new places that an increment records; it exists if there are any."""
    return storage.join(out, INCREMENTS, f"{number:04d}", f"moved{SUFFIX}")
