"""The study of feature-level fusion: what is compared, with the networks' scores given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from cxr.cli import study_features as study
from cxr.cli.commands.study_features import Options, main
from cxr.cli.options import ArchiveOptions
from cxr.errors import UserError
from cxr.evaluation.run import Run
from cxr.families.classify import ClassifyRecipe
from cxr.training.sweep import Trained
from tests.benchmarks.study_jobs import only_named, without_checks
from tests.benchmarks.test_study_preprocessing import FINDINGS, classifier, known
from tests.made_shards import write_shards


def test_backbones_are_compared_with_their_mean_and_with_fused_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_shards(tmp_path / "shards", {"train": 12, "val": 6, "test": 60}, known=known, findings=FINDINGS)

    def scored(trained: Sequence[Trained], seed: int, data: str, split: str, out: str) -> dict[str, Run]:
        noise = {"small": 0.2, "timm-resnet18": 0.2, study.FUSED: 0.01}
        return {name: classifier(tmp_path / name / f"{seed}", of, seed + len(name)) for name, of in noise.items()}

    without_checks(monkeypatch)
    monkeypatch.setattr(study, "resolve_environment", lambda recipe, *_: recipe)
    monkeypatch.setattr(study, "train_all", only_named)
    monkeypatch.setattr(study, "_scored", scored)
    options = Options(
        out=str(tmp_path / "out"),
        backbones=("small", "timm:resnet18"),
        seeds=2,
        data=ArchiveOptions(archive=(made,)),
        recipe=ClassifyRecipe(size=32),
    )
    result = main(options)
    metrics = result["metrics"]
    alone = [metrics[f"{name} alone/mean_auroc"] for name in options.backbones]
    assert max(alone) < metrics[f"{study.ENSEMBLE}/mean_auroc"] < metrics[f"{study.FUSED}/mean_auroc"]
    assert metrics[f"{study.FUSED}/gain_low"] > 0
    assert len(result["checkpoints"]) == 4
    assert "60 test images of 30 patients, 2 findings, 2 seeds." in (tmp_path / "out" / "table.md").read_text()


def test_mistakes_are_reported_before_anything_starts() -> None:
    with pytest.raises(UserError, match="--backbones: expected 2 or more, got small"):
        main(Options(backbones=("small",)))
    with pytest.raises(UserError, match="--backbones: expected each value once, got small small"):
        main(Options(backbones=("small", "small")))
    with pytest.raises(UserError, match="--head: expected linear or mlp, whose features can be fused, got mil"):
        main(Options(recipe=ClassifyRecipe(head="mil")))
