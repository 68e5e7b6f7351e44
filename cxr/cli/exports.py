"""What the commands that export scores share: their options, and the CSV and COCO files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cxr import schema, storage
from cxr.cli.commands.info import SCORE_COLUMNS
from cxr.errors import UserError
from cxr.evaluation.run import Run, Split, read_run, read_runs, scan_scores
from cxr.export import coco, score_tables
from cxr.export.score_tables import Per
from cxr.runtime.console import note

ExportFormat = Literal["csv", "coco"]
EXPORTS = "exports"  # folder in OUT of `cxr score`


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of every command that exports scores."""

    run: str = "runs/score"
    """OUT of `cxr score`: a folder, s3://bucket/prefix or gs://bucket/prefix."""
    member: str = ""
    """Name of the checkpoint whose scores are exported, if the run has several."""
    split: Split = "all"
    """Split whose images are exported."""
    out: str = "runs/export"
    """Folder or URI of the results."""

    def open_run(self, *, own_ids: bool = False) -> Run:
        """The run.

        Args:
            own_ids: the export needs the archive's own ids, not pseudonyms.

        Raises:
            UserError: there is no such run, or the results would be written among its own.
        """
        run = read_run(self.run, self.member)
        show_notes(run)
        if own_ids and run.pseudonymized:
            raise UserError(
                f"{run.uri} has pseudonyms, but a submission needs the archive's own names: score the archive "
                f"without --pseudonymize"
            )
        if storage.normalize(self.out) == run.uri:
            raise UserError(f"--out {self.out} is the folder of the run: use another one, such as {self.out}/exports")
        return run


def show_notes(*runs: Run) -> None:
    """Show what the user should know about the scores of these runs, each note once."""
    for text in dict.fromkeys(run.note for run in runs if run.note):
        note(text)


def export_csv(run: Run, out: str, per: Per = "image", split: Split = "all") -> tuple[str, dict[str, int]]:
    """Write OUT/scores.csv, studies.csv or patients.csv; returns its URI and `score_tables.write_csv`'s counts."""
    uri = storage.join(storage.normalize(out), score_tables.FILES[per])
    columns = score_tables.columns_to_read(SCORE_COLUMNS[run.family])
    return uri, score_tables.write_csv(scan_scores(run, columns, split), uri, per, run.box_thresholds)


def export_coco(run: Run, out: str, split: Split = "all", min_score: float = 0.0) -> tuple[str, dict[str, int]]:
    """Write OUT/coco.json; returns its URI and the counts of `coco.write_coco`."""
    uri = storage.join(storage.normalize(out), coco.FILE)
    columns = coco.columns_to_read(run.family, SCORE_COLUMNS[run.family])
    parts = scan_scores(run, columns, split)
    return uri, coco.write_coco(parts, uri, run.family, run.archives, min_score)


def check_formats(formats: Sequence[ExportFormat], families: Sequence[str]) -> None:
    """Raise UserError if there are families and no checkpoint of them predicts what a format contains."""
    if "coco" in formats and families and not any(map(is_located, families)):
        coco.columns_to_read(families[0], SCORE_COLUMNS[families[0]])  # raises UserError


def is_located(family: str) -> bool:
    """Whether checkpoints of a family predict boxes or masks."""
    return bool({schema.PRED_BOXES, schema.PRED_MASK_RLE} & {*SCORE_COLUMNS[family]})


def export_all(out: str, formats: Sequence[ExportFormat]) -> list[str]:
    """Write the scores of a run into OUT/exports, or OUT/exports/NAME if it is of several checkpoints; returns URIs.

    COCO JSON is written for checkpoints that predict boxes or masks.
    """
    uris = []
    for run in read_runs(out):
        folder = storage.join(out, EXPORTS, run.member) if run.member else storage.join(out, EXPORTS)
        if "csv" in formats:
            uris.append(export_csv(run, folder)[0])
        if "coco" in formats and is_located(run.family):
            uris.append(export_coco(run, folder)[0])
    return uris
