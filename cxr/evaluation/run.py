"""What every family's report begins with: a run, its scores, and what the archive knows of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data import shards
from cxr.data.ledger import LEDGER_FILE, SUFFIX
from cxr.errors import UserError
from cxr.metrics.bootstrap import RESAMPLES
from cxr.reporting.page import Picture, Section, write_report
from cxr.reporting.tables import Table
from cxr.sources import Labeling, open_manifest
from cxr.sources.manifest import Manifest

SCORES = "scores"  # the folder of a run's Parquet files
Split = Literal["train", "val", "test", "all"]
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a run is evaluated by."""

    archive: str = ""
    """Archive or shards that know the truth, any URI; left out, the archive that was scored, if it was one."""
    source: str = "auto"
    """Layout of the archive: auto, or the name of a source."""
    split: Literal["auto"] | Split = "auto"
    """Images that the report is about. auto: the test images, or all images where the archive has no ground truth."""
    against: str = ""
    """Another run's OUT: both are compared on the images that both have scored."""
    resamples: int = RESAMPLES
    """Of the bootstrap over patients."""
    seed: int = 0
    """Of the bootstrap."""
    box_score: float = 0.25
    """Score from which found boxes count in decisions, confusions and pictures; average precision takes all."""
    labeling: Labeling = field(default_factory=Labeling)

    def __post_init__(self) -> None:
        if not 0 <= self.box_score <= 1:
            raise UserError(f"box_score={self.box_score}: wanted 0 to 1")
        if self.resamples < 1:
            raise UserError(f"resamples={self.resamples}: wanted 1 or more")


class NoGroundTruthError(UserError):
    """The archive holds no ground truth of the kind that a run's scores could be compared with."""


@dataclass(frozen=True)
class Run:
    """A scoring run, as its ledger tells of it."""

    uri: str
    family: str
    archives: tuple[str, ...]  # that were scored
    checkpoint_sha256: str

    @property
    def archive(self) -> str:
        """The archive that was scored; raises UserError where there were several."""
        if len(self.archives) != 1:
            several = " and ".join(self.archives)
            raise UserError(f"{self.uri} holds scores of {several}: name the archive to evaluate with --archive")
        return self.archives[0]


def read_run(uri: str) -> Run:
    """The run that `score_archive` left in `uri`.

    Raises:
        UserError: nothing, or something else, lies there.
    """
    uri = storage.normalize(uri)
    ledger = storage.join(uri, LEDGER_FILE)
    settings = storage.read_json(ledger).get("settings", {}) if storage.exists(ledger) else {}
    if not {"recipe", "archive", "checkpoint_sha256"} <= set(settings):
        raise UserError(f"{uri} holds no scoring run: give the --out of jobs/score_archive.py, or run that first")
    archives = settings["archive"]
    archives = (archives,) if isinstance(archives, str) else tuple(archives)
    return Run(uri, settings["recipe"]["family"], archives, settings["checkpoint_sha256"])


def finish_report(
    run: Run, archive: str, split: str, lead: str, sections: Sequence[Section], result: dict[str, Any], out: str
) -> dict[str, Any]:
    """Write the report's pages into the URI `out`; returns `result` with their URIs, those of its pictures, and null
    for NaN.

    Args:
        archive: the ground truth; empty for a report without one.
    """
    facts = {"scores": run.uri, "model family": run.family, "checkpoint SHA-256": run.checkpoint_sha256}
    facts |= {"scored archive": ", ".join(run.archives), "ground truth": archive or "none", "split": split}
    about = Section("About this report", [Table(["", ""], [[name, fact] for name, fact in facts.items()])])
    title = f"{run.family} on {storage.name(archive or run.archives[0])}"
    pages = write_report(out, title, lead, [*sections, about])
    pictures = [block.uri for section in sections for block in section.blocks if isinstance(block, Picture)]
    metrics = {name: None if value != value else value for name, value in result["metrics"].items()}
    return {**result, "metrics": metrics, "pictures": pictures, **pages}


def check_family(run: Run, families: Sequence[str], purpose: str) -> None:
    """Raise UserError unless the run is of one of these families; `purpose` says what is to be made of it."""
    if run.family not in families:
        expected = f"family {' or '.join(families)}"
        raise UserError(
            f"{run.uri} is a run of family {run.family}, but {purpose} needs one of {expected}: give the --out of "
            f"jobs/score_archive.py with such a checkpoint"
        )


