"""ONNX files give the same predictions as PyTorch, for every family, and describe themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from cxr import schema
from cxr.benchmarks.throughput import onnx_predictions
from cxr.cli.commands import export_onnx as export_command
from cxr.errors import UserError
from cxr.export import onnx as export_onnx
from cxr.families import checkpoint
from cxr.families.aecnn import AecnnRecipe
from cxr.families.base import Recipe
from cxr.families.detect import DetectRecipe
from cxr.families.ensemble import EnsembleRecipe
from cxr.imaging.decode import decode
from cxr.imaging.geometry import fit
from cxr.models.ensemble import Ensemble
from cxr.models.suppression import suppress
from cxr.models.yolo import Yolo
from tests.conftest import REPOSITORY
from tests.families.test_recipes import SMALL

pytest.importorskip("onnx", reason="needs the extra [onnx]")
pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")

WITHOUT_CXR = "import sys; sys.modules['torch'] = sys.modules['cxr'] = None"
LARGER = 45  # stored size in pixels, which the input size, 32, does not divide
RECIPES = SMALL | {
    "aecnn of ten crops": AecnnRecipe(
        size=40, crop=32, patch=16, width=8, backbone="resnet18", stem_stride=1, tta_crops="ten"
    ),
    "attend with an aligner": SMALL["attend"].replace(
        aligner="/aligner", aligner_recipe=SMALL["align"].replace(size=24).to_dict()
    ),
}
QUICK = {("classify", LARGER)}
CASES = [
    pytest.param(name, stored, marks=[] if (name, stored) in QUICK else [pytest.mark.slow])
    for name in RECIPES
    for stored in (LARGER, None)
    if stored or name != "detect"  # at 32 px, random weights give scores of exactly 1, whose order is arbitrary
]


def some_network(recipe: Recipe) -> nn.Module:
    """A network with random weights whose predictions differ between images: boxes, masks, both decisions."""
    torch.manual_seed(0)
    network: Any = recipe.network(schema.FINDINGS)
    if recipe.family == "align":
        nn.init.normal_(network.head.weight, std=0.1)
    if recipe.family == "detect":
        for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.momentum = 1.0
        network.train()(images(8, recipe.size)[:, None] / 255)  # else all boxes would have nearly equal scores
        for layer in network.detector.model[-1].cv3:
            nn.init.zeros_(layer[-1].bias)
        spread = network.eval()(images(8, recipe.size)[:, None] / 255)[1]["scores"].abs().max().item()
        for layer in network.detector.model[-1].cv3:
            layer[-1].weight.data.div_(spread)  # scores of exactly 1 would have no order
            nn.init.normal_(layer[-1].bias)
    if recipe.family == "pneumothorax":
        for layer in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight)
        network.rule.copy_(torch.tensor([0.4, 0.01, 0.3]))
    if recipe.family == "localize":
        network.box_thresholds.copy_(torch.linspace(0.2, 0.8, len(schema.FINDINGS)))
        network.box_offsets.copy_(torch.linspace(-0.5, 0.5, 4 * len(schema.FINDINGS)).reshape(-1, 4))
    if getattr(network, "aligner", None):
        nn.init.normal_(network.aligner.head.weight, std=0.1)
    network.eval()
    if "thresholds" in dict(network.named_buffers()):
        with torch.inference_mode():
            p = recipe.predict(network, {schema.PIXELS: images(3, recipe.size)})[schema.PROBABILITIES]
        network.thresholds.copy_(p.mean(0))
    return network


def images(count: int, size: int) -> torch.Tensor:
    """Images with edges and gradients, uint8 (count, size, size)."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    noise = torch.rand(smooth.shape, generator=generator) * 0.2
    return (smooth * 0.8 + noise).mul(255).round().to(torch.uint8)[:, 0]


