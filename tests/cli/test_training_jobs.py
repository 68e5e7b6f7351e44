"""Several archives as one, and a network for each fold: what can be seen before and after training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro

from cxr import storage
from cxr.cli import training_jobs
from cxr.cli.inputs import check_inputs
from cxr.cli.options import ArchiveOptions
from cxr.cli.plans import Capacity
from cxr.cli.search_jobs import tune_job
from cxr.cli.training_jobs import ensure_shards, resolve_environment, train_job
from cxr.data import shards
from cxr.data.ledger import LEDGER_FILE
from cxr.errors import UserError
from cxr.families import checkpoint_files
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import Recipe
from cxr.families.detect import DetectRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.models import pretrained
from cxr.models.classifier import Classifier
from cxr.phantom.nlm import write_masked_phantom
from cxr.phantom.siim import write_siim_phantom
from cxr.runtime.job import _outcome
from cxr.training.fit import Fitted, fit
from cxr.training.options import RunOptions, SearchOptions
from cxr.training.run_log import METRICS_FILE
from cxr.training.sweep import Trained
from tests.made_shards import write_shards

RECIPE = AlignRecipe(size=32, backbone="conv3", lungs=False)


@pytest.fixture
def two(tmp_path: Path) -> ArchiveOptions:
    """Two archives that are shards already, so that nothing needs a cluster."""
    given = [write_shards(tmp_path / name, {"train": 6, "val": 3}) for name in "ab"]
    return ArchiveOptions(archive=tuple(given), stored_size=32)


@pytest.fixture
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.runtime.cluster.connect", lambda: None)
    monkeypatch.setattr("cxr.cli.plans.Capacity.of", lambda options: Capacity(8, 0, "of a test"))
    monkeypatch.setattr("cxr.runtime.cluster.check_shared", lambda uri: None)
    monkeypatch.setattr("cxr.cli.training_jobs.room", lambda *_, **__: 1)


def other(options: ArchiveOptions, **changes: Any) -> ArchiveOptions:
    return ArchiveOptions(**(vars(options) | changes))


def test_archives_are_given_in_repeated_options() -> None:
    options = tyro.cli(ArchiveOptions, args=["--archive", "/a", "--archive", "/b"])
    assert options.archive == ("/a", "/b")
    assert tyro.cli(ArchiveOptions, args=[]).archive == ()


@pytest.mark.usefixtures("_no_cluster")
def test_several_archives_make_one_set_of_shards_and_must_stay_the_same(two: ArchiveOptions, tmp_path: Path) -> None:
    inputs = check_inputs(RECIPE, two, str(tmp_path / "out"))
    out = inputs.out
    assert inputs.images == 12
    data = ensure_shards(two, out)
    assert data == f"{out}/shards"
    assert shards.read_info(data).rows("train") == 12
    check_inputs(RECIPE, two, out)
    assert ensure_shards(two, out) == data
    for archives in (two.archive[::-1], two.archive[:1], ()):
        with pytest.raises(UserError, match=rf"contains shards of .*/a and .*/b, not of {'(.*/b|phan)|.*/a:'}"):
            check_inputs(RECIPE, other(two, archive=archives), out)


def test_incompatible_archives_are_rejected_before_anything_is_written(two: ArchiveOptions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options in (other(two, stream=True), other(two, archive=two.archive[:1] * 2)):
        with pytest.raises(UserError, match="Use each archive once, and omit --stream"):
            check_inputs(RECIPE, options, str(out))
    raw = str(tmp_path / "raw")
    write_masked_phantom(raw, 4, "montgomery", size=64)
    classifier = AecnnRecipe(size=32, patch=32, backbone="resnet18")
    with pytest.raises(UserError, match="raw has no labels, but family aecnn learns from labels"):
        check_inputs(classifier, other(two, archive=(two.archive[0], raw)), str(out))
    about = storage.read_json(f"{two.archive[1]}/{shards.ARCHIVE_FILE}")
    storage.write_json(f"{two.archive[1]}/{shards.ARCHIVE_FILE}", about | {"findings": ["Mass"]})
    check_inputs(classifier, two, str(out))  # labels of other findings are unknown
    with pytest.raises(
        UserError, match=r"expected the same findings in combined archives, got .*Hernia.* and .*Mass"
    ):
        check_inputs(DetectRecipe(size=32), two, str(out))
    with pytest.raises(UserError, match="expected the same pixels"):
        check_inputs(RECIPE, other(two, archive=(two.archive[0], raw), stored_size=64), str(out))
    with pytest.raises(UserError, match="expected stored images of at least size=32 px"):
        check_inputs(RECIPE, other(two, archive=(two.archive[0], raw), stored_size=16), str(out))
    assert not out.exists()


def test_shards_of_one_archive_are_not_reused_for_several(two: ArchiveOptions, tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "out" / "shards" / LEDGER_FILE), {})
    with pytest.raises(UserError, match=r"contains shards of one archive, not of .*/a and .*/b"):
        check_inputs(RECIPE, two, str(tmp_path / "out"))


def test_streams_reject_settings_that_need_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the phantom archive is not shards, but folds require"):
        check_inputs(RECIPE.replace(folds=3, fold=0), ArchiveOptions(stream=True), str(tmp_path))
    with pytest.raises(UserError, match="folds=3 without fold"):
        check_inputs(RECIPE.replace(folds=3), ArchiveOptions(), str(tmp_path))


def test_ray_data_is_not_given_folds(tmp_path: Path) -> None:
    for recipe in (RECIPE.replace(folds=3), RECIPE.replace(folds=3, fold=0)):
        with pytest.raises(UserError, match=r"--shard-reader ray: folds are not available.* Use --shard-reader own"):
            train_job(recipe, ArchiveOptions(), RunOptions(shard_reader="ray"), str(tmp_path / "out"))


@pytest.mark.usefixtures("_no_cluster")
def test_folds_of_which_none_is_named_are_all_trained(
    two: ArchiveOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(recipes: Any, seeds: Any, archive: str, out: str, *_: Any, **__: Any) -> list[Trained]:
        assert [(name, one.folds, one.fold) for name, one in recipes.items()] == [("fold-0", 2, 0), ("fold-1", 2, 1)]
        assert tuple(seeds) == (7,)
        made = [Trained(name, 7, f"{out}/{name}/checkpoint") for name in recipes]
        for one, value in zip(made, (0.5, 0.7), strict=True):
            about = {
                "kind": checkpoint_files.KIND,
                "version": checkpoint_files.VERSION,
                "metrics": {"pairwise_lung_iou": value},
            }
            storage.write_json(f"{one.checkpoint}/{checkpoint_files.ABOUT}", about)
        return made

    monkeypatch.setattr(training_jobs, "train_all", trained)
    out = str(tmp_path / "out")
    result = train_job(RECIPE.replace(folds=2, seed=7), two, RunOptions(), out)
    assert result["metrics"] == pytest.approx({"pairwise_lung_iou": 0.6, "pairwise_lung_iou_sd": 0.02**0.5})
    assert [(one["fold"], one["metrics"]["pairwise_lung_iou"]) for one in result["folds"]] == [(0, 0.5), (1, 0.7)]
    assert result["data"] == f"{out}/shards"
    assert "0.6 ± 0.1414" in capsys.readouterr().out


@pytest.fixture
def _no_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(network: str, name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("cxr.models.pretrained.from_torchvision", unreachable)


FROZEN = PneumothoraxRecipe(size=32, backbone="resnet18", backbone_pretrained="IMAGENET1K_V1", freeze_backbone=True)


@pytest.mark.usefixtures("_no_cluster", "_no_internet")
def test_named_weights_that_cannot_be_fetched_end_a_job_with_2_before_an_image_is_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out = str(tmp_path / "raw"), tmp_path / "out"
    write_siim_phantom(archive, 12, size=64)
    options = SimpleNamespace(out=str(out))
    data = ArchiveOptions(archive=(archive,), stored_size=32)
    for main in (
        lambda _: train_job(FROZEN, data, RunOptions(), str(out)),
        lambda _: train_job(FROZEN.replace(folds=2), data, RunOptions(), str(out)),
        lambda _: tune_job(FROZEN, data, SearchOptions(), RunOptions(), str(out)),
    ):
        code, said = _outcome(main, options, "some job")
        assert code == 2
        assert "backbone_pretrained=IMAGENET1K_V1: " in said
        assert "\n" not in said
    assert not list(out.glob("**/*"))


@pytest.mark.usefixtures("_no_cluster", "_no_internet")
def test_the_result_says_what_training_started_from(
    two: ArchiveOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_jobs, "fit", lambda *_, **__: Fitted("checkpoint", {}, 1))
    monkeypatch.setattr(training_jobs, "picture", lambda *_: [])
    given = AecnnRecipe(size=32, patch=32, backbone="resnet18", backbone_pretrained="auto")
    result = train_job(given, two, RunOptions(), str(tmp_path / "auto"))
    assert result["initial_weights"] == {"start_from": None, "backbone_pretrained": None}
    assert result["recipe"]["backbone_pretrained"] == ""
    torch.save(Classifier("resnet18", 3).body.state_dict(), tmp_path / "mine.pt")
    result = train_job(
        given.replace(backbone_pretrained=str(tmp_path / "mine.pt")), two, RunOptions(), str(tmp_path / "mine")
    )
    assert result["initial_weights"]["backbone_pretrained"]["given"] == str(tmp_path / "mine.pt")


def test_fit_rejects_unresolved_weights(two: ArchiveOptions, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"backbone_pretrained: expected the URI of weights; call recipe.resolve_weights\(out\) before fit",
    ):
        fit(FROZEN, two.archive[0], str(tmp_path / "out"))


GONE = "/gone/weights.pt"


@pytest.mark.parametrize(
    ("given", "setting", "read"),
    [
        (AecnnRecipe(start_from=GONE), "start_from", {}),
        (AecnnRecipe(backbone_pretrained=GONE), "backbone_pretrained", {}),
        (
            PneumothoraxRecipe(architecture="fcn8s", backbone_pretrained=GONE, freeze_backbone=True),
            "backbone_pretrained",
            {},
        ),
        (AttendRecipe(aligner=GONE), "aligner", {"aligner_recipe": {"family": "align", "size": 64}}),
        (AlignRecipe(lungs=True, lung_pretrained=GONE), "lung_pretrained", {}),
    ],
)
def test_resuming_does_not_need_the_initial_weights(
    given: Recipe, setting: str, read: dict[str, Any], tmp_path: Path
) -> None:
    out = str(tmp_path)
    begun = given.replace(**read, **{setting: f"{out}/weights/{pretrained.key(GONE)}"})
    with pytest.raises(UserError, match="gone"):
        given.resolve_weights(out)
    with pytest.raises(UserError, match="gone"):
        resolve_environment(given, out, RunOptions(), resume=True)  # no checkpoint yet: training begins
    storage.write_text(f"{out}/{METRICS_FILE}", '{"epoch": 1, "checkpoint": "epoch_0001"}\n')
    about = {"kind": checkpoint_files.KIND, "version": checkpoint_files.VERSION, "recipe": begun.to_dict()}
    storage.write_json(f"{out}/train/epoch_0001/{checkpoint_files.ABOUT}", about)
    again = resolve_environment(given.replace(epochs=given.epochs + 1), out, RunOptions(), resume=True)
    assert again == begun.replace(epochs=given.epochs + 1)
