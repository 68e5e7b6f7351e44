"""The job that `make demo` submits: search for an aligner, score the archive with the best one, write one page."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from cxr import storage
from cxr.cli.options import ArchiveOptions
from cxr.inference.options import ScoreOptions
from cxr.runtime import console
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions, SearchOptions

BEFORE = "_before"  # in names of metrics of the images before alignment
CAPTIONS = {
    "before_after.png": "Images of the validation split, before and after alignment.",
    "mean_before_after.png": "Mean of these images: the better they are aligned, the sharper it is.",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the demo."""

    archive: str
    """Folder of the synthetic X-rays."""
    out: str = "runs/demo"
    """Folder of the results."""
    trials: int = 4
    """Number of trials of the search."""
    epochs: int = 8
    """Epochs of a trial that is not stopped early."""


def main(options: Options) -> dict[str, Any]:
    from cxr.cli.search_jobs import tune_job  # these import torch and Ray, which takes seconds
    from cxr.families.align import AlignRecipe
    from cxr.inference.score import score
    from cxr.reporting.page import Picture, Report, Section, write_report
    from cxr.reporting.tables import Table
    from cxr.sources.options import ReadOptions

    out = storage.normalize(options.out)
    recipe = AlignRecipe(size=64, epochs=options.epochs)
    search = SearchOptions(trials=options.trials, frozen_params=("feature_layers", "feature_weight"))
    archive = ArchiveOptions(archive=(options.archive,), stored_size=128)
    with console.current().hidden_stdout():  # the page shows what these print
        tuned = tune_job(recipe, archive, search, RunOptions(), storage.join(out, "search"))
        scores = ScoreOptions(reading=ReadOptions(source="chestxray14"))
        scored = score(options.archive, tuned["checkpoint"], storage.join(out, "scored"), scores)
    table = Table(*_ranked(tuned, recipe.monitor, storage.join(out, "search", "trials.csv")))
    console.say(f"\n{table.markdown()}")

    metrics = tuned["metrics"]
    names = {storage.name(uri): uri for uri in tuned["pictures"]}
    pictures = [Picture(names[name], caption) for name, caption in CAPTIONS.items() if name in names]
    changes = Table(["metric", "before", "after"], [*_changes(metrics)])
    sections = [
        Section("Before and after", [*pictures, changes]),
        Section(
            "Ranked trials",
            [
                f"Each trial trained with different settings. They are ranked by `{recipe.monitor}`; bad "
                f"trials were stopped early.",
                table,
            ],
        ),
        Section(
            "Scores",
            [
                f"The best checkpoint, `{tuned['checkpoint']}`, scored all {scored.images} images of the archive at "
                f"{scored.images_per_s:.0f} images/s; {scored.rejects} could not be read. Each image is a row of the "
                f"Parquet files in `{scored.scores}`.",
            ],
        ),
        Section(
            "Next steps",
            [
                "Train on your own images: `cxr train align --archive FOLDER --out runs/align`",
                "Run a longer search: `cxr tune align --archive FOLDER --trials 20 --out runs/tune`",
                f"Score other images: `cxr score --archive FOLDER --checkpoint "
                f"{tuned['checkpoint']} --out runs/scores`",
                "To run these commands on a Ray cluster: `cxr submit -- train align …`",
            ],
        ),
    ]
    lead = f"The best of {options.trials} aligners for chest X-rays, trained and applied on this machine in one job."
    pages = write_report(out, Report("Chest X-rays aligned to a common frame", lead, sections))
    return {"checkpoint": tuned["checkpoint"], "metrics": metrics, "scores": scored.scores, **pages}


def _ranked(tuned: dict[str, Any], monitor: str, trials_csv: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of trials with their settings, the best first."""
    columns = ["trial", monitor, "epochs", "status", *tuned["sampled"]]
    rows = csv.DictReader(io.StringIO(storage.read_text(trials_csv)))
    return ["rank", *columns], [[str(n), *(_cell(row[name]) for name in columns)] for n, row in enumerate(rows, 1)]


def _changes(metrics: dict[str, float]) -> list[list[str]]:
    """Name, value before and value after of each metric that exists for images before alignment."""
    rows = []
    for name in filter(lambda name: BEFORE in name, metrics):
        after = name.replace(BEFORE, "")
        if after in metrics:
            label = after.removesuffix("_pct").replace("_", " ") + " (%)" * after.endswith("_pct")
            rows.append([label, f"{metrics[name]:.4g}", f"{metrics[after]:.4g}"])
    return rows


def _cell(text: str) -> str:
    """A number with four digits; other text as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


if __name__ == "__main__":
    run_job(main, Options)