@pytest.mark.parametrize(("name", "stored"), CASES)
def test_predictions_equal_those_of_pytorch(name: str, stored: int | None) -> None:
    recipe = RECIPES[name]
    network, size = some_network(recipe), stored or recipe.size
    running = export_onnx.session(export_onnx.to_onnx(recipe, network, size).SerializeToString(), threads=1)
    assert [(put.name, put.type, put.shape) for put in running.get_inputs()] == [
        (schema.PIXELS, "tensor(uint8)", [export_onnx.BATCH, size, size])
    ]
    names = [output.name for output in running.get_outputs()]
    assert {output.shape[0] for output in running.get_outputs()} == {export_onnx.BATCH}
    for count in (1, 3):
        pixels = images(count, size)
        with torch.inference_mode():
            expected = recipe.predict(network, {schema.PIXELS: pixels})
        assert names == list(expected)
        assert set(names) <= set(export_onnx.OUTPUTS)
        for output, values in zip(names, running.run(names, {schema.PIXELS: pixels.numpy()}), strict=True):
            wanted = expected[output].numpy()
            assert values.dtype == wanted.dtype
            rtol = export_onnx.TOLERANCE
            atol = 1 if wanted.dtype == np.uint8 else rtol  # heat: one level, from rounding
            np.testing.assert_allclose(values.astype(float), wanted.astype(float), rtol, atol, err_msg=output)
            if output != schema.PRED_MASK_PROBABILITY and count == 3:
                assert np.nanstd(wanted.astype(float)) > 0, f"{output} is constant, so that this test is void"


def test_every_family_is_covered() -> None:
    from cxr.families import RECIPES as FAMILIES

    assert {recipe.family for recipe in RECIPES.values()} == set(FAMILIES)


def saved(folder: Path, recipe: Recipe) -> checkpoint.Checkpoint:
    network = some_network(recipe)
    task = recipe.task(network)
    checkpoint.save(folder, recipe, task, network.state_dict(), findings=schema.FINDINGS, metrics={"mean_auroc": 0.8})
    return checkpoint.load(str(folder))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[checkpoint.Checkpoint, bytes]:
    recipe = SMALL["localize"].replace(backbone_pretrained="/home/someone/weights.pt")
    model = saved(tmp_path_factory.mktemp("checkpoint"), recipe)
    return model, export_onnx.export(model, LARGER)


@pytest.mark.slow
def test_a_file_describes_itself(exported: tuple[checkpoint.Checkpoint, bytes]) -> None:
    model, data = exported
    facts = export_onnx.session(data).get_modelmeta().custom_metadata_map
    assert facts["family"] == "localize"
    assert json.loads(facts["findings"]) == list(schema.FINDINGS)
    assert facts["sha256"] == model.about["sha256"]
    assert json.loads(facts["recipe"])["size"] == 32
    assert json.loads(facts["input"])["shape"] == ["batch", LARGER, LARGER]
    assert json.loads(facts["input"])["preparation"] == []
    assert json.loads(facts["network_input"]) == model.about["input"]
    assert set(json.loads(facts["outputs"])) == {"probabilities", "decisions", "heat"}
    assert "Boxes are drawn" in facts["remaining_steps"]
    assert json.loads(facts["metrics"]) == {"mean_auroc": 0.8}
    assert "someone" not in str(facts), "paths of the place of training"


@pytest.mark.slow
def test_an_ensemble_is_one_graph_and_names_no_locations_of_its_members(tmp_path: Path) -> None:
    recipe = SMALL["classify"].replace(backbone_pretrained="/home/someone/weights.pt")
    members = [some_network(recipe) for _ in range(2)]
    with torch.no_grad():
        members[1].get_parameter("head.weight").mul_(3)
    ensemble = EnsembleRecipe.of([recipe, recipe])
    network = Ensemble(members, schema.FINDINGS, ("thresholds",)).eval()
    task = ensemble.task(network)
    checkpoint.save(tmp_path, ensemble, task, network.state_dict(), findings=schema.FINDINGS, metrics={})
    data = export_onnx.export(checkpoint.load(str(tmp_path)))
    assert export_onnx.differences(data, ensemble, network)["probabilities"] < export_onnx.TOLERANCE
    facts = export_onnx.session(data).get_modelmeta().custom_metadata_map
    assert len(json.loads(facts["recipe"])["members"]) == 2
    assert "someone" not in str(facts)


@pytest.mark.slow
def test_differences_from_pytorch_are_measured(exported: tuple[checkpoint.Checkpoint, bytes]) -> None:
    model, data = exported
    measured = export_onnx.differences(data, model.recipe, model.network)
    assert measured["probabilities"] < export_onnx.TOLERANCE
    with torch.no_grad():
        model.network.get_parameter("heads.0.weight").mul_(2)
    assert export_onnx.differences(data, model.recipe, model.network)["probabilities"] > export_onnx.TOLERANCE


