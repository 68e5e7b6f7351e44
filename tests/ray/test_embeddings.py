"""Scoring writes the embedding of each image exactly once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxr.data import embeddings
from cxr.errors import UserError
from cxr.families.align import AlignRecipe
from cxr.families.classify import ClassifyRecipe
from cxr.inference import score_increment
from cxr.inference.options import ScoreOptions
from cxr.inference.predictor import load
from cxr.inference.score import score
from tests.made_shards import write_shards
from tests.saved_checkpoint import save_untrained

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
OPTIONS = ScoreOptions(save_embeddings=True, workers=1)


def killed(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_died_ends_with_every_embedding_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_shards(tmp_path / "shards", {"train": 40, "val": 20}, size=32)
    base, out = save_untrained(tmp_path / "base", ClassifyRecipe(size=32)), str(tmp_path / "scores")
    monkeypatch.setattr(score_increment, "join_parts", killed)
    with pytest.raises(KeyboardInterrupt):
        score(made, base, out, OPTIONS)
    monkeypatch.undo()
    next(Path(out, "unfinished").iterdir()).unlink()  # as if the process had died before it wrote the scores
    score(made, base, out, OPTIONS)
    stored = embeddings.load(out)
    np.testing.assert_allclose(stored.vectors, load(base).embed(made), rtol=1e-2, atol=1e-3)
    assert stored.image_ids.to_pylist() == [f"train-{n:04d}.png" for n in range(40)] + [
        f"val-{n:04d}.png" for n in range(20)
    ]
    with pytest.raises(UserError, match="save_embeddings"):
        score(made, base, out, ScoreOptions())


def test_families_without_embeddings_are_rejected(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"train": 1, "val": 1}, size=32)
    aligner = save_untrained(tmp_path / "align", AlignRecipe(size=32, lungs=False))
    with pytest.raises(UserError, match="'align' has no embeddings"):
        score(made, aligner, str(tmp_path / "out"), OPTIONS)
