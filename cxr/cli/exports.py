"""What the commands that export scores share: their options, and the CSV and COCO files of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cxr import storage
from cxr.cli.commands.info import SCORE_COLUMNS
from cxr.errors import UserError
from cxr.evaluation.run import Run, Split, read_run, read_scores
from cxr.export import coco, score_tables
from cxr.export.score_tables import Per

ExportFormat = Literal["csv", "coco"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of every command that exports scores."""

    run: str = "runs/score"
    """OUT of `cxr score`: a folder, s3://bucket/prefix or gs://bucket/prefix."""
    split: Split = "all"
    """Split whose images are exported."""
    out: str = "runs/export"
    """Folder or URI of the results."""

    def open_run(self) -> Run:
        """The run.

        Raises:
            UserError: there is none, or the results would be written among its own.
        """
        run = read_run(self.run)
        if storage.normalize(self.out) == run.uri:
            raise UserError(
                f"--out {self.out} is the folder of the run: give another one, such as {self.out}/exports"
            )
        return run


def export_csv(run: Run, out: str, per: Per = "image", split: Split = "all") -> tuple[str, dict[str, int]]:
    """Write OUT/scores.csv, studies.csv or patients.csv; returns its URI and `score_tables.write_csv`'s counts."""
    uri = storage.join(storage.normalize(out), score_tables.FILES[per])
    columns = score_tables.columns_to_read(SCORE_COLUMNS[run.family])
    return uri, score_tables.write_csv(read_scores(run, columns, split), uri, per)


def export_coco(run: Run, out: str, split: Split = "all", min_score: float = 0.0) -> tuple[str, dict[str, int]]:
    """Write OUT/coco.json; returns its URI and the counts of `coco.write_coco`."""
    uri = storage.join(storage.normalize(out), coco.FILE)
    columns = coco.columns_to_read(run.family, SCORE_COLUMNS[run.family])
    parts = read_scores(run, columns, split)
    return uri, coco.write_coco(parts, uri, run.family, run.archives, min_score)
