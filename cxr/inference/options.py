"""Options of scoring and their checks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from cxr import storage
from cxr.errors import UserError, check_fraction, check_least
from cxr.runtime.deadline import parse_deadline
from cxr.sources.options import ReadOptions

Precision = Literal["auto", "float32", "bfloat16"]
TtaFlip = Literal["checkpoint", "on", "off"]
ScoredSplit = Literal["train", "val", "test", "all"]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How to score an archive."""

    reading: ReadOptions = field(default_factory=ReadOptions)
    split: ScoredSplit = "all"
    """Score only the images of this split."""
    workers: int | None = None
    """Number of parallel model replicas. Default: one per GPU, or half of the CPUs."""
    batch_size: int = 64
    """Number of images per forward pass. It is halved if a GPU has too little memory."""
    precision: Precision = "auto"
    """Precision of convolutions and matrix products. auto is bfloat16 on GPUs and float32 on CPUs, and does
    not change when a run is continued on other machines."""
    compile: bool = False
    """Compile the network with torch.compile. This takes a minute, and pays off on GPUs for large archives."""
    tta_flip: TtaFlip = "checkpoint"
    """Average predictions over each image and its mirror image, which takes twice as long: on, off, or as in the
    validation that chose the checkpoint's thresholds. For families classify, lungs and pneumothorax."""
    thresholds: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File or URI of decision thresholds that `cxr thresholds` wrote. They replace those of the checkpoint that they
    were chosen for, and reports and exports of the run use them. Repeat the option for several checkpoints."""
    save_images: bool = False
    """Also write pictures of the predictions. Their names are those of the images, followed by .png: for the family
    align, for example, the picture of a.png is OUT/aligned/a.png.png."""
    save_latents: bool = False
    """Also write OUT/latents, an archive of the compressed images, which can be scored like any other archive."""
    save_embeddings: bool = False
    """Also write OUT/embeddings with a vector per image, from which `cxr train classify --embeddings OUT` trains
    another classifier in seconds."""
    pseudonymize: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Replace ids of patients, studies, series and images, and paths, by pseudonyms in all results. The pseudonyms
    are keyed hashes; the secret key is in this file or URI and needs at least 16 bytes."""
    crosswalk: str = ""
    """Folder or URI in which to write the Parquet files that map pseudonyms to ids and paths. It must not be inside
    OUT. Default: the folder crosswalk beside the key."""
    max_rejects: float = 0.5
    """Fraction of unusable images above which the job fails, after it has scored all other images. With --new-only,
    the job fails only if at least 10 images are unusable."""
    new_only: bool = False
    """Score only images that are new or have changed since the previous runs with this --out, for example every
    night. If checkpoints or options have changed, all images are scored again. See docs/how-to/nightly.md."""
    until: Annotated[str, tyro.conf.arg(metavar="TIME")] = ""
    """Stop at this time, and leave the remaining images for the next run of the same command: a time of day such as
    06:00, or a date and time such as 2026-01-31T06:00. Local time unless it has an offset from UTC."""

    def __post_init__(self) -> None:
        check_least(self, workers=1, batch_size=1)
        check_fraction(self, "max_rejects")
        if self.until:
            parse_deadline(self.until, time.time())
        if self.new_only and (self.save_latents or self.save_embeddings):
            option = "--save-latents" if self.save_latents else "--save-embeddings"
            raise UserError(f"expected --new-only or {option}, got both: write them in a run without --new-only")


def check_archives(uris: Sequence[str], options: ScoreOptions) -> list[str]:
    """The archives' normalized URIs; raises UserError where several cannot be scored into one result."""
    archives = [storage.normalize(uri) for uri in uris]
    if len(set(archives)) < len(archives):
        (twice, _), *_ = Counter(archives).most_common()
        raise UserError(f"expected a different archive for each --archive, got {twice} twice: use it once")
    if len(archives) > 1 and options.save_latents:
        raise UserError(
            f"expected one --archive with --save-latents, got {len(archives)}: score each into an --out of its own"
        )
    return archives


def resolved(precision: Precision, device: str) -> Precision:
    """The precision of predictions on a type of device ("cuda", "cpu"): "auto" is bfloat16 on GPUs."""
    return ("bfloat16" if device == "cuda" else "float32") if precision == "auto" else precision
