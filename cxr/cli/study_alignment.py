"""The study of alignment: the same classifier on initial, aligned and ECC-aligned images, with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr import schema, storage
from cxr.benchmarks.studies import aligned_classification as study
from cxr.benchmarks.studies import classifiers, ecc_crop, xrays
from cxr.benchmarks.studies.aligned_classification import ALIGNED, ECC, INITIAL, ArchiveResult
from cxr.benchmarks.studies.ecc_crop import EccCrop
from cxr.cli.options import ArchiveOptions
from cxr.cli.phantoms import phantoms_with_boxes
from cxr.cli.study_networks import (
    begin,
    check_different,
    check_options,
    check_originals,
    known_test_labels,
    networks_record,
    scored_labels,
    write_files,
)
from cxr.cli.training_jobs import demo_aligner_checkpoint, ensure_shards, resolve_environment
from cxr.data import ingest, shards
from cxr.errors import UserError
from cxr.evaluation.classification_data import LabeledScores
from cxr.families.classify import ClassifyRecipe
from cxr.imaging.geometry import fit
from cxr.imaging.image import to_bits
from cxr.schema import PixelFormat
from cxr.training.sweep import train_all

if TYPE_CHECKING:
    from cxr.cli.commands.study_alignment import Options

ARCHIVE = "archive"  # name of a given archive in results
_REGISTERED = 256  # training images from which ECC makes its templates


def run_study(options: Options) -> dict[str, Any]:
    """Train and test the classifier on each variant of each archive with every seed; returns the result.json.

    Raises:
        UserError: an archive that cannot be aligned from its originals, and other mistakes in the input.
    """
    _check(options)
    run, poses, seeds = options.run, options.poses, options.seeds
    archive, out = begin(options, (1 if options.data.archive else len(poses)) * len(study.VARIANTS) * seeds)
    archives = {ARCHIVE: archive} if archive.archive else phantoms(archive, poses, out)
    recipe = resolve_environment(options.recipe, out, run)
    initial = recipe.replace(aligner="")
    whole = {name: ensure_shards(of, storage.join(out, name, INITIAL), initial) for name, of in archives.items()}
    truths = {name: known_test_labels(uri) for name, uri in whole.items()}
    aligner = recipe.aligner or demo_aligner_checkpoint([*archives.values()][-1].uris[0], out)
    aligned = recipe.replace(aligner=storage.normalize(aligner))
    recipes = {INITIAL: initial, ALIGNED: aligned, ECC: initial}
    results: list[ArchiveResult] = []
    records: dict[str, Any] = {}
    for name, images in archives.items():
        folder = storage.join(out, name)
        data = {INITIAL: whole[name], **prepared(images, whole[name], recipes, folder)}
        trained = train_all(recipes, range(seeds), data, folder, run, reading=archive.reading)
        results.append(evaluated(name, scored_labels(trained, data, truths[name], folder), data))
        records[name] = networks_record(trained, recipes, data[INITIAL]) | {"shards": data}
        print(f"evaluated: {name}", flush=True)
    return {"aligner": aligned.aligner, "archives": records, **write(results, seeds, out)}


def _check(options: Options) -> None:
    archive, poses = options.data, options.poses
    check_options(archive, options.seeds)
    check_originals(archive)
    if len(archive.archive) > 1:
        raise UserError(f"expected one --archive, got {len(archive.archive)}: run a study for each of them")
    if options.recipe.lung_crop:
        raise UserError("lung_crop: expected nothing, because the study aligns the images: omit it")
    if not (archive.archive or poses):
        raise UserError("--poses: expected 1 or more without --archive, got none: add one")
    check_different("--poses", poses)


def phantoms(options: ArchiveOptions, poses: Sequence[float], out: str) -> dict[str, ArchiveOptions]:
    """Archives of the same phantom patients in poses of each strength, in OUT/phantoms-POSE/phantoms, made once."""
    named = {f"phantoms-{pose:g}": pose for pose in poses}
    return {name: phantoms_with_boxes(options, storage.join(out, name), pose=pose) for name, pose in named.items()}


def prepared(
    archive: ArchiveOptions, initial: str, recipes: Mapping[str, ClassifyRecipe], folder: str
) -> dict[str, str]:
    """The URIs of the aligned and ECC-aligned shards, in FOLDER/VARIANT/shards.

    Args:
        initial: URI of the shards of the same images as they are, from which ECC makes its templates.
    """
    aligned = ensure_shards(archive, storage.join(folder, ALIGNED), recipes[ALIGNED])
    made = storage.join(folder, ECC, "shards")
    if not shards.is_shards(made):
        templates = storage.join(folder, ECC, "templates.npz")
        if not storage.exists(templates):
            ecc_crop.write_templates(templates, training_images(initial, ecc_crop.SIZE))
        ingest.ingest(
            archive.uris[0],
            made,
            reading=archive.reading,
            pixels=PixelFormat(archive.stored_size),
            max_rejects=archive.max_rejects,
            crop=EccCrop(templates, recipes[ECC].enhancement),
            enhance=recipes[ECC].enhancement,
            labeling=archive.labeling,
        )
    return {ALIGNED: aligned, ECC: made}


def training_images(data: str, size: int) -> np.ndarray:
    """Some training images of shards, spread evenly, uint8 (B, size, size)."""
    info = shards.read_info(data)
    numbers = xrays.spread(info.rows("train"), _REGISTERED)
    return np.stack(
        [
            fit(to_bits(image, 8), size)[0]
            for rows in xrays.stored_rows(info, "train", numbers, [schema.PIXELS])
            for image in schema.pixels_array(rows[schema.PIXELS], info.pixels)
        ]
    )


def evaluated(name: str, scores: Mapping[str, Sequence[LabeledScores]], data: Mapping[str, str]) -> ArchiveResult:
    """The results of an archive's variants, each of which has shards and the scores of one network per seed."""
    images = scores[INITIAL][0]
    return ArchiveResult(
        archive=name,
        images=len(images.rows),
        patients=len(set(images.patients.tolist())),
        variants=tuple(classifiers.result(variant, of) for variant, of in scores.items()),
        lung_iou=study.lung_overlap(data),
        whole={variant: study.stored_whole(uri) for variant, uri in data.items()},
    )


def write(results: Sequence[ArchiveResult], seeds: int, out: str) -> dict[str, Any]:
    """Print the table; write table.md, variants.csv and auroc.png into `out`; metrics and URIs."""
    print(f"{study.table(results)}{study.summary(results, seeds)}", flush=True)
    page = study.page(results, seeds)
    files = write_files(out, page, ("variants.csv", study.csv(results)), ("auroc.png", study.picture(results)))
    return {"metrics": study.metrics(results), **files}
