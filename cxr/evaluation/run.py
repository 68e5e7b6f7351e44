"""Code that all reports share: a scoring run, its scores, the ground truth, and what a report says about it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data.identity import read_crosswalk
from cxr.data.run_ledger import SCORES, current_rows, family_of, read_ledger
from cxr.errors import UserError
from cxr.metrics.bootstrap import RESAMPLES, MeanInterval
from cxr.reporting.page import Block, Section
from cxr.sources.options import Labeling, ReadOptions
from cxr.wording import counted

Split = Literal["train", "val", "test", "all"]
_THREADS = 8
_NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How to evaluate a run."""

    archive: str = ""
    """Archive or shards with the ground truth: a folder or URI. Default: the archive that was scored, if there was
    only one."""
    split: Literal["auto"] | Split = "auto"
    """Images to report on. auto: the test images, or all images if the archive has no ground truth."""
    compare_with: str = ""
    """OUT of another run to compare with this one, on the images that both runs have scored."""
    member: str = ""
    """Name of the checkpoint to report on, if the run has several. Default: all of them, each in its own section."""
    resamples: int = RESAMPLES
    """Number of bootstrap resamples of patients for confidence intervals."""
    seed: int = 0
    """Random seed of the bootstrap and of the images shown."""
    by: str = ""
    """Subgroups for which to report the metrics as well: sex, age, view, modality, body_part, and columns of the
    table given with --groups, separated by commas, such as sex,age,device."""
    groups: str = ""
    """Table that divides the images into subgroups: a CSV, TSV or Parquet file with a row for each image or patient
    and any columns, such as device or site."""
    box_score: float = 0.25
    """Minimum score of the boxes used for image-level decisions, the confusion matrix and pictures. Average
    precision uses all boxes. Findings with a threshold from `cxr score --thresholds` use that instead."""
    crosswalk: str = ""
    """Crosswalk of a run with --pseudonymize: a folder or URI, as for cxr score. It is needed to compare the run with
    the ground truth and to show its images. The results contain only pseudonyms."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    labeling: Labeling = field(default_factory=Labeling)

    def __post_init__(self) -> None:
        if not 0 <= self.box_score <= 1:
            raise UserError(f"expected --box-score from 0 to 1, got {self.box_score}")
        if self.resamples < 1:
            raise UserError(f"expected --resamples of 1 or more, got {self.resamples}")
        if self.groups and not self.by:
            raise UserError("expected --by with --groups, got none: name the columns by which to divide the images")

    @property
    def by_columns(self) -> list[str]:
        """The columns that `by` names, each once."""
        return list(dict.fromkeys(name.strip() for name in self.by.split(",") if name.strip()))


class NoGroundTruthError(UserError):
    """The archive has no ground truth of the kind that the run's scores can be compared with."""


@dataclass(frozen=True)
class Run:
    """A scoring run, as its ledger describes it."""

    uri: str
    family: str
    """For an ensemble, the family of its members."""
    archives: tuple[str, ...]  # scored archives
    checkpoint_sha256: str
    select: str = ""  # the expression that selected the scored images; see sources.selection
    input_size: int = 0  # height and width in pixels of the network's input
    member: str = ""
    """Which of several checkpoints; empty if the run is of a single one."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Decision thresholds by finding that replaced the checkpoint's own; see `families.thresholds_file`."""
    pseudonymized: bool = False
    """Ids and paths are pseudonyms; see `data.identity`."""
    crosswalk: str = ""
    """URI of the crosswalk with which `read_scores` restores the paths of a run with pseudonyms."""
    note: str = ""
    """What the user should know about scores that are not of all images; see `RunLedger.note`."""

    @property
    def box_thresholds(self) -> Mapping[str, float]:
        """From which score on a box of a finding counts as predicted, where this is decided for each finding.

        Only a detector's thresholds are scores of boxes; those of other families with boxes are probabilities.
        """
        return self.thresholds if self.family == "detect" else {}

    @property
    def archive(self) -> str:
        """The archive that was scored; raises UserError if there were several."""
        if len(self.archives) != 1:
            several = " and ".join(self.archives)
            raise UserError(f"{self.uri} contains scores of {several}: name the archive to evaluate with --archive")
        return self.archives[0]


