"""The model card of a checkpoint says what its checkpoint.json says, and nothing of the place of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr import schema, storage
from cxr.families import RECIPES, checkpoint, checkpoint_files
from cxr.families.base import Recipe
from cxr.families.classifier_base import ClassifierTask
from cxr.metrics.classification import choose_thresholds
from tests.families.test_recipes import SMALL

DATA = {"source": "chestxray14 + padchest", "images": {"train": 12345, "val": 678, "test": 90}, "rejects": 4}


def written(folder: Path, recipe: Recipe, **facts: Any) -> str:
    """The card of a checkpoint with these facts."""
    task = recipe.task(recipe.network(schema.FINDINGS))
    if isinstance(task, ClassifierTask):
        rng = np.random.default_rng(0)
        labels = (rng.random((400, len(schema.FINDINGS))) < np.linspace(0.05, 0.5, len(schema.FINDINGS))).astype(int)
        labels[:, 0] = 0
        chosen = choose_thresholds(rng.random(labels.shape), labels)
        task.chosen_thresholds = {"findings": list(schema.FINDINGS), **chosen.describe()}
    metrics = {recipe.monitor: 0.81234, "auroc/Hernia": float("nan")}
    checkpoint.save(
        folder, recipe, task, task.network.state_dict(), findings=schema.FINDINGS, metrics=metrics, **facts
    )
    return (folder / checkpoint_files.CARD).read_text()


def cells(card: str) -> list[list[str]]:
    """The cells of all tables, row by row."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_every_family_has_a_card(family: str, tmp_path: Path) -> None:
    recipe = SMALL[family]
    card, about = written(tmp_path, recipe, data=DATA), checkpoint_files.read_about(str(tmp_path))
    rows = cells(card)
    assert card.startswith(f"# Chest X-ray model of family `{family}`\n")
    for column in recipe.score_columns.names:
        assert any(row[0] == f"`{column}`" and row[1] for row in rows), f"{column} is not described"
    assert ["train", "12,345", "training"] in rows
    assert ["test", "90", "nothing"] in rows
    assert [f"`{recipe.monitor}`", "0.8123", "selected the epoch"] in rows
    assert ["`auroc/Hernia`", "not measured", ""] in rows
    assert ["size", f"{recipe.size} x {recipe.size} pixels"] in rows
    assert ["SHA-256 of the weights", f"`{about['sha256']}`"] in rows
    assert ["torch", about["versions"]["torch"]] in rows
    assert "X-rays in the layout of chestxray14 + padchest." in card
    assert "4 more images could not be used" in card
    assert "not a medical device" in card
    predicts_findings = schema.PROBABILITIES in recipe.score_columns.names
    assert ("Findings without labels in the training images" in card) == predicts_findings
    assert "AGPL-3.0" in card
    assert max(map(len, (line for line in card.splitlines() if line[:1] != "|"))) < 400


def test_thresholds_are_listed_with_the_images_that_chose_them(tmp_path: Path) -> None:
    card = written(tmp_path, SMALL["classify"], data=DATA)
    rows = {row[0]: row[1:] for row in cells(card) if row[0] in schema.FINDINGS}
    assert list(rows) == list(schema.FINDINGS)
    assert rows["Atelectasis"][1:3] == ["0", "400"]
    assert rows["Atelectasis"][3].startswith("not chosen")
    assert rows["Cardiomegaly"][3] == "uncertain: fewer than 50 images"
    assert rows["Hernia"][3] == ""
    assert float(rows["Hernia"][0]) == pytest.approx(
        checkpoint_files.read_about(str(tmp_path))["learned"]["thresholds"]["values"][-1], rel=1e-3
    )


def test_masks_have_a_rule(tmp_path: Path) -> None:
    assert "It is empty if fewer than 0.00% of the image's pixels" in written(tmp_path, SMALL["lungs"])


def test_unknown_data_and_folds_are_said(tmp_path: Path) -> None:
    assert "numbers of images are not recorded" in written(tmp_path / "a", SMALL["classify"])
    card = written(tmp_path / "b", SMALL["classify"].replace(folds=5, fold=2), data=DATA)
    assert "fold 2 of 5" in card


def test_paths_and_selections_stay_out(tmp_path: Path) -> None:
    recipe = SMALL["classify"].replace(
        backbone_pretrained="/home/someone/weights/densenet.safetensors", lung_crop="s3://clinic-7/lungs", lr=3e-4
    )
    card = written(tmp_path, recipe, data=DATA, reading={"select": "patient_id = 'Jane Doe'"})
    assert not [secret for secret in ("someone", "clinic-7", "Jane") if secret in card]
    assert ["`backbone_pretrained`", "densenet.safetensors"] in cells(card)
    assert ["`lr`", "0.0003"] in cells(card)
    assert ["lung crop", f"yes, with a margin of {recipe.lung_margin:g}"] in cells(card)
    assert "Only selected images" in card


def test_a_copy_for_scoring_has_the_card(tmp_path: Path) -> None:
    card = written(tmp_path / "from", SMALL["align"], data=DATA)
    copy = checkpoint_files.copy_for_scoring(str(tmp_path / "from"), str(tmp_path / "to"))
    assert storage.read_bytes(storage.join(copy, checkpoint_files.CARD)).decode() == card
