"""Multiscale CAM: convex stage weights, logits as combinations, maps that show objects at their positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cxr.models.classifier import Classifier, load_body
from cxr.models.input_contract import UNIT
from cxr.models.multiscale_cam import (
    BackboneStages,
    CamBackbone,
    MultiscaleCAM,
    Pooling,
    cell_centers,
    resampled,
)
from cxr.models.receptive_field import receptive_fields

FINDINGS = ("Mass", "Nodule", "Hernia")


def small(**given: object) -> MultiscaleCAM:
    torch.manual_seed(0)
    return MultiscaleCAM("small", FINDINGS, **given).eval()  # pyright: ignore[reportArgumentType]


def moved(network: MultiscaleCAM) -> MultiscaleCAM:
    """With stage weights that differ by stage and finding."""
    with torch.no_grad():
        network.stage_weight_logits.copy_(torch.randn_like(network.stage_weight_logits) / 5)
    return network


def test_stage_weights_are_convex_and_start_uniform() -> None:
    network = small()
    assert torch.allclose(network.stage_weights(), torch.full((4, 3), 0.25))
    weights = moved(network).stage_weights()
    assert (weights > 0).all()
    assert weights.std() > 0.05
    assert torch.allclose(weights.sum(0), torch.ones(3))


@pytest.mark.parametrize("pooling", ["mean", "max", "lse"])
def test_published_logits_are_the_sum_of_the_pooled_maps(pooling: Pooling) -> None:
    network, x = moved(small(pooling=pooling, combine_stages="logits")), torch.rand(2, 1, 64, 64)
    alpha, expected = network.stage_weights(), torch.zeros(2, 3)
    pools = {
        "mean": lambda cells: cells.mean(-1),
        "max": lambda cells: cells.max(-1).values,
        "lse": lambda cells: (6 * cells.double()).exp().mean(-1).log().float() / 6,
    }
    for stage, one in enumerate(network.maps(x)):
        for finding in range(3):
            expected[:, finding] += alpha[stage, finding] * pools[pooling](one[:, finding].flatten(1))
    assert torch.allclose(network(x), expected, atol=1e-5)


def test_adding_maps_or_logits_is_the_same_for_average_pooling() -> None:
    x = smooth(torch.rand(2, 1, 8, 8))
    maps, logits = (moved(small(pooling="mean", combine_stages=kind))(x) for kind in ("maps", "logits"))
    assert torch.allclose(maps, logits, atol=0.02)


def test_the_gradient_of_a_fine_map_is_where_the_coarse_maps_see_evidence() -> None:
    """Half of an image: with evidence there in the coarsest map, it gets nearly all of the finest map's gradient."""
    shares = {}
    for kind in ("maps", "logits"):
        network = small(combine_stages=kind, stage_weights="uniform")
        fine, coarse = torch.zeros(1, 3, 32, 32, requires_grad=True), torch.zeros(1, 3, 4, 4)
        coarse[..., :2, :] = 4.0
        network.logits([fine, torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 8, 8), coarse]).sum().backward()
        assert fine.grad is not None
        shares[kind] = (fine.grad[..., :12, :].sum() / fine.grad[..., 20:, :].sum()).item()
    assert shares["maps"] > 20
    assert shares["logits"] == pytest.approx(1)


def test_images_can_be_classified_without_the_last_stage() -> None:
    network, x, without = moved(small(combine_stages="maps")), torch.rand(2, 1, 64, 64), torch.tensor([True, False])
    maps = network.maps(x)
    logits = network.logits(maps, without)
    assert torch.allclose(logits[1], network(x)[1], atol=1e-6)
    assert not torch.allclose(logits[0], network(x)[0], atol=1e-3)
    maps[-1] = maps[-1] + torch.rand_like(maps[-1])
    changed = network.logits(maps, without)
    assert torch.equal(changed[0], logits[0])
    assert not torch.allclose(changed[1], logits[1], atol=1e-3)
    ones = [torch.ones_like(one) for one in maps]
    assert torch.allclose(network.logits(ones, without), torch.ones(2, 3), atol=1e-5)  # weights still add up to 1