def read_run(uri: str, member: str = "") -> Run:
    """Read the run that `cxr score` wrote to `uri`.

    Args:
        member: which of several checkpoints.

    Raises:
        UserError: there is no scoring run, `member` is not one of its checkpoints, or there are several and none is
            named.
    """
    runs = read_runs(uri)
    named = {run.member: run for run in runs}
    if member in named:
        return named[member]
    if not member:
        raise UserError(f"{uri} has scores of several checkpoints: name one with --member: {', '.join(named)}")
    if runs[0].member:
        raise UserError(f"{uri}: expected --member to be one of {', '.join(named)}, got {member}")
    raise UserError(f"{uri}: expected no --member for the run of one checkpoint, got {member}: omit it")


def name_runs(runs: Sequence[str], member: str = "") -> dict[str, Run]:
    """Runs by the name of their part in the report; those of several checkpoints have an entry for each.

    Args:
        runs: URIs, which may be preceded by a name, as in NAME=URI. The default name is that of the folder.
        member: only this checkpoint.

    Raises:
        UserError: there is no scoring run, it has no such checkpoint, or two runs have the same name.
    """
    named: dict[str, Run] = {}
    for text in runs:
        match = _NAMED.fullmatch(text)
        given, uri = (match[1], match[2]) if match else ("", text)
        checkpoints = read_runs(uri)
        chosen = [run for run in checkpoints if not member or run.member == member]
        if not chosen:
            if not checkpoints[0].member:
                raise UserError(f"{uri}: expected no --member for the run of one checkpoint, got {member}: omit it")
            names = ", ".join(run.member for run in checkpoints)
            raise UserError(f"{uri}: expected --member to be one of {names}, got {member}")
        for run in chosen:
            whole = given or storage.name(run.uri)
            name = (f"{whole}-{run.member}" if len(runs) > 1 else run.member) if run.member else whole
            if name in named:
                raise UserError(f"expected runs with different names, got two named {name}: use --run NAME=URI")
            named[name] = run
    return named


def read_other_run(options: ReportOptions) -> Run:
    """The run to compare with: its only checkpoint, or the one with the name of this run's.

    Raises:
        UserError: there is no scoring run, or it has several checkpoints and none of that name.
    """
    runs = read_runs(options.compare_with)
    return runs[0] if len(runs) == 1 else read_run(options.compare_with, options.member)


def comparison_section(other: Run, images: int, blocks: Sequence[Block], subject: str = "") -> Section:
    """The section that compares this run with another one, on the images that both have scored."""
    head = f"{subject} compared" if subject else "Compared"
    lead = f"Compared with {other.uri}, on the {counted(images, 'image')} that both have scored."
    return Section(f"{head} with {storage.name(other.uri)}", [lead, *blocks])


def images_in_common(ours: np.ndarray, theirs: np.ndarray, other: Run) -> np.ndarray:
    """The rows of the ground truth that two runs have both scored, ascending.

    Raises:
        UserError: there are none.
    """
    rows = np.intersect1d(ours, theirs)
    if not len(rows):
        raise UserError(f"{other.uri} and this run have no scored images in common: score the same archive with both")
    return rows


