"""The align family: settings, loss terms, targets, metrics, one small training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr import schema
from cxr.augment.affine_exposure import random_affine
from cxr.data.batch import NO_MASK, Batch
from cxr.errors import UserError
from cxr.families import lung_pretraining, recipe_from_dict
from cxr.families.align import WARPS, AlignRecipe, AlignTask
from cxr.families.align_target import lung_crops
from cxr.families.base import Recipe, SingleProcess, Stage, unit_pixels
from cxr.families.presets import preset
from cxr.models.backbones import normalize_contrast
from cxr.models.small_unet import LungField
from cxr.models.spatial_transformer import identity, invert, warp

SIZE, STORED = 32, 64


def posed_batch(count: int = 8, seed: int = 0) -> Batch:
    """One body with two dark lungs under random known poses."""
    body, lungs = torch.zeros(1, 1, STORED, STORED), torch.zeros(1, 1, STORED, STORED)
    body[..., 6:58, 8:56] = 0.8
    lungs[..., 14:44, 14:28] = lungs[..., 14:46, 36:50] = 1
    pose = random_affine(count, rotation_deg=10, generator=torch.Generator().manual_seed(seed))
    seen = [warp(x.expand(count, -1, -1, -1), invert(pose))[:, 0] for x in (body - 0.6 * lungs, lungs)]
    return {
        schema.PIXELS: (255 * F.relu(seen[0])).to(torch.uint8),
        schema.MASKS: (seen[1] > 0.5).to(torch.uint8),
        schema.TRUE_THETA: pose.reshape(count, 6),
    }


def small(**changes: Any) -> AlignRecipe:
    """Compares images only, with all loss terms, unless changed."""
    every = {f"{name}_weight": 1.0 for name in ("pixel", "feature", "structure")}
    return AlignRecipe(size=SIZE, backbone="conv3", feature_layers=2, lungs=False, **every).replace(**changes)


def started(recipe: AlignRecipe, batch: Batch, seed: int = 0) -> AlignTask:
    torch.manual_seed(seed)
    task = recipe.task(recipe.network([]))
    task.begin(lambda: iter([batch]), SingleProcess())
    return task


def terms(task: AlignTask, batch: Batch, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    return {name: value.item() for name, value in task(task.augment(batch)).items()}


def halves(batch: Batch) -> Iterator[Batch]:
    middle = len(batch[schema.PIXELS]) // 2
    for part in (slice(None, middle), slice(middle, None)):
        yield {name: values[part] for name, values in batch.items()}


def test_recipes_survive_json() -> None:
    recipe = small(parameterization="affine", feature_network="vgg16", feature_layers=4, target="mean")
    again = recipe_from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert isinstance(again, Recipe)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameterization": "projective"},
        {"backbone": "conv33"},
        {"target": "median"},
        {"feature_network": "vgg"},
        {"feature_layers": 5},
        {"feature_network": "lungs", "feature_pretrained": "IMAGENET1K_V1"},
        {"first_feature_layer": 4},
        {"backbone_pretrained": "IMAGENET1K_V1"},
        {"output_width": -1},
        {"gamma": 0.5},
        {"lung_steps": 0},
        {"lung_pretrained": "phantom"},
        {"pixel_weight": -1.0},
        {"iterations": 0},
        {f"{name}_weight": 0.0 for name in ("overlap", "pixel", "feature", "structure", "equivariance", "identity")},
    ],
)
def test_invalid_settings_are_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|wanted"):
        small(**changes)


def test_all_values_of_the_search_space_are_valid() -> None:
    import optuna

    recipe = small()
    for number in range(20):
        drawn = {
            name: optuna.create_trial(params={name: value}, distributions={name: distribution}, value=number).params[
                name
            ]
            for name, distribution in recipe.search_space().items()
            for value in [_some_value(distribution, number)]
        }
        assert recipe.replace(**drawn).to_dict() != recipe.to_dict()


def _some_value(distribution: Any, number: int) -> Any:
    choices = getattr(distribution, "choices", None) or [distribution.low, distribution.high]
    return choices[number % len(choices)]


def test_weights_scale_their_terms_and_zero_omits_them() -> None:
    batch = posed_batch()
    plain = terms(started(small(), batch), batch)
    heavy = terms(started(small(structure_weight=3.0), batch), batch)
    assert heavy["structure"] == pytest.approx(3 * plain["structure"] / small().structure_weight, rel=1e-5)
    assert heavy["equivariance"] == pytest.approx(plain["equivariance"], rel=1e-5)
    lean = terms(started(small(feature_weight=0.0, pixel_weight=0.0), batch), batch)
    assert set(lean) == {"structure", "equivariance", "identity"}


def test_more_feature_layers_change_only_the_feature_term() -> None:
    batch = posed_batch()
    one, two = (terms(started(small(feature_layers=n), batch), batch) for n in (1, 2))
    assert one["feature"] != pytest.approx(two["feature"], rel=1e-2)
    assert one["pixel"] == pytest.approx(two["pixel"], rel=1e-5)


def test_terms_are_finite_float32_scalars_under_autocast() -> None:
    batch = posed_batch()
    task = started(small(), batch)
    augmented = task.augment(batch)
    with torch.autocast("cpu", torch.bfloat16):
        values = task(augmented)
    assert {(v.dtype, v.shape) for v in values.values()} == {(torch.float32, torch.Size())}
    sum(values.values(), torch.zeros(())).backward()
    gradients = [p.grad for p in task.network.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)


def published(**changes: Any) -> AlignRecipe:
    """The preset on small images, without weights."""
    tiny = {"size": SIZE, "output_width": 48, "backbone_pretrained": "", "feature_network": "local"}
    return preset(AlignRecipe, "published").replace(**tiny, first_feature_layer=1, **changes)


def test_the_published_loss_is_the_mean_of_the_pixel_and_feature_terms() -> None:
    batch = posed_batch()
    task = started(published(max_zoom=1.0, rotation_deg=0.0, translate=0.0, target="mean"), batch)
    z = normalize_contrast(unit_pixels(batch, SIZE))
    aligned = warp(z, identity(), (SIZE, 48))  # an untrained network moves nothing
    layers = zip(task.features(aligned), task.features(task.target), strict=True)
    expected = [15 * (aligned - task.target).square().mean(), *((a - b).square().mean() for a, b in layers)]
    found = terms(task, batch)
    assert set(found) == {"pixel", "feature"}
    assert len(expected) == 5
    assert sum(found.values()) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_the_published_network_and_its_output() -> None:
    recipe, batch = published(), posed_batch(2)
    task = started(recipe, batch)
    sizes = [tuple(p.shape) for name, p in task.network.named_parameters() if "mix" in name or "head" in name]
    assert sizes == [(256, 512), (256,), (5, 256), (5,)]
    assert task.target.shape == (1, 1, SIZE, 48)
    assert recipe.render(task.network.eval(), batch)["aligned"].shape == (2, STORED, STORED * 48 // SIZE)
    assert len(task.augment(batch)[WARPS]) == 2  # each image is warped once


def test_the_learning_rate_of_the_published_preset_falls_linearly() -> None:
    recipe = published()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = recipe.make_schedule(optimizer, Stage("", 2, recipe.lr), updates_per_epoch=5)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-4 * (1 - update / 10) for update in range(10)])


def test_lung_crops_enclose_the_lungs_and_leave_images_without_lungs() -> None:
    batch = posed_batch(3)
    lungs = F.interpolate(batch[schema.MASKS][:, None].float(), (SIZE, SIZE), mode="area")
    lungs[2] = 0
    theta = lung_crops(Found(lungs), unit_pixels(batch, SIZE))  # pyright: ignore[reportArgumentType]
    cropped = warp(lungs, theta)
    assert (cropped.sum((1, 2, 3)) * torch.linalg.det(theta[..., :2]))[:2] == pytest.approx(
        lungs.sum((1, 2, 3))[:2], rel=0.05
    )
    assert (cropped[:2, 0].amax((1, 2)) > 0.5).all()
    assert (torch.linalg.det(theta[:2, :, :2]) < 0.9).all()
    assert torch.equal(theta[2], identity()[0])


def test_only_the_structure_target_is_updated() -> None:
    batch = posed_batch(32)
    for strategy, moves in (("structure", True), ("mean", False), ("lung_crops", False), ("features", False)):
        task = started(small(target=strategy), batch)
        before = {name: values.clone() for name, values in task.named_buffers(recurse=False)}
        terms(task, batch)
        task.end_epoch(SingleProcess())
        assert (not torch.equal(before["target"], task.target)) is moves
        assert task.target.isfinite().all()
        assert len(before) - len(task.epoch_sums()) == (4 if strategy == "features" else 2)


def test_mean_of_features_is_not_the_features_of_the_mean() -> None:
    batch = posed_batch(16)
    mean, features = (terms(started(small(target=t), batch), batch) for t in ("mean", "features"))
    assert mean["pixel"] == pytest.approx(features["pixel"], rel=1e-5)
    assert mean["feature"] != pytest.approx(features["feature"], rel=1e-2)


def test_a_common_zoom_does_not_move_the_structure_target() -> None:
    batch = posed_batch(32)
    task, zoomed = (started(small(rotation_deg=0.0, max_zoom=1.0, translate=0.0), batch) for _ in range(2))
    with torch.no_grad():
        zoomed.network.head.bias[3:5] = -0.5  # pyright: ignore
    for t in (task, zoomed):
        terms(t, batch)
        t.end_epoch(SingleProcess())
    inner = (slice(None), slice(None), slice(12, 20), slice(12, 20))  # what both have seen
    correlation = torch.corrcoef(torch.stack([t.target[inner].flatten() for t in (task, zoomed)]))[0, 1]
    assert correlation > 0.9


class Perfect(torch.nn.Module):
    """Knows the poses of one batch of stored images, in order."""

    def __init__(self, pose: Tensor) -> None:
        super().__init__()
        self.pose, self.calls, self.lungs = pose, 0, None

    def forward(self, x_B1HW: Tensor) -> Tensor:
        start = self.calls % len(self.pose)
        self.calls += len(x_B1HW)
        return self.pose[start : start + len(x_B1HW)]


def test_metrics_of_a_perfect_and_of_an_untrained_aligner() -> None:
    batch = posed_batch(16)
    task = started(small(rotation_deg=0.0, max_zoom=1.0, translate=0.0), batch)
    untrained = task.eval().evaluate(lambda: iter([batch]), SingleProcess())
    task.network = Perfect(batch[schema.TRUE_THETA].reshape(-1, 2, 3))
    perfect = task.evaluate(lambda: iter([batch]), SingleProcess())
    assert perfect["corner_error_pct"] < 0.01
    assert untrained["corner_error_pct"] == pytest.approx(untrained["corner_error_before_pct"], rel=1e-4)
    assert perfect["corner_error_before_pct"] > 3
    assert perfect["mask_iou"] > 0.85 > 0.7 > perfect["mask_iou_before"]
    assert perfect["group_correlation"] > 0.9 > 0.8 > perfect["group_correlation_before"]
    assert perfect["pixel_std"] < 0.5 * perfect["pixel_std_before"]
    assert perfect["equivariance_error_pct"] < 0.01
    assert perfect["mirrored"] == 0
    assert small().degenerate_reason(perfect) == small().degenerate_reason(untrained) == ""


def test_images_without_mask_or_pose_are_excluded_only_from_metrics_that_need_them() -> None:
    batch = posed_batch(8)
    task = started(small(), batch).eval()
    whole = task.evaluate(lambda: iter([batch]), SingleProcess())
    batch[schema.MASKS][4:] = NO_MASK
    batch[schema.TRUE_THETA][4:] = float("nan")
    partly = task.evaluate(lambda: iter([batch]), SingleProcess())
    assert partly["group_correlation"] == whole["group_correlation"]
    assert partly["mask_iou_before"] != whole["mask_iou_before"]
    assert partly["corner_error_pct"] != whole["corner_error_pct"]
    bare = task.evaluate(lambda: iter([{schema.PIXELS: batch[schema.PIXELS]}]), SingleProcess())
    assert not [name for name in bare if name.startswith(("mask_iou", "corner"))]


def test_batching_does_not_change_the_metrics() -> None:
    batch = posed_batch(8)
    task = started(small(), batch).eval()
    with torch.no_grad():
        task.network.head.weight.normal_(std=0.05)  # pyright: ignore
    one = task.evaluate(lambda: iter([batch]), SingleProcess())
    two = task.evaluate(lambda: halves(batch), SingleProcess())
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_scores_are_six_numbers_that_undo_the_pose() -> None:
    recipe, batch = small(), posed_batch(3)
    network = recipe.network([]).eval()
    scores = recipe.predict(network, batch)[schema.THETA]
    torch.testing.assert_close(scores, identity(3).reshape(3, 6))
    assert recipe.score_columns.field(schema.THETA).type == pa.list_(pa.float32(), 6)
    drawn = recipe.render(network, batch)["aligned"]
    assert drawn.dtype == torch.uint8
    assert (drawn.int() - batch[schema.PIXELS].int()).abs().max() <= 1


def test_pictures_are_written_and_the_target_can_be_reused(tmp_path: Path) -> None:
    batch = posed_batch()
    task = started(small(), batch)
    task.save_pictures(lambda: iter([batch]), tmp_path, list("abcdefgh"))
    assert {p.name for p in tmp_path.iterdir()} == {
        "before_after.png",
        "mean_before_after.png",
        "target.png",
        "target.pt",
    }
    again = started(small(target_uri=str(tmp_path / "target.pt")), posed_batch(seed=9))
    torch.testing.assert_close(again.target, task.target)
    terms(again, batch)
    again.end_epoch(SingleProcess())
    torch.testing.assert_close(again.target, task.target)


def test_other_files_are_rejected_as_targets(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "target.pt")
    with pytest.raises(UserError, match="expected a target"):
        started(small(target_uri=str(tmp_path / "target.pt")), posed_batch())


def test_default_feature_weights_fall_back_to_local_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(network: str, name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("cxr.models.pretrained.from_torchvision", unreachable)
    given = small(feature_network="densenet121", feature_layers=5)
    resolved, notes = given.resolve_weights(str(tmp_path))
    assert (resolved.feature_network, resolved.feature_layers) == ("local", 4)
    assert "densenet121" in notes[0]
    assert "no route to host" in notes[0]
    with pytest.raises(UserError, match=r"IMAGENET1K_V1 weights for densenet121 could not be fetched \(no route"):
        given.replace(feature_pretrained="IMAGENET1K_V1").resolve_weights(str(tmp_path))


def test_an_aligners_checkpoint_can_be_the_feature_network(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = small(lungs=True).network([]).state_dict()
    torch.save(state, tmp_path / "aligner.pt")
    recipe, notes = small(feature_network="lungs", feature_pretrained=str(tmp_path / "aligner.pt")).resolve_weights(
        str(tmp_path / "out")
    )
    assert "tensors loaded" in notes[0]
    features = recipe.task(recipe.network([])).features.state_dict()
    assert any(torch.equal(values, state["lungs.down.1.0.weight"]) for values in features.values())
    batch = posed_batch()
    assert terms(started(recipe, batch), batch)["feature"] > 0


@pytest.mark.slow
def test_a_short_training_lowers_the_loss_and_the_pose_errors() -> None:
    batch = posed_batch(16)
    task = started(small(lr=3e-3), batch)
    before = task.eval().evaluate(lambda: iter([batch]), SingleProcess())
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=3e-3)
    losses = []
    for step in range(80):
        task.train()
        loss = sum(task(task.augment(batch)).values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            task.end_epoch(SingleProcess())
    after = task.eval().evaluate(lambda: iter([batch]), SingleProcess())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert after["corner_error_pct"] < 0.7 * before["corner_error_pct"]
    assert after["equivariance_error_pct"] < before["equivariance_error_pct"]
    assert after["group_correlation"] > before["group_correlation"] + 0.02


def test_lungs_are_trained_once_and_then_guide_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lung_pretraining, "train", lambda training, device: (LungField(), {"dice": 0.9}))
    asked = small(lungs=True, lung_pretrained="train")
    recipe = asked.pretrain_shared(str(tmp_path))
    weights = Path(recipe.lung_pretrained)
    made = weights.stat().st_mtime_ns
    assert asked.pretrain_shared(str(tmp_path)) == recipe
    assert weights.stat().st_mtime_ns == made
    other = asked.replace(lung_steps=7).pretrain_shared(str(tmp_path))
    assert other.lung_pretrained != recipe.lung_pretrained
    assert weights.stat().st_mtime_ns == made
    assert recipe.changes_from(recipe.replace(lung_pretrained="/elsewhere").to_dict()) == []
    batch = posed_batch()
    task = started(recipe, batch)
    assert terms(task, batch)["overlap"] > 0
    task.end_epoch(SingleProcess())
    assert 0 < task.lung_target.mean() < 1
    assert not [name for name, p in task.network.named_parameters() if name.startswith("lungs.") and p.requires_grad]


def test_the_shipped_lung_network_is_the_default(tmp_path: Path) -> None:
    recipe = small(lungs=True)
    assert recipe.pretrain_shared(str(tmp_path)) is recipe
    assert recipe.resolve_weights(str(tmp_path)) == (recipe, [])
    task, shipped = started(recipe, posed_batch()), lung_pretraining.load_weights(lung_pretraining.SHIPPED)
    own = task.network.state_dict()
    assert all(torch.equal(own[f"lungs.{name}"], values) for name, values in shipped.items())


def test_a_lung_network_that_has_not_been_trained_is_rejected() -> None:
    with pytest.raises(UserError, match="got 'train'"):
        started(small(lungs=True, lung_pretrained="train"), posed_batch())


def test_weights_without_a_lung_network_are_rejected(tmp_path: Path) -> None:
    torch.save(small().network([]).state_dict(), tmp_path / "aligner.pt")
    with pytest.raises(UserError, match=r"does not fit: they have none of the .* tensors of a lung network"):
        small(lungs=True, lung_pretrained=str(tmp_path / "aligner.pt")).resolve_weights(str(tmp_path / "out"))


def test_pairwise_lung_iou_compares_predicted_lungs() -> None:
    batch = posed_batch(16)
    network = Perfect(batch[schema.TRUE_THETA].reshape(-1, 2, 3))
    network.lungs = Found(F.interpolate(batch[schema.MASKS][:, None].float(), (SIZE, SIZE)))
    task = started(small(rotation_deg=0.0, max_zoom=1.0, translate=0.0), batch).eval()
    task.network = network
    after = task.evaluate(lambda: iter([batch]), SingleProcess())
    network.pose = identity(16)
    before = task.evaluate(lambda: iter([batch]), SingleProcess())
    assert after["pairwise_lung_iou"] > 0.8 > 0.7 > before["pairwise_lung_iou"]
    task.recipe = task.recipe.replace(rotation_deg=15.0, max_zoom=1.25, translate=0.1)
    deaf = task.evaluate(lambda: iter([batch]), SingleProcess())
    assert deaf["pairwise_lung_iou"] < before["pairwise_lung_iou"] - 0.03


class Found(torch.nn.Module):
    """Knows the lungs of one batch."""

    def __init__(self, lungs: Tensor) -> None:
        super().__init__()
        self.found = lungs

    def forward(self, z_B1HW: Tensor) -> Tensor:
        return self.found


@pytest.mark.parametrize(
    ("bias", "reason"), [((0, 0, 0, -1.5, -1.5), "collapsed"), ((1.5, 0, 0, 0, 0), "drifted"), ((0,) * 5, "")]
)
def test_degenerate_solutions_are_rejected(bias: tuple[float, ...], reason: str) -> None:
    batch, recipe = posed_batch(), small(iterations=1)
    task = started(recipe, batch).eval()
    with torch.no_grad():
        task.network.head.bias.copy_(torch.tensor(bias))  # pyright: ignore
    refusal = recipe.degenerate_reason(task.evaluate(lambda: iter([batch]), SingleProcess()))
    assert refusal.startswith(reason)
    assert bool(refusal) == bool(reason)


def test_a_mirrored_solution_is_rejected() -> None:
    batch, recipe = posed_batch(), small()
    task = started(recipe, batch).eval()
    task.network = Perfect(identity(8) * torch.tensor([[-1.0], [1.0]]))
    assert recipe.degenerate_reason(task.evaluate(lambda: iter([batch]), SingleProcess())).startswith(
        "mirrored: 100%"
    )
