"""A tree of files becomes a manifest without labels."""

from __future__ import annotations

from pathlib import Path

from cxr import schema
from cxr.sources import folder


def _manifest(root: Path, *paths: str):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"?")
    return folder.manifest(str(root))


def test_manifest_schema_without_labels(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a.png", "b/c.dcm")
    assert manifest.table.schema.equals(schema.MANIFEST)
    assert manifest.table[schema.IMAGE_ID].to_pylist() == ["a.png", "b/c.dcm"]
    assert manifest.table[schema.LABELS].to_pylist() == [[], []]
    assert manifest.findings == ()
    assert manifest.boxes_frame_px is None


def test_the_first_of_several_folders_is_the_patient(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "p1/s1/a", "p1/s2/b", "p2/s1/series/c")
    assert manifest.table[schema.PATIENT_ID].to_pylist() == ["p1", "p1", "p2"]
    assert "the first folder counts as the patient: 3 images, 2 patients" in manifest.notes


def test_one_level_of_folders_does_not_identify_patients(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "normal/a.png", "normal/b.png", "c.png")
    assert manifest.table[schema.PATIENT_ID].to_pylist() == ["c.png", "normal/a.png", "normal/b.png"]


def test_splits_are_by_patient(tmp_path: Path) -> None:
    table = _manifest(tmp_path, *(f"p{n % 20}/s/{n}.png" for n in range(60))).table
    pairs = set(zip(table[schema.PATIENT_ID].to_pylist(), table[schema.SPLIT].to_pylist(), strict=True))
    assert len(pairs) == 20
    assert {split for _, split in pairs} >= {"train", "val"}
