"""`cxr train classify --embeddings` and `cxr tune classify --embeddings`, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cxr import schema
from cxr.cli.commands import COMMANDS
from cxr.cli.head_jobs import head_recipe, train_head_job, tune_head_job
from cxr.cli.options import ArchiveOptions
from cxr.data import embeddings, shards
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.aecnn import AecnnRecipe
from cxr.families.capabilities import HeatMaps
from cxr.families.classify import ClassifyRecipe
from cxr.families.fused_features import FusedFeaturesRecipe
from cxr.inference.predictor import load
from cxr.training.options import SearchOptions
from tests.made_shards import write_shards
from tests.saved_checkpoint import save_untrained

FINDINGS = ("Mass", "Nodule")
BASE = ClassifyRecipe(size=32, tta_flip=True)
OTHER = ClassifyRecipe(size=24, input="inception")
MORE_TRAINING = ["--epochs", "3", "--batch-size", "8"]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """The embeddings that scoring would write for 60 images in shards, of which one was rejected."""
    known = lambda split, number: {schema.LABELS: [number % 2, number // 2 % 2]}  # noqa: E731
    made = write_shards(tmp_path / "shards", {"train": 40, "val": 20}, size=32, known=known, findings=FINDINGS)
    base = save_untrained(tmp_path / "base", BASE)
    files = [file for of_split in shards.read_info(made).parts.values() for file in of_split]
    rows = pa.concat_tables([shards.read_rows(file, embeddings.IDENTITY, FINDINGS) for file in files])
    folder, vectors = str(tmp_path / "run" / embeddings.FOLDER), load(base).embed(made)
    embeddings.write_part(folder, "scores/part-00000", rows.slice(1, 29), vectors[1:30])
    embeddings.write_part(folder, "scores/part-00001", rows.slice(30), vectors[30:])
    about = {"checkpoint": base, "sha256": checkpoint.load(base).about["sha256"], "archives": [made]}
    embeddings.finish(folder, ["scores/part-00000", "scores/part-00001"], about)
    return str(tmp_path / "run")


def parsed(name: str, *arguments: str) -> Any:
    return COMMANDS[name].load().parse(arguments).job


def test_a_head_on_embeddings_becomes_a_checkpoint_that_scores_images(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parsed("train classify", "--embeddings", run, "--out", str(tmp_path / "out"), *MORE_TRAINING)
    assert (options.recipe.epochs, options.recipe.batch_size, options.recipe.size) == (3, 8, 32)
    result = COMMANDS["train classify"].load().main(options)
    printed = capsys.readouterr().out
    assert "1 of 60 labeled images have no embedding" in printed
    assert "read 39 embeddings to train on and 20 to validate on" in printed
    assert set(result["metrics"]) == {"mean_auroc", "mean_ap", "findings_measured", "auroc/Mass", "auroc/Nodule"}

    trained, made = load(result["checkpoint"]), str(tmp_path / "shards")
    assert trained.findings == FINDINGS
    head = checkpoint.load(result["checkpoint"]).network.get_submodule("head")
    with torch.inference_mode():
        expected = head(torch.from_numpy(load(str(tmp_path / "base")).embed(made))).sigmoid().numpy()
    predicted = np.stack(trained.predict(made)[schema.PROBABILITIES].to_pylist())
    np.testing.assert_allclose(predicted, expected, atol=1e-5)
    assert np.ptp(predicted, axis=0).min() > 1e-3
    with pytest.raises(UserError, match="already contains a run"):
        COMMANDS["train classify"].load().main(options)


def test_features_of_several_networks_are_fused(run: str, tmp_path: Path) -> None:
    """One head on two backbones, of which the second sees smaller images with another normalization."""
    made, other = str(tmp_path / "shards"), save_untrained(tmp_path / "other", OTHER)
    files = [file for of_split in shards.read_info(made).parts.values() for file in of_split]
    rows = pa.concat_tables([shards.read_rows(file, embeddings.IDENTITY, FINDINGS) for file in files])
    folder = str(tmp_path / "second" / embeddings.FOLDER)
    order = np.arange(58)[::-1]  # in another order, and without the last two
    embeddings.write_part(folder, "scores/part-00000", rows.take(pa.array(order)), load(other).embed(made)[order])
    about = {"checkpoint": other, "sha256": checkpoint.load(other).about["sha256"], "archives": [made]}
    embeddings.finish(folder, ["scores/part-00000"], about)

    both = ("--embeddings", run, "--embeddings", str(tmp_path / "second"))
    options = parsed("train classify", *both, "--out", str(tmp_path / "out"), "--head", "mlp", *MORE_TRAINING)
    result = COMMANDS["train classify"].load().main(options)
    assert result["embeddings"] == [run, str(tmp_path / "second")]
    fused = checkpoint.load(result["checkpoint"])
    assert (fused.recipe.family, fused.recipe.size) == ("fused", 32)
    vectors = np.concatenate([load(uri).embed(made) for uri in (str(tmp_path / "base"), other)], 1)
    with torch.inference_mode():
        expected = fused.network.get_submodule("head")(torch.from_numpy(vectors)).sigmoid().numpy()
    scorer = load(result["checkpoint"])
    predicted = np.stack(scorer.predict(made)[schema.PROBABILITIES].to_pylist())
    np.testing.assert_allclose(predicted, expected, atol=1e-5)
    np.testing.assert_allclose(scorer.embed(made), vectors, atol=1e-5)
    assert set(fused.about["learned"]) == {"thresholds"}
    assert not isinstance(fused.recipe, HeatMaps)
    with pytest.raises(UserError, match="use each once"):
        head_recipe([run, run])


def test_networks_of_other_images_are_not_fused() -> None:
    with pytest.raises(UserError, match="different denoise"):
        FusedFeaturesRecipe.of([BASE, BASE.replace(denoise="median")])
    with pytest.raises(UserError, match="expected checkpoints of family classify, got aecnn"):
        FusedFeaturesRecipe.of([BASE, AecnnRecipe()])
    with pytest.raises(UserError, match="head=attention: expected linear or mlp"):
        FusedFeaturesRecipe.of([BASE, OTHER], "attention")


def test_a_search_on_embeddings_saves_the_best_head(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--trials", "5", "--frozen-params", "loss", *MORE_TRAINING)
    result = (
        COMMANDS["tune classify"]
        .load()
        .main(parsed("tune classify", "--embeddings", run, "--out", str(out), *arguments))
    )
    assert len((out / "trials.csv").read_text().splitlines()) == 6
    assert set(result["sampled"]) == {"lr", "weight_decay", "pos_weight_power", "head"}
    recipe = checkpoint.load(result["checkpoint"]).recipe
    assert isinstance(recipe, ClassifyRecipe)
    assert (recipe.lr, recipe.head) == (result["sampled"]["lr"], result["sampled"]["head"])
    assert (recipe.loss, recipe.tta_flip) == ("bce", False)


def test_mistakes_are_named(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, archive = str(tmp_path / "out"), ArchiveOptions()
    recipe = parsed("train classify", "--embeddings", run).recipe
    with pytest.raises(UserError, match="size was 32, is 16"):
        train_head_job(recipe.replace(size=16), [run], archive, out)
    other = write_shards(tmp_path / "val", {"val": 20}, size=32, findings=FINDINGS)
    with pytest.raises(UserError, match="got none in train"):
        train_head_job(recipe, [run], ArchiveOptions(archive=(other,)), out)
    unlabeled = write_shards(tmp_path / "unlabeled", {"train": 40, "val": 20}, size=32, findings=FINDINGS)
    with pytest.raises(UserError, match="expected a finding with positive and negative labels"):
        train_head_job(recipe, [run], ArchiveOptions(archive=(unlabeled,)), out)
    with pytest.raises(UserError, match="frozen_params=size: expected settings that a search of heads samples"):
        tune_head_job(recipe, [run], archive, SearchOptions(frozen_params=("size",)), out)
    save_untrained(tmp_path / "base", BASE.replace(head="attention"))
    with pytest.raises(UserError, match="has other weights"):
        train_head_job(recipe, [run], archive, out)
    for arguments in (["--embeddings", str(tmp_path)], ["--embeddings", run, "--preset", "demo"]):
        with pytest.raises(SystemExit) as ended:
            parsed("train classify", *arguments)
        assert ended.value.code == 2
    assert "got no embeddings/embeddings.json" in capsys.readouterr().err
