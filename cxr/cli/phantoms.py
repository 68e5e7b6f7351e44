"""Synthetic archives for jobs that were given no archive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cxr import storage
from cxr.cli.options import ArchiveOptions
from cxr.phantom.archive import write_phantom
from cxr.phantom.siim import write_siim_phantom
from cxr.schema import FINDINGS
from cxr.sources import chestxray14, siim

BOXED = ("Cardiomegaly", "Effusion", "Mass", "Nodule", "Pneumothorax")  # findings of phantoms for boxes


def phantom_archive(
    out: str,
    count: int = 160,
    size: int = 256,
    findings: Sequence[str] = FINDINGS,
    prevalence: float = 0.5,
    pose: float = 1.0,
) -> str:
    """A small synthetic archive in OUT/phantoms, generated once, for a job without an archive."""
    uri = storage.join(out, "phantoms")
    if not chestxray14.detect(uri):
        print(f"no --archive given: generating {count} phantom X-rays in {uri}", flush=True)
        write_phantom(uri, count, size=size, findings=findings, prevalence=prevalence, pose=pose)
    return uri


def siim_phantoms(options: ArchiveOptions, out: str) -> ArchiveOptions:
    """The given archive, or one of phantoms with the prevalence of SIIM-ACR in OUT/phantoms, generated once."""
    if options.archive:
        return options
    uri = storage.join(storage.normalize(out), "phantoms")
    if not siim.detect(uri):
        print(f"no --archive given: generating {options.phantoms} phantom X-rays in {uri}", flush=True)
        write_siim_phantom(uri, options.phantoms, size=max(256, options.stored_size))
    return replace(options, archive=(uri,))


def phantoms_with_boxes(options: ArchiveOptions, out: str, findings: Sequence[str] = BOXED) -> ArchiveOptions:
    """The given archive, or one of phantoms in OUT/phantoms, generated once, of which most have large and small
    findings."""
    if options.archive:
        return options
    size = max(256, options.stored_size)
    return replace(options, archive=(phantom_archive(out, options.phantoms, size, findings, prevalence=0.7),))