def test_images_that_must_be_prepared_are_said_to(tmp_path: Path) -> None:
    model = saved(tmp_path, SMALL["localize"].replace(lung_crop="/lungs", equalize="clahe"))
    with pytest.raises(UserError, match=r"crop to the square around the lungs.*--equalize clahe.*--prepared-images"):
        export_onnx.export(model)
    facts = export_onnx.metadata(model, 32, ["probabilities"])
    assert len(facts["input"]["preparation"]) == 2


def test_images_smaller_than_the_input_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least the network's input size, 32 px, got 31 px"):
        export_onnx.export(saved(tmp_path, SMALL["localize"]), 31)


@pytest.mark.slow
def test_ensembles_of_detectors_are_rejected() -> None:
    ensemble = EnsembleRecipe.of([DetectRecipe(size=32)] * 2)
    with pytest.raises(UserError, match="export the checkpoint of each network"):
        export_onnx.to_onnx(ensemble, ensemble.network(schema.FINDINGS), 32)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = export_onnx.importlib.util.find_spec
    monkeypatch.setattr(
        export_onnx.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(UserError, match=r"got no onnxruntime: run pip install 'cxr\[onnx\]'"):
        export_onnx.require_packages()


def test_suppression_drops_lower_scores_of_the_same_finding() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40]]])
    scores = torch.tensor([[[0.5, 0.9, 0.2], [0.5, 0.0, 0.05]]])
    remaining = suppress(boxes, scores, 0.5, 0.1, 100)
    assert torch.equal(remaining, torch.tensor([[[0, 0.9, 0.2], [0.5, 0, 0]]]))
    assert torch.equal(suppress(boxes, scores, 0.5, 0.1, 1)[0, 0], torch.tensor([0, 0.9, 0]))


@pytest.mark.slow
def test_no_box_is_left_when_none_has_the_score() -> None:
    recipe = SMALL["detect"]
    network: Any = recipe.network(schema.FINDINGS).eval()
    assert isinstance(network, Yolo)
    for layer in network.detector.model[-1].cv3:  # pyright: ignore
        nn.init.constant_(layer[-1].bias, -50)
    running = export_onnx.session(export_onnx.to_onnx(recipe, network, 32).SerializeToString())
    assert np.isnan(running.run(None, {schema.PIXELS: images(2, 32).numpy()})[0]).all()


def test_the_example_of_the_documentation_gives_the_scores_of_the_pipeline(tmp_path: Path) -> None:
    recipe = SMALL["classify"]
    model = saved(tmp_path / "checkpoint", recipe)
    (tmp_path / "model.onnx").write_bytes(export_onnx.export(model, 48))
    pixels = images(1, 90)[0, :70].numpy()
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    text = (REPOSITORY / "docs/how-to/export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_CXR}\n{code}", "model.onnx", "image.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stored, _ = fit(decode((tmp_path / "image.png").read_bytes()).pixels, 48)
    with torch.inference_mode():
        expected = recipe.predict(model.network, {schema.PIXELS: torch.from_numpy(stored)[None]})
    lines = [
        f"{finding}: {p:.4f}{' (present)' if present else ''}"
        for finding, p, present in zip(
            schema.FINDINGS, expected["probabilities"][0].tolist(), expected["decisions"][0].tolist(), strict=True
        )
    ]
    assert done.stdout.splitlines() == lines


@pytest.mark.slow
def test_the_command_writes_a_file_and_measures_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "checkpoint", SMALL["classify"])
    options = export_command.Options(checkpoint=str(tmp_path / "checkpoint"), out=str(tmp_path / "out"))
    result = export_command.main(options)
    assert result["metrics"].keys() == {"difference/probabilities"}
    assert max(result["metrics"].values()) < export_onnx.TOLERANCE
    assert Path(result["model"]).read_bytes() == export_onnx.export(checkpoint.load(str(tmp_path / "checkpoint")))
    assert "probabilities: largest difference from PyTorch" in capsys.readouterr().out


@pytest.mark.slow
def test_speeds_are_measured_on_networks_whose_outputs_vary() -> None:
    (speed,) = onnx_predictions.measure(SMALL["classify"], (2,), rounds=1)
    assert speed.batch == 2
    assert speed.torch_ms > 0
    assert speed.onnx_ms > 0
    assert speed.difference < export_onnx.TOLERANCE
    network = SMALL["align"].network(())
    onnx_predictions.randomize(network, torch.rand(4, 1, 32, 32))
    theta = SMALL["align"].predict(network, {schema.PIXELS: images(3, 32)})[schema.THETA]
    assert theta.std(0).min() > 1e-4
