"""What the studies share: ground truth of held-out images, and checks before training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cxr import schema
from cxr.cli.study_networks import check_names, known_test_labels, labeled_images
from cxr.errors import UserError
from cxr.families.classify import ClassifyRecipe
from tests.made_shards import write_shards

FINDINGS = ("Mass",)


def known(split: str, number: int) -> Mapping[str, object]:
    """Only validation images have both classes."""
    positive = number % 2 if split == "val" else 1
    return {schema.LABELS: [positive]}


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return write_shards(tmp_path / "shards", {"train": 4, "val": 4, "test": 4}, known=known, findings=FINDINGS)


def test_validation_images_stand_in_for_test_images_and_a_note_says_so(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    split, truth = labeled_images(shards, ClassifyRecipe())
    assert (split, len(truth.labels)) == ("val", 4)
    assert "no test image has labels: networks are compared on validation images" in capsys.readouterr().out
    with pytest.raises(UserError, match="with folds, networks are trained on validation images"):
        labeled_images(shards, ClassifyRecipe(folds=4))


def test_test_images_need_labels_of_both_classes(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a finding with positive and negative test images, got none"):
        known_test_labels(shards)
    untested = write_shards(tmp_path / "untested", {"train": 4, "val": 4}, known=known, findings=FINDINGS)
    with pytest.raises(UserError, match="expected images in the test split, got none"):
        known_test_labels(untested)


def test_names_are_known_and_given_once() -> None:
    check_names("--networks", ("a",), ("a", "b"))
    with pytest.raises(UserError, match="--networks: expected some of a, b, got c: use these names"):
        check_names("--networks", ("a", "c"), ("a", "b"))
    with pytest.raises(UserError, match="--networks: expected each value once, got a a: omit repeated ones"):
        check_names("--networks", ("a", "a"), ("a", "b"))
