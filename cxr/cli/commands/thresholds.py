"""Choose decision thresholds on the labels of your own images, for `cxr score --thresholds FILE`.

cxr thresholds --run runs/scores --archive /data/labeled --criterion sensitivity:0.95 --out runs/thresholds
cxr score --archive /data/new --checkpoint runs/classify/checkpoint --thresholds runs/thresholds/thresholds.json
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from cxr import storage
from cxr.cli.exports import show_notes
from cxr.errors import UserError
from cxr.evaluation.run import ReportOptions, Split, read_run
from cxr.metrics.bootstrap import RESAMPLES
from cxr.sources.options import Labeling, ReadOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    run: str = "runs/score"
    """OUT of `cxr score`: a folder, s3://bucket/prefix or gs://bucket/prefix."""
    member: str = ""
    """Name of the checkpoint, if the run has several."""
    archive: str = ""
    """Archive or shards with the labels: a folder or URI. Default: the archive that was scored."""
    criterion: str = "youden"
    """Which threshold to choose. youden: that with the largest sum of sensitivity and specificity; f1: with the
    largest F1; specificity:0.95: with the highest sensitivity at a specificity of at least .95; sensitivity:0.95:
    with the highest specificity at such a sensitivity; ppv:0.5: with the highest sensitivity at such a positive
    predictive value."""
    split: Split = "all"
    """Split on which to choose. A report on the same images would be too optimistic."""
    resamples: int = RESAMPLES
    """Number of bootstrap resamples of patients for confidence intervals."""
    seed: int = 0
    """Random seed of the bootstrap."""
    crosswalk: str = ""
    """Crosswalk of a run with --pseudonymize: a folder or URI, as for cxr score."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    labeling: Labeling = field(default_factory=Labeling)
    out: str = "runs/thresholds"
    """Folder or URI of the result: OUT/thresholds.json."""


def main(options: Options) -> dict[str, Any]:
    run = read_run(options.run, options.member)
    show_notes(run)

    from cxr.evaluation.reports import reading_of  # torch takes seconds to import
    from cxr.evaluation.thresholds import WHAT, choose, thresholds_file
    from cxr.families.thresholds_file import FILE, ThresholdsFile
    from cxr.metrics.classification import Criterion
    from cxr.reporting.thresholds import comparison_table

    try:
        criterion = Criterion.parse(options.criterion)
    except ValueError as error:
        raise UserError(f"--criterion: {error}") from error
    names = ("archive", "split", "resamples", "seed", "crosswalk", "reading", "labeling")
    report = ReportOptions(**{name: getattr(options, name) for name in names})
    chosen = choose(run, reading_of(run, report), criterion)
    uri = storage.join(storage.normalize(options.out), FILE)
    ThresholdsFile(**thresholds_file(run, criterion, chosen, options.split)).write(uri)
    print(f"Threshold: {WHAT.get(run.family, 'probability of the finding')}. Criterion: {criterion}.")
    print(comparison_table(chosen).markdown(), flush=True)
    print(f"thresholds: {uri}", flush=True)
    metrics = {f"threshold/{each.finding}": each.value for each in chosen if not math.isnan(each.value)}
    for share in ("sensitivity", "specificity", "ppv", "npv"):
        metrics |= {f"{share}/{each.finding}": getattr(each.point, share).value for each in chosen if not each.note}
    return {"thresholds": uri, "metrics": metrics}