def test_published_logits_and_single_stages_always_use_the_last_stage() -> None:
    x, without = torch.rand(2, 1, 64, 64), torch.tensor([True, False])
    for network in (small(combine_stages="logits"), small(combine_stages="maps", stages="last")):
        assert torch.equal(network(x, without), network(x))


def smooth(x: Tensor) -> Tensor:
    return nn.functional.interpolate(x, size=(128, 128), mode="bicubic")


def test_lse_lies_between_mean_and_maximum() -> None:
    x, found = torch.rand(2, 1, 64, 64), {}
    for name, given in {
        "mean": {"pooling": "mean"},
        "max": {"pooling": "max"},
        "low": {"lse_r": 1e-3},
        "mid": {},
    }.items():
        found[name] = small(**given)(x)
    assert torch.allclose(found["low"], found["mean"], atol=1e-2)
    assert ((found["mean"] < found["mid"]) & (found["mid"] < found["max"])).all()


def test_stage_weights_are_trained_only_with_several_stages_and_learned_weights() -> None:
    network = small()
    network(torch.rand(2, 1, 64, 64)).sum().backward()
    assert network.stage_weight_logits.grad is not None
    assert (network.stage_weight_logits.grad.abs().sum(0) > 0).all()
    for fixed in (small(stage_weights="uniform"), small(stages="last")):
        assert "stage_weight_logits" not in dict(fixed.named_parameters())
        fixed(torch.rand(2, 1, 64, 64)).sum().backward()
        assert all(p.grad is not None for p in fixed.parameters())  # DistributedDataParallel stops otherwise
    assert torch.equal(small(stage_weights="uniform").stage_weights(), torch.full((4, 3), 0.25))


def test_one_stage_is_cam() -> None:
    """Zhou et al. 2016: global average pooling and a linear layer; the map is the features weighted by that layer."""
    network, x = small(stages="last", pooling="mean"), torch.rand(2, 1, 64, 64)
    head = network.heads[0]
    assert isinstance(head, nn.Conv2d)
    assert head.bias is not None
    (features,) = network.trunk(x)
    linear = head.weight[:, :, 0, 0]
    assert torch.allclose(network(x), features.mean((2, 3)) @ linear.T + head.bias, atol=1e-5)
    cam = torch.einsum("bchw,fc->bfhw", features, linear) + head.bias[:, None, None]
    (seen,) = network.maps(x)
    assert torch.allclose(seen, cam, atol=1e-5)
    network.scale_maps(torch.full((1, 3), -1.0), torch.full((1, 3), 1.0))
    wanted = resampled(((cam + 1) / 2).clamp(0, 1), network.fields[0], cell_centers(64, 4, x.device))
    assert torch.allclose(network.attention([seen], 64, 4), wanted, atol=1e-5)


