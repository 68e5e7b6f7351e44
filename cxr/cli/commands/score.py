"""Score every image of an archive with one or more checkpoints of any family, in one pass.

cxr score --archive s3://xrays/nih --checkpoint s3://xrays/align

cxr score --archive s3://xrays/nih --checkpoint s3://xrays/align --checkpoint findings=s3://xrays/classify/checkpoint

cxr score --archive s3://xrays/nih --panel panel.yaml
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import tyro

from cxr import storage
from cxr.cli.exports import ExportFormat, check_formats, export_all
from cxr.cli.options import check_described
from cxr.cli.phantoms import some_phantoms
from cxr.cli.plan_options import PlanOptions
from cxr.data import gate
from cxr.data.identity import open_identity
from cxr.data.run_ledger import family_of, read_ledger
from cxr.inference.options import ScoreOptions, check_archives
from cxr.inference.panel import Panel, given_panel


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Archive, shards or the latents of an earlier run: a folder, s3://bucket/prefix or gs://bucket/prefix; a ZIP or
    TAR file; or a CSV or Parquet file that lists images. Repeat the option to score several archives into one result.
    Default: a small phantom archive."""
    checkpoint: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder or URI of a checkpoint. Repeat the option to score with several in one pass; their scores are columns
    named NAME/COLUMN. NAME=URI names a checkpoint; the default is the last folder of its URI. Default: train an
    aligner for a minute on the first archive, or with --save-latents a compressor."""
    panel: str = ""
    """YAML file or URI with several checkpoints and their options, instead of --checkpoint; see
    docs/how-to/panels.md."""
    out: str = "runs/score"
    """Folder or URI of the results: OUT/scores/*.parquet, OUT/latents, OUT/embeddings. With several checkpoints,
    latents and embeddings are in OUT/NAME."""
    export: tyro.conf.UseAppendAction[tuple[ExportFormat, ...]] = ()
    """Also write the scores as OUT/exports/scores.csv (csv), or predicted boxes and masks as OUT/exports/coco.json
    (coco). Repeat the option for both. With several checkpoints, the files are in OUT/exports/NAME."""
    score: ScoreOptions = field(default_factory=ScoreOptions)
    planning: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        check_described(self.archive, self.score.reading)


def main(options: Options) -> dict[str, Any]:
    for archive in check_archives(options.archive, options.score):
        storage.check_readable(archive)
    panel, recipes = given_panel(options.panel, options.checkpoint)
    check_formats(options.export, [family_of(recipe) for recipe in recipes])
    open_identity(options.score.pseudonymize, options.score.crosswalk, storage.normalize(options.out), ())

    # This imports torch, which takes seconds: mistakes above are reported without it.
    from cxr.inference.score import score

    out = storage.normalize(options.out)
    archives = options.archive or (some_phantoms(out),)
    if panel is None:
        panel = Panel.of([_demo_checkpoint(archives[0], out, latents=options.score.save_latents)])
    scored = score(archives, panel, out, options.score, on_start=partial(_say_plan, options))
    if options.score.new_only and not scored.increments:
        print("nothing new: all images of the archive have been scored", flush=True)
    else:
        print(f"scores: {scored.scores}: {scored.images} images, {scored.rejects} of them with an error", flush=True)
    for member in scored.members:
        prefix = f"{member.name} " if member.name else ""
        if member.name:
            print(f"{member.name}: family {member.family}, {member.checkpoint}")
        if member.latents:
            print(f"{prefix}latents: {member.latents}")
        if member.embeddings:
            print(f"{prefix}embeddings: {member.embeddings}")
    for reason, count in scored.reasons.items():
        print(f"  {count:6d}  {reason}")
    if scored.not_frontal_chest:
        print(f"note: {gate.describe(scored.not_frontal_chest)}", flush=True)
    exports = export_all(out, options.export) if read_ledger(out).readable else []
    for uri in exports:
        print(f"export: {uri}", flush=True)
    metrics = {"images": scored.images, "rejects": scored.rejects, "images_per_s": scored.images_per_s}
    result = {**dataclasses.asdict(scored), "exports": exports, "metrics": metrics}
    if panel.is_single:
        (member,) = scored.members
        result |= {"checkpoint": member.checkpoint, "latents": member.latents, "embeddings": member.embeddings}
    return result


def _say_plan(options: Options, images: int) -> None:
    from cxr.cli.plans import say_plan  # imports Ray

    say_plan(options, images)


def _demo_checkpoint(archive: str, out: str, *, latents: bool) -> str:
    from cxr.cli.training_jobs import demo_aligner_checkpoint, demo_compressor_checkpoint

    return (demo_compressor_checkpoint if latents else demo_aligner_checkpoint)(archive, out)
