"""AE-CNN, the same classifier on plainly resized images and on whole ones: mean AUROC with seeds and intervals.

python jobs/study_aecnn.py  # on a phantom archive

ray job submit --working-dir . -- python jobs/study_aecnn.py --archive s3://xrays/nih --out s3://xrays/study --seeds 5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr import storage
from cxr.benchmarks.studies import aecnn, xrays
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions
from cxr.cli.training_jobs import connect, ensure_shards, resolve_environment, training_record
from cxr.families import checkpoint, lung_crop
from cxr.families.aecnn import AecnnRecipe
from cxr.reporting import figures
from cxr.runtime.job import run_job
from cxr.training.options import RunOptions
from cxr.training.sweep import train_all

COMPRESSED, RESIZED, WHOLE = "ae-cnn", "resized", "uncompressed"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job. The same command continues a killed study."""

    out: str = "runs/study_aecnn"
    """Folder or URI of the results: table.md, auroc.png, and a folder for each recipe."""
    seeds: int = 3
    """Number of networks per recipe, each with its own seed."""
    test_images: int = 5000
    """Number of test images, spread evenly over the split, on which networks are compared; they are held in memory.
    0: all."""
    data: ArchiveOptions = field(default_factory=lambda: ArchiveOptions(phantoms=600, stored_size=128))
    recipe: AecnnRecipe = field(default_factory=lambda: AecnnRecipe(size=128, compression=4))
    """Settings of the AE-CNN. The other recipes differ in `compressor` alone and skip the autoencoder's stage."""
    run: RunOptions = field(default_factory=RunOptions)


def main(options: Options) -> dict[str, Any]:
    out = check_inputs(options.recipe, options.data, options.out)
    connect(out, options.data, options.run)
    recipe = resolve_environment(options.recipe, out, options.run)
    data = ensure_shards(options.data, out, options.recipe)
    compressors = {COMPRESSED: recipe.compressor, RESIZED: "resize", WHOLE: "none"}
    recipes = {name: recipe.replace(compressor=compressor) for name, compressor in compressors.items()}
    trained = train_all(recipes, range(options.seeds), data, out, options.run, source=options.data.source)
    networks = {name: [checkpoint.load(t.checkpoint) for t in trained if t.name == name] for name in recipes}
    crop = lung_crop.of_recipe(recipe)
    test, notes = xrays.read(data, "test", recipe, options.test_images, options.data.source, crop)
    for note in notes:
        print(f"note: {note}", flush=True)
    judged = aecnn.variants(networks, test)
    text = aecnn.table(judged)
    said = f"{len(test.pixels):,} test images of {len(set(test.patients)):,} patients, {options.seeds} seeds"
    print(f"{text}{said}", flush=True)
    storage.write_text(storage.join(out, "table.md"), f"{text}\n{said}\n")
    picture = figures.save_figure(aecnn.picture(judged), out, "auroc.png")
    print(f"picture: {picture}", flush=True)
    return {
        "metrics": {"images": float(len(test.pixels)), **aecnn.metrics(judged)},
        "checkpoints": {f"{t.name}, seed {t.seed}": t.checkpoint for t in trained},
        "data": data,
        "trained": {name: training_record(recipe) for name, recipe in recipes.items()},
        "pictures": [picture],
    }


if __name__ == "__main__":
    run_job(main, Options)
