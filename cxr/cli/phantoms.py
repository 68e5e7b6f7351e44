"""Synthetic archives for jobs that were given no archive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cxr import storage
from cxr.cli.options import ArchiveOptions
from cxr.errors import UserError
from cxr.phantom.archive import check_settings, write_phantom
from cxr.phantom.siim import PREVALENCE, write_siim_phantom
from cxr.schema import FINDINGS
from cxr.sources import chestxray14, siim

PHANTOMS = "phantoms"  # folder in OUT; its settings are in OUT/phantoms.json
BOXED = ("Cardiomegaly", "Effusion", "Mass", "Nodule", "Pneumothorax")  # findings of phantoms for boxes


def some_phantoms(out: str, count: int = 160) -> str:
    """The phantoms in OUT/phantoms, whatever their settings, or else new ones, for a command without options for
    them."""
    uri = storage.join(out, PHANTOMS)
    return uri if chestxray14.detect(uri) else phantom_archive(out, count)


def phantom_archive(
    out: str,
    count: int = 160,
    size: int = 256,
    findings: Sequence[str] = FINDINGS,
    prevalence: float = 0.5,
    pose: float = 1.0,
) -> str:
    """A small synthetic archive in OUT/phantoms, generated once, for a job without an archive.

    Raises:
        UserError: a setting is out of range, or OUT/phantoms contains other phantoms.
    """
    check_settings(count, size, prevalence, pose)
    uri = storage.join(out, PHANTOMS)
    settings = {"count": count, "size": size, "findings": [*findings], "prevalence": prevalence, "pose": pose}
    _generate_once(uri, settings, write_phantom, chestxray14.detect)
    return uri


def siim_phantoms(options: ArchiveOptions, out: str) -> ArchiveOptions:
    """The given archive, or one of phantoms with the prevalence of SIIM-ACR in OUT/phantoms, generated once."""
    if options.archive:
        return options
    uri, size = storage.join(storage.normalize(out), PHANTOMS), max(256, options.stored_size)
    check_settings(options.phantoms, size, PREVALENCE, pose=1)
    _generate_once(uri, {"count": options.phantoms, "size": size}, write_siim_phantom, siim.detect)
    return replace(options, archive=(uri,))


def _generate_once(
    uri: str, settings: Mapping[str, Any], write: Callable[..., object], detect: Callable[[str], bool]
) -> None:
    """Write phantoms with these settings to `uri` unless an earlier call has. Before, the settings are stored beside
    it, so that an interrupted call can be repeated only with the same."""
    record = f"{uri}.json"
    before = storage.read_json(record) if storage.exists(record) else settings
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        differences = "; ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in changed)
        raise UserError(
            f"{uri} contains phantoms with other settings ({differences}): use another --out, or the same settings"
        )
    if not detect(uri):
        print(f"no --archive given: generating {settings['count']} phantom X-rays in {uri}", flush=True)
        storage.write_json(record, settings)
        write(uri, **settings)


def phantoms_with_boxes(
    options: ArchiveOptions, out: str, findings: Sequence[str] = BOXED, pose: float = 1.0
) -> ArchiveOptions:
    """The given archive, or one of phantoms in OUT/phantoms, generated once, of which most have large and small
    findings."""
    if options.archive:
        return options
    size = max(256, options.stored_size)
    return replace(options, archive=(phantom_archive(out, options.phantoms, size, findings, 0.7, pose),))
