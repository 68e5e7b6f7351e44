"""Training and reading do not repeat who the patients are: not in logs, metrics, checkpoints, errors or file names.

Scores, exports and reports are in tests/inference/test_pseudonyms.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cxr import schema
from cxr.data.decode import make_rows
from cxr.families.align import AlignRecipe
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.sources.options import ReadOptions
from cxr.training.run_log import RunLog
from cxr.training.session import InProcessSession
from cxr.training.worker import train_in_process
from tests import planted
from tests.made_shards import write_shards


def who(split: str, number: int) -> Mapping[str, object]:
    """Identifiers of an image that name a patient."""
    return {
        schema.IMAGE_ID: f"Quokkasetonix^Walterstein/{split}{number}.dcm",
        schema.PATIENT_ID: f"MRN-77123-{number}",
        schema.SOURCE_URI: f"/archive/Axolotlmexicanum 19630402/Numbatfasciatus {split}{number}.dcm",
    }


@pytest.mark.slow
def test_what_a_training_writes_and_prints_names_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = AlignRecipe(size=32, backbone="conv3", batch_size=8, epochs=1, lungs=False, target="structure")
    shards, out = write_shards(tmp_path / "shards", {"train": 16, "val": 8}, known=who), str(tmp_path / "out")
    assert planted.leaks(tmp_path / "shards"), "the names are in the shards"
    config = {"recipe": recipe.to_dict(), "findings": list(schema.FINDINGS), "threads": 1, "compile": False}
    config |= {"data": {"shards": shards, "cache_bytes": 2**20}, "checkpoint_seconds": 0.0}
    log = RunLog(out, "train", recipe.monitor)
    train_in_process(config, InProcessSession(out, "train", recipe.monitor, recipe.mode, 2, [log]))
    written = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {".jsonl", ".json", ".safetensors", ".pt", ".md"} <= written
    assert planted.leaks(tmp_path / "out", text="".join(capfd.readouterr())) == []


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_why_images_cannot_be_read_names_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    count = planted.write_archive(tmp_path)
    manifest = open_manifest(str(tmp_path), ReadOptions(source="folder")).table
    rows = make_rows(manifest, PixelFormat(32))
    errors = [error for error in rows[schema.ERROR].to_pylist() if error]
    assert (rows.num_rows, len(errors)) == (count, len(planted.BROKEN) + 1)
    assert planted.leaks(text="\n".join([*errors, *capfd.readouterr()])) == []