def read_runs(uri: str) -> list[Run]:
    """Read the run that `cxr score` wrote to `uri`: one entry for each of its checkpoints, in their order.

    Raises:
        UserError: there is no scoring run.
    """
    uri = storage.normalize(uri)
    ledger = read_ledger(uri)
    generation = ledger.readable or ledger.latest
    if generation is None:
        raise UserError(f"{uri} contains no scoring run: use the --out of cxr score, or run that job first")
    settings = generation.settings
    members = (
        {name: settings["members"][name] for name in settings["panel"]} if "panel" in settings else {"": settings}
    )
    archives = settings["archive"]
    archives = (archives,) if isinstance(archives, str) else tuple(archives)
    select = settings.get("select", "")
    return [
        Run(
            uri,
            family_of(one["recipe"]),
            archives,
            one["checkpoint_sha256"],
            select,
            one["recipe"].get("size", 0),
            name,
            one.get("thresholds", {}),
            pseudonymized="pseudonyms" in settings,
            note=ledger.note,
        )
        for name, one in members.items()
    ]


@dataclass(frozen=True)
class Measures:
    """How metrics are measured on some of the evaluated images, for a report by subgroup.

    Args:
        image_ids: of the N evaluated images.
        patients: (N,) one number per patient.
        measure: takes the places of some of the N images, ascending, and returns the metrics on them by name, such as
            "mean AUROC", with intervals by patient; NaN for metrics that cannot be measured there.
    """

    image_ids: Sequence[str]
    patients: np.ndarray
    measure: Callable[[np.ndarray], Mapping[str, MeanInterval]]


@dataclass(frozen=True)
class Content:
    """What a report says about one run, before it is written.

    Args:
        archive: the ground truth; empty for a report without one.
        lead: one or two sentences that summarize the report.
        result: what the job's result.json says; `metrics` may contain NaN.
        measures: None if the report cannot be divided into subgroups.
        subject: what the scores are about, such as "Lung masks", for the title.
    """

    run: Run
    archive: str
    options: ReportOptions
    lead: str
    sections: Sequence[Section]
    result: dict[str, Any]
    measures: Measures | None = None
    subject: str = ""


def checkpoint_uri(run: Run) -> str:
    """Where the checkpoint of a run was when it scored; empty if the scores do not say."""
    records = json.loads(_metadata(run).get(schema.MEMBERS_KEY, b"[]"))
    return records[0]["checkpoint"] if records else ""


def findings_of(run: Run) -> tuple[str, ...]:
    """The findings of a run's checkpoint; none if the scores do not name them."""
    return tuple(json.loads(_metadata(run).get(schema.FINDINGS_KEY, b"[]")))


def thresholds_of(run: Run, about: Mapping[str, Any]) -> dict[str, float]:
    """The decision thresholds of a run by finding, as far as they are known.

    They are those that replaced the checkpoint's own, else the checkpoint's.

    Args:
        about: checkpoint.json; that of another checkpoint does not count, and it may be empty.
    """
    chosen = about.get("learned", {}).get("thresholds", {}) if about.get("sha256") == run.checkpoint_sha256 else {}
    return dict(zip(chosen.get("findings", ()), chosen.get("values", ()), strict=True)) | {**run.thresholds}


def _metadata(run: Run) -> Mapping[bytes, bytes]:
    """The metadata of scores, which all parts of a run have in common, because one checkpoint made them."""
    with closing(scan_scores(run, [schema.IMAGE_ID])) as parts:
        return next(parts).schema.metadata or {}


def coverage(images: int, patients_N: np.ndarray, content: str, left_out: Mapping[str, int]) -> str:
    """The first sentences of a report: the number of images, their contents, and why other images were left out."""
    patients = counted(len(np.unique(patients_N)), "patient")
    reasons = [f"{counted(count, 'image')} {reason}" for reason, count in left_out.items() if count]
    end = f" Left out: {', '.join(reasons)}." if reasons else ""
    return f"{counted(images, 'image')} of {patients} evaluated: {content}.{end}"


def check_family(run: Run, families: Sequence[str], purpose: str) -> None:
    """Raise UserError unless the run is of one of these families, which `purpose` needs."""
    if run.family not in families:
        expected = f"family {' or '.join(families)}"
        raise UserError(
            f"{run.uri} is a run of family {run.family}, but {purpose} needs {expected}: use the --out of "
            f"cxr score with such a checkpoint"
        )