def read_scores(run: Run, columns: Sequence[str], split: Split = "all") -> list[pa.Table]:
    """These columns of each part of a run's scores; parts keep their schema's metadata.

    Args:
        split: of which images; "all" for all that were scored.

    Raises:
        UserError: there is no part, one lacks a column, an image stands twice, or none is of that split.
    """
    folder = storage.join(run.uri, SCORES)
    uris = sorted(file.uri for file in storage.list_files(folder) if file.path.endswith(SUFFIX))
    if not uris:
        raise UserError(f"{folder} holds no scores: run jobs/score_archive.py with --out {run.uri} to its end")
    read = [schema.SPLIT, *columns] if split != "all" else [*columns]
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(partial(storage.read_parquet, columns=read), uris))
    for uri, part in zip(uris, parts, strict=True):
        if missing := set(read) - set(part.column_names):
            raise UserError(
                f"{uri} has no column {', '.join(sorted(missing))}, although it is of a run of family {run.family}: "
                f"score the archive again, into an empty --out"
            )
    images = sum(part.num_rows for part in parts)
    if len({image_id for part in parts for image_id in part[schema.IMAGE_ID].to_pylist()}) < images:
        raise UserError(f"{folder} holds images twice: score the archive again, into an empty --out")
    return parts if split == "all" else _of_split(parts, split, f"the run {run.uri}")


def _of_split(
    tables: Sequence[pa.Table], split: str, where: str, error: type[UserError] = UserError
) -> list[pa.Table]:
    """The rows of a split; raises an error, which counts the images of the other splits, where there is none."""
    chosen = [table.filter(pc.equal(table[schema.SPLIT], split)) for table in tables]
    if not any(table.num_rows for table in chosen):
        found = Counter(name for table in tables for name in table[schema.SPLIT].to_pylist())
        told = ", ".join(f"{name or 'unknown'} {count:,}" for name, count in found.most_common()) or "no image at all"
        raise error(f"{where} has no image in split {split!r} but {told}: give another --split, or all")
    return chosen


def read_truth(
    archive: str, source: str, split: str, columns: Sequence[str], labeling: Labeling | None = None
) -> Manifest:
    """These columns, `image_id` first, of an archive's images in `split` ("all" for every one), nothing decoded.

    Of shards, images that ingest rejected are there too, with nothing but their ids.

    Raises:
        UserError: no such archive, no image in that split, or shards used as one that name two images alike.
    """
    archive = storage.normalize(archive)
    return of_split(read_all_truth(archive, source, columns, labeling, split), archive, split)


def read_all_truth(
    archive: str, source: str, columns: Sequence[str], labeling: Labeling | None = None, needed: str = "all"
) -> Manifest:
    """What `read_truth` reads, of the images of all splits; of shards perhaps those of `needed` alone."""
    wanted = [schema.IMAGE_ID, schema.SPLIT, *columns]
    if shards.is_shards(archive):
        (labeling or Labeling()).check_raw(archive)
        return _of_shards(shards.read_info(archive, latents=True), wanted, needed)
    known = open_manifest(archive, source, labeling)
    return Manifest(known.table.select(wanted), known.findings, known.notes)


def of_split(known: Manifest, archive: str, split: str) -> Manifest:
    """The images of a split, or of "all".

    Raises:
        UserError: there is none; a NoGroundTruthError where nothing is known of the others either.
    """
    if split == "all" and known.table.num_rows:
        return known
    (table,) = _of_split([known.table], split, archive, UserError if _has_truth(known.table) else NoGroundTruthError)
    return Manifest(table, known.findings, known.notes)


def _has_truth(table: pa.Table) -> bool:
    """Whether any image has a known label, a list of boxes, or a mask, in such of these columns as there are."""
    there = set(table.column_names)
    labels = pc.list_flatten(table[schema.LABELS]) if schema.LABELS in there else []
    masks = pc.list_flatten(table[schema.MASKS]) if schema.MASKS in there else []
    boxed = schema.BOXES in there and table[schema.BOXES].null_count < table.num_rows
    known = len(labels) > 0 and pc.any(pc.not_equal(labels, schema.UNKNOWN)).as_py()
    return bool(known) or boxed or len(masks) > 0


def patient_numbers(table: pa.Table) -> np.ndarray:
    """(N,) a number, the same for images of a patient, rising with the id; an unknown patient has one image."""
    return np.unique(schema.patients_of(table).to_numpy(), return_inverse=True)[1]


def _of_shards(info: shards.ShardInfo, columns: Sequence[str], split: str) -> Manifest:
    """The images of a split and of the rejects, or of all splits where it has none, or none is named."""
    shards.check_ids(info)
    fields = pa.schema([schema.row_schema(info.pixels).field(name) for name in columns])
    parts = [info.parts[split]] if info.rows(split) else info.parts.values()
    uris = [file.uri for files in parts for file in files]
    uris += [storage.join(info.uri, shards.REJECTS_FILE)] if info.rejects else []
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(partial(storage.read_parquet, columns=columns), uris))
    return Manifest(pa.concat_tables(schema.conform_to_schema(table, fields) for table in tables), info.findings)