@pytest.mark.parametrize("backbone", ["small", "resnet18", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_a_blob_appears_at_its_position_in_the_map(backbone: CamBackbone) -> None:
    """A network that only averages: what each stage shows must have its middle where the blob has it."""
    trunk, size = averaging(BackboneStages(backbone)), 256
    axis = torch.arange(size) + 0.5
    for x, y in ((118.0, 140.0), (141.0, 119.0)):
        blob = torch.exp(-((axis[None] - x) ** 2 + (axis[:, None] - y) ** 2) / 50)
        for seen, reach in zip(trunk(blob[None, None]), receptive_fields(trunk), strict=True):
            shown = resampled(seen.sum(1, keepdim=True), reach, cell_centers(size, 2, seen.device))[0, 0]
            at = (torch.arange(size // 2) + 0.5) * 2
            middle = torch.stack([(shown.sum(0) * at).sum(), (shown.sum(1) * at).sum()]) / shown.sum()
            assert middle.tolist() == pytest.approx([x, y], abs=3.0), reach


def averaging(trunk: BackboneStages) -> BackboneStages:
    trunk.contract = UNIT.replace(channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    for layer in trunk.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
    return trunk.eval().requires_grad_(False)


def test_maps_cover_the_image_from_edge_to_edge() -> None:
    network = small()
    shown = network.attention(network.maps(torch.rand(1, 1, 64, 64)), 64, 2)
    assert shown.shape == (1, 3, 32, 32)
    assert 0 <= shown.min() <= shown.max() <= 1


def test_the_scale_is_fixed_so_that_absent_findings_stay_dark() -> None:
    network = small(stage_weights="uniform", combine_stages="maps")
    network.scale_maps(torch.zeros(4, 3), torch.full((4, 3), 2.0))
    absent = [torch.full((1, 3, 8, 8), -1.0)] * 4
    present = [one.clone() for one in absent]
    for one in present:
        one[..., 4, 4] = 5.0
    assert network.attention(absent, 32, 4).max() < 0.02
    scaled = network.scaled(present)
    assert [one.max().item() for one in scaled] == [1.0] * 4
    assert torch.equal(network.scaled([one / 5 for one in present])[0].max(), torch.tensor(0.5))


def test_attention_multiplies_all_stages_but_the_last_unless_logits_are_added() -> None:
    maps = [torch.full((1, 3, cells, cells), value) for cells, value in ((16, 0.2), (8, 0.5), (4, 0.8), (2, 4.0))]
    product, mean = (
        small(combine_stages=kind, stage_weights="uniform").attention(maps, 64, 4) for kind in ("maps", "logits")
    )
    assert torch.allclose(product, torch.tensor((0.2 * 0.5 * 0.8) ** (1 / 3)))
    assert torch.allclose(mean, torch.tensor(0.625))


def test_a_scale_with_equal_ends_does_not_divide_by_zero() -> None:
    network = small()
    network.scale_maps(torch.ones(4, 3), torch.ones(4, 3))
    assert network.attention(network.maps(torch.rand(1, 1, 64, 64)), 64, 4).isfinite().all()


@pytest.mark.parametrize("backbone", ["resnet18", "densenet121"])
def test_torchvision_weights_fit_and_stages_equal_torchvisions(backbone: CamBackbone) -> None:
    torch.manual_seed(0)
    assert backbone != "small"
    whole, trunk = Classifier(backbone, 7).eval(), BackboneStages(backbone).eval()
    load_body(trunk, whole.body.state_dict())
    x = torch.rand(1, 1, 64, 64)
    last: list[Tensor] = []
    inner = whole.body.features if backbone == "densenet121" else whole.body.layer4
    inner.register_forward_hook(lambda *call: last.append(call[2]))
    whole(x)
    seen = trunk(x)
    assert torch.allclose(seen[-1], last[0].relu(), atol=1e-5)
    assert [s.shape[-1] for s in seen] == [16, 8, 4, 2]
    assert len(BackboneStages(backbone, last_only=True)(x)) == 1


@pytest.mark.parametrize(
    "wrong", [{"pooling": "median"}, {"stages": "first"}, {"stage_weights": "guessed"}, {"combine_stages": "pixels"}]
)
def test_unknown_settings_are_rejected(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        small(**wrong)
    with pytest.raises(ValueError, match=r"expected one of small.*got vgg16"):
        MultiscaleCAM("vgg16", FINDINGS)  # pyright: ignore[reportArgumentType]


def test_half_precision_keeps_logits_close() -> None:
    network, x = moved(small()), torch.rand(2, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = network.to(memory_format=torch.channels_last)(x)  # pyright: ignore[reportCallIssue]
    assert half.dtype == torch.float32
    assert torch.allclose(half, network(x), atol=0.05)