def read_scores(
    run: Run, columns: Sequence[str], split: Split = "all", optional: Sequence[str] = ()
) -> list[pa.Table]:
    """All tables of `scan_scores`, whose arguments and errors it shares.

    Raises:
        UserError: also if an image occurs twice.
    """
    parts = list(scan_scores(run, columns, split, optional))
    images = sum(part.num_rows for part in parts)
    if len({image_id for part in parts for image_id in part[schema.IMAGE_ID].to_pylist()}) < images:
        folder = storage.join(run.uri, SCORES)
        raise UserError(
            f"expected each image once in {folder}, got some twice: score the archive again, into an empty --out"
        )
    return parts


def scan_scores(
    run: Run, columns: Sequence[str], split: Split = "all", optional: Sequence[str] = ()
) -> Generator[pa.Table]:
    """These columns of each part of a run's scores, one part after another; parts keep the metadata of their schema.

    Each image of the archive has the row of the last committed increment that scored it; see `data.run_ledger`. For
    one of several checkpoints (`Run.member`), columns and metadata are as in a run of this checkpoint alone.

    Args:
        columns: `schema.IMAGE_ID` and others.
        split: only images of this split; "all" for all scored images.
        optional: further columns of `schema.SCORES`, which are null where a part lacks them.

    Raises:
        UserError: no increment is complete, a part is missing or lacks a column, or the split is empty.
    """
    read = [schema.SPLIT, *columns] if split != "all" else [*columns]

    def read_rows(uri: str, row_group: int) -> pa.Table:
        part = _read_part(uri, row_group, run.member, [*read, *optional])
        if missing := set(read) - set(part.column_names):
            raise UserError(
                f"{uri} has no column {', '.join(sorted(missing))}, which runs of family {run.family} should have: "
                f"score the archive again, into an empty --out"
            )
        for column in (schema.SCORES.field(name) for name in optional if name not in part.column_names):
            part = part.append_column(column, pa.nulls(part.num_rows, column.type))
        return part

    generation = read_ledger(run.uri).readable
    crosswalk = (
        read_crosswalk(run.crosswalk, [schema.SOURCE_URI]) if run.crosswalk and schema.SOURCE_URI in read else None
    )
    parts = found = 0
    by_split: Counter[str | None] = Counter()
    for part in current_rows(run.uri, generation, read_rows) if generation else ():
        parts += 1
        if split != "all":
            by_split.update(part[schema.SPLIT].to_pylist())
            part = part.filter(pc.equal(part[schema.SPLIT], split))
        found += part.num_rows
        yield crosswalk.with_paths(part) if crosswalk else part
    if not parts:
        folder = storage.join(run.uri, SCORES)
        raise UserError(f"{folder} contains no scores: run cxr score with --out {run.uri} until it finishes")
    if split != "all" and not found:
        raise UserError(no_images(f"the run {run.uri}", split, by_split))


def _read_part(uri: str, row_group: int, member: str, columns: Sequence[str]) -> pa.Table:
    """These columns of a row group of scores, as far as there are any, as if only this member had scored it."""
    names = {schema.member_column(member, name): name for name in columns}
    part = storage.read_parquet(uri, row_groups=[row_group], columns=[*names])
    if not member:
        return part
    records = json.loads(part.schema.metadata[schema.MEMBERS_KEY])
    (record,) = (record for record in records if record["name"] == member)
    return part.rename_columns([names[name] for name in part.column_names]).replace_schema_metadata(
        {schema.FINDINGS_KEY: json.dumps(record["findings"]), schema.MEMBERS_KEY: json.dumps([record])}
    )


def no_images(where: str, split: str, by_split: Counter[str | None]) -> str:
    """The message if a split is empty, which counts the images of the others."""
    listed = ", ".join(f"{name or 'unknown'} {count:,}" for name, count in by_split.most_common())
    return f"{where} has no image in split {split!r} ({listed or 'no images'}): use another --split, or all"
