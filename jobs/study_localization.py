"""Networks that find where findings are by labels alone: several stages' maps beside the last one's, with seeds.

python jobs/study_localization.py  # multiscale, uniform and last, on phantoms with small and large findings

ray job submit --working-dir . -- python jobs/study_localization.py --archive s3://xrays/nih --out s3://xrays/study \\
    --backbone densenet121 --size 512 --stored-size 512 --pooling mean --backbone-pretrained s3://models/densenet121.pth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cxr import storage
from cxr.benchmarks.studies import boxed_xrays, localization, localization_report
from cxr.benchmarks.studies.boxed_xrays import BoxedXRays
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import connect, ensure_shards, resolve_environment, training_record
from cxr.data.batch import best_device
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.localize import LocalizeRecipe
from cxr.metrics.bootstrap import RESAMPLES
from cxr.phantom.archive import write_phantom
from cxr.reporting import figures
from cxr.runtime.job import run_job
from cxr.sources import chestxray14
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all

MULTISCALE, LAST = "multiscale", "last"
# Name -> the settings in which its recipe differs from the job's.
VARIANTS: dict[str, dict[str, str]] = {
    MULTISCALE: {"cam_stages": "all", "relevance": "learned"},
    "uniform": {"cam_stages": "all", "relevance": "uniform"},
    LAST: {"cam_stages": "last"},
    **{
        f"{name}-{pooling}": {"cam_stages": stages, "relevance": "learned", "pooling": pooling}
        for name, stages in ((MULTISCALE, "all"), (LAST, "last"))
        for pooling in ("mean", "max", "lse")
    },
}
FINDINGS = ("Cardiomegaly", "Mass", "Nodule")  # of the phantoms: large, smaller, small
PREVALENCE = 0.7


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_localization"
    """Folder or URI of the results: table.md, networks.csv, accuracy.png, and a folder for each network."""
    variants: tuple[str, ...] = (MULTISCALE, "uniform", LAST)
    """Variants to compare: multiscale, uniform, last; multiscale or last with -mean, -max or -lse for another pooling."""
    seeds: int = 3
    """Number of networks per variant, each with its own seed."""
    test_images: int = 0
    """Number of test images, spread evenly over the split, on which networks are compared; they are held in memory.
    0: all."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=1200, stored_size=128))
    recipe: LocalizeRecipe = field(default_factory=lambda: LocalizeRecipe(size=128))
    """Settings of all networks, except those that a variant sets: cam_stages, relevance, pooling."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    chosen = named(options.variants, options.recipe)
    if options.data.stream or options.seeds < 1:
        raise UserError(
            "networks are judged on shards, of one seed or more: leave --stream out, give --seeds 1 or more"
        )
    out = check_inputs(options.recipe, options.data, options.out)
    connect(out, options.data, options.run)
    recipes = {name: resolve_environment(recipe, out, options.run) for name, recipe in chosen.items()}
    data = ensure_shards(phantoms(options.data, out), out, options.recipe)
    test = boxed_xrays.read(data, "test", options.test_images)  # first: it may hold no boxes
    trained = train_all(recipes, range(options.seeds), data, out, options.run)
    device = best_device()
    judged = []
    for name in recipes:
        networks = [checkpoint.load(one.checkpoint) for one in trained if one.name == name]
        judged.append(localization.judge(name, networks, test, device))
        print(f"judged: {name}", flush=True)
    return {
        "checkpoints": {f"{one.name}, seed {one.seed}": one.checkpoint for one in trained},
        "data": data,
        "trained": {name: training_record(recipe) for name, recipe in recipes.items()},
        **write(judged, test, options.seeds, out),
    }


def named(names: Sequence[str], recipe: LocalizeRecipe) -> dict[str, LocalizeRecipe]:
    """Name -> recipe of each variant asked for."""
    if not names or set(names) - set(VARIANTS):
        raise UserError(f"variants: expected some of {', '.join(VARIANTS)}, got {' '.join(names)}")
    return {name: recipe.replace(**VARIANTS[name]) for name in names}


def phantoms(options: ArchiveOptions, out: str) -> ArchiveOptions:
    """The archive as given, or one of phantoms with small and large findings, in OUT/phantoms; made once."""
    if options.archive:
        return options
    uri = storage.join(storage.normalize(out), "phantoms")
    if not chestxray14.detect(uri):
        print(f"no --archive given: making {options.phantoms} phantom X-rays in {uri}", flush=True)
        size = max(256, options.stored_size)
        write_phantom(uri, options.phantoms, size=size, findings=FINDINGS, prevalence=PREVALENCE)
    return replace(options, archive=(uri,))


def write(judged: Sequence[localization.Judged], test: BoxedXRays, seeds: int, out: str) -> dict[str, Any]:
    """Print the tables; write table.md, networks.csv and accuracy.png into `out`; metrics and URIs."""
    by_name = {one.name: one for one in judged}
    gains = localization.gains(by_name[MULTISCALE], by_name[LAST]) if {MULTISCALE, LAST} <= set(by_name) else {}
    gained = localization_report.gains_table(gains, MULTISCALE, LAST) if gains else ""
    shown = [*judged, *localization.guesses(test)]
    counts = test.pairs()
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    said = f"{test.rows.num_rows:,} test images, of these with a box: {told}; {seeds} seed{'s' * (seeds > 1)}."
    print(f"{localization_report.tables(shown)}{gained}{said}", flush=True)
    storage.write_text(storage.join(out, "table.md"), localization_report.page(shown, gained, said, RESAMPLES))
    storage.write_text(storage.join(out, "networks.csv"), localization_report.csv(shown))
    picture = figures.save_figure(localization_report.picture(shown), out, "accuracy.png")
    print(f"picture: {picture}", flush=True)
    metrics = {"images": float(test.rows.num_rows), **{f"pairs/{name}": float(n) for name, n in counts.items()}}
    metrics |= localization.metrics(shown, gains)
    return {"metrics": metrics, "table": storage.join(out, "networks.csv"), "pictures": [picture]}


if __name__ == "__main__":
    run_job(main, Options)
