"""The steps of every search job around search(): checks, the ranked trials, pictures, the result."""

from __future__ import annotations

from typing import Any

from cxr import storage
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions, TuneOptions
from cxr.cli.plans import say_plan
from cxr.cli.training_jobs import (
    connect,
    ensure_shards,
    picture,
    print_result,
    resolve_environment,
    training_record,
)
from cxr.families.base import Recipe
from cxr.families.compatibility import check_ray_reader
from cxr.families.presets import RECIPE_FILE
from cxr.reporting import pareto
from cxr.reporting.trials import trials_table, write_search_pictures, write_trials
from cxr.training.mlflow_log import MlflowLog
from cxr.training.options import SEARCH, RunOptions, SearchOptions, check_resume
from cxr.training.search import objectives_of, search, searched


def tune_job(
    recipe: Recipe,
    archive: ArchiveOptions,
    options: SearchOptions,
    run: RunOptions,
    out: str,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """The body of a tune_<family> job; returns its result.json.

    Raises:
        UserError: the family does not have the objectives; raised before anything is written.
        RuntimeError: no trial finished an epoch.
    """
    objectives, space = objectives_of(recipe, options), searched(recipe, options)
    if run.shard_reader == "ray":
        check_ray_reader(recipe)
    check_resume(storage.join(storage.normalize(out), SEARCH), resume)
    archive = archive.with_headers(out)
    inputs = check_inputs(recipe, archive, out)
    out = inputs.out
    connect(out, archive, run)
    say_plan(TuneOptions(out=out, recipe=recipe, run=run, search=options, data=archive), inputs.images)
    recipe = resolve_environment(recipe, out, run, resume=resume)
    data = ensure_shards(archive, out, recipe)
    trials = search(
        recipe, data, out, options, run, reading=archive.reading, labeling=archive.labeling, resume=resume
    )
    table = write_trials(trials, recipe.monitor, out, objectives)
    print(trials_table(trials, recipe.monitor, objectives), flush=True)
    best = trials[0]
    if not best.checkpoint:
        raise RuntimeError(f"all {len(trials)} trials failed; see {table}. The first one: {best.status}")
    pictures = picture(best.checkpoint, data, out)
    maximize = recipe.mode == "max"
    storage.write_json(storage.join(out, RECIPE_FILE), recipe.replace(**best.sampled).to_dict())
    figures = write_search_pictures(trials, space, recipe.monitor, maximize, out, objectives)
    figures += pareto.write_picture(trials, objectives, out)
    tracked = MlflowLog.of(out)
    tracked.send_pictures(pictures)
    tracked.send_files([table, *figures])
    pictures += figures
    print_result(best.metrics, best.checkpoint, pictures)
    return {
        "checkpoint": best.checkpoint,
        "metrics": best.metrics,
        "sampled": best.sampled,
        "trials": table,
        "data": data,
        "pictures": pictures,
        **training_record(recipe.replace(**best.sampled)),
        **({"pareto": pareto.entries(trials, objectives)} if objectives else {}),
    }
