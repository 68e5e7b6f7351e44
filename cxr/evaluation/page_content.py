"""The page of one run, and the page of several runs or checkpoints side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cxr import storage
from cxr.data.run_ledger import read_ledger
from cxr.evaluation.about import about_section, unscored_section
from cxr.evaluation.headlines import key_figures
from cxr.evaluation.run import Content, checkpoint_uri
from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting.forest import ForestLine, forest_figure
from cxr.reporting.page import Block, KeyFigure, Report, Section, save_picture
from cxr.reporting.tables import Table
from cxr.wording import counted

PICTURES = "pictures"


def one_run(content: Content, out: str) -> tuple[Report, dict[str, Any]]:
    """The page about one run, and the contents of the job's result.json; writes OUT/rejects.csv."""
    result = content.result | {"metrics": without_nan(content.result["metrics"])}
    page = Report(
        title=f"{content.subject} on {_archive(content)}",
        lead=content.lead,
        figures=key_figures(result["metrics"]),
        facts=_facts(content) | _written(),
        sections=[*content.sections, unscored_section(content.run, out, result)],
        closing=[about_section([content], "About this run")],
    )
    return page, result


def several_runs(contents: Mapping[str, Content], out: str) -> tuple[Report, dict[str, Any]]:
    """The page about several runs or checkpoints, and the contents of the job's result.json.

    Metrics are named "RUN/METRIC" there.
    """
    metrics = {name: without_nan(content.result["metrics"]) for name, content in contents.items()}
    figures = {name: key_figures(of) for name, of in metrics.items()}
    runs = {content.run.uri: content.run for content in contents.values()}
    results = {name: {k: v for k, v in of.result.items() if k != "metrics"} for name, of in contents.items()}
    named = {f"{name}/{key}": value for name, of in metrics.items() for key, value in of.items()}
    result: dict[str, Any] = {"metrics": named, "parts": results}
    parts = []
    for name, content in contents.items():
        own = [unscored_section(content.run, storage.join(out, name), results[name])] if len(runs) > 1 else []
        parts.append(
            Report(
                title=f"{name}: {content.subject.lower()}",
                lead=content.lead,
                figures=[replace(figure, name=f"{name}/{figure.name}") for figure in figures[name]],
                facts=_facts(content),
                sections=[*content.sections, *own],
            )
        )
    of_all = [unscored_section(next(iter(runs.values())), out, result)] if len(runs) == 1 else []
    abouts = []
    for uri in runs:
        of_run = {name: content for name, content in contents.items() if content.run.uri == uri}
        abouts.append(
            about_section([*of_run.values()], f"About {', '.join(of_run) if len(runs) > 1 else 'this run'}")
        )
    archives = dict.fromkeys(map(_archive, contents.values()))
    page = Report(
        title=f"{counted(len(contents), 'run' if len(runs) > 1 else 'model')} on {' and '.join(archives)}",
        lead=f"{', '.join(contents)}: each has a section of this page.",
        facts=_written(),
        sections=[_side_by_side(contents, figures, out)],
        parts=parts,
        closing=[*of_all, *abouts],
    )
    return page, result


def without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics for JSON: null in place of NaN."""
    return {name: None if value != value else value for name, value in metrics.items()}


def _archive(content: Content) -> str:
    return storage.name(content.archive or content.run.archives[0])


def _facts(content: Content) -> dict[str, str]:
    run = content.run
    scored, checkpoint = ", ".join(run.archives), checkpoint_uri(run)
    facts = {
        "Model": f"{run.family}{f', {checkpoint}' if checkpoint else ''}",
        "Checkpoint": f"SHA-256 {run.checkpoint_sha256[:12]}",
        "Scored archive": scored,
        "Ground truth": "of the scored archive" if content.archive == scored else content.archive or "none",
    }
    generation = read_ledger(run.uri).readable
    passes = [each.committed for each in generation.increments if each.committed] if generation else []
    return facts | ({"Scored": passes[-1]} if passes else {})


def _written() -> dict[str, str]:
    return {"Report written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def _side_by_side(contents: Mapping[str, Content], figures: Mapping[str, Sequence[KeyFigure]], out: str) -> Section:
    """The key figures of all runs; those that several runs have are also shown as a forest plot."""
    by_run = {name: {figure.name: figure for figure in of} for name, of in figures.items()}
    titles = {figure.name: figure.title for of in figures.values() for figure in of}
    if len({content.run.family for content in contents.values()}) == 1:
        head = ["metric (95 % interval)", *by_run]
        rows = [
            [title, *(of[key].text if key in of else "–" for of in by_run.values())] for key, title in titles.items()
        ]
    else:  # which have few metrics in common
        head = ["model", "family", "images", "metrics (95 % interval)"]
        rows = [
            [
                name,
                content.run.family,
                by_run[name]["images"].text if "images" in by_run[name] else "–",
                "; ".join(f"{figure.title} {figure.text}" for figure in figures[name] if figure.digits) or "–",
            ]
            for name, content in contents.items()
        ]
    blocks: list[Block] = [Table(head, rows)]
    shared = [key for key in titles if sum(key in of and of[key].digits > 0 for of in by_run.values()) > 1]
    if shared:
        lines = []
        for name, of in by_run.items():
            if own := [of[key] for key in shared if key in of]:
                values = {each.title: MeanInterval(each.value, each.low, each.high) for each in own}
                lines.append(ForestLine(name, values))
        caption = "The metrics that several runs have, with 95 % intervals by patient."
        figure = forest_figure(lines, [titles[key] for key in shared])
        blocks += [
            save_picture(figure, storage.join(out, PICTURES), "side_by_side.png", caption),
            "Runs may have scored different images, and their intervals do not show whether two runs differ: for "
            "that, compare two of them with `--compare-with`, which measures differences on the same images.",
        ]
    return Section("Side by side", blocks)
