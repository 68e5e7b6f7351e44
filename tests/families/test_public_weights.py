"""Imported weights give the scores of the libraries that they come from, on the same files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import cxr
from cxr import schema, storage
from cxr.errors import UserError
from cxr.families import checkpoint, public_weights
from cxr.families.torchxrayvision_weights import FINDINGS, PUBLISHED
from cxr.imaging.center_crop import CENTER
from cxr.models import pretrained, weight_files
from cxr.models.yolo import ultralytics

TOLERANCE = 1e-5  # of probabilities


@pytest.fixture(scope="module")
def xrv() -> Any:
    return pytest.importorskip("torchxrayvision", reason="torchxrayvision is not installed")


def xray(folder: Path, height: int, width: int, seed: int = 0) -> Path:
    """A PNG with smooth structure and noise."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.uniform(0, 255, (6, 5)), (width, height), interpolation=cv2.INTER_CUBIC)
    path = folder / f"{height}x{width}_{seed}.png"
    cv2.imwrite(str(path), (coarse + rng.normal(0, 10, (height, width))).clip(0, 255).astype(np.uint8))
    return path


def prepared(xrv: Any, path: Path, size: int) -> torch.Tensor:
    """An image as TorchXRayVision's README prepares it, (1, 1, size, size)."""
    image = xrv.datasets.XRayCenterCrop()(xrv.utils.load_image(str(path)))
    return torch.from_numpy(xrv.datasets.XRayResizer(size)(image))[None]


def settle(network: nn.Module, x: torch.Tensor) -> None:
    """Give batch norms the statistics of `x`, so that a network with random weights has moderate outputs."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(x)
    network.eval()


def imported(path: Path, library: public_weights.Library, out: Path, **options: Any) -> public_weights.Imported:
    opened = public_weights.open_file(str(path), trust=True)
    return public_weights.import_weights(library, opened, str(out), **options)


def probabilities(uri: str, paths: list[Path]) -> torch.Tensor:
    table = cxr.load(uri).predict([str(path) for path in paths])
    assert table[schema.CROP_STATUS].to_pylist() == [CENTER] * len(paths)
    return torch.tensor(table[schema.PROBABILITIES].to_pylist())


@pytest.mark.slow
def test_a_densenet_of_torchxrayvision_gives_the_same_outputs(xrv: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = xrv.models.DenseNet(weights=None)
    paths = [xray(tmp_path, 330, 290), xray(tmp_path, 224, 300, 1)]
    x = torch.cat([prepared(xrv, path, 224) for path in paths])
    settle(network, x)
    with torch.no_grad():
        logits = network(x)
    thresholds = torch.rand(18) * 0.4 + 0.3
    thresholds[5] = torch.nan
    network.op_threshs = thresholds
    torch.save(network, tmp_path / "densenet.pt")
    result = imported(tmp_path / "densenet.pt", "torchxrayvision", tmp_path / "out")

    assert result.fit.unused == ()
    trained = [i for i in range(18) if i != 5]
    assert result.findings == tuple(FINDINGS[i] for i in trained)
    p = probabilities(result.uri, paths)
    assert 0.01 < p.min() < p.max() < 0.99
    assert (p - logits.sigmoid()[:, trained]).abs().max() < TOLERANCE
    with torch.no_grad():
        own = network(x)[:, trained]
    assert (xrv.models.op_norm(p, thresholds[trained]) - own).abs().max() < 4 * TOLERANCE, "scaled by up to 1.7"
    decisions = torch.tensor(
        cxr.load(result.uri).predict([str(path) for path in paths])[schema.DECISIONS].to_pylist()
    )
    clear = (own - 0.5).abs() > 1e-4
    assert torch.equal(decisions[clear] == 1, own[clear] > 0.5)
    heat = next(iter(cxr.load(result.uri).explain(str(paths[0]))))
    assert heat.maps.shape[0] == 17


@pytest.mark.slow
def test_the_resnet_of_torchxrayvision_gives_the_same_outputs_at_512(
    xrv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    made = resnet50(num_classes=18)
    made.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    path = xray(tmp_path, 640, 560)
    settle(made, prepared(xrv, path, 512))
    published = PUBLISHED[-1]
    torch.save(made.state_dict(), tmp_path / published.file)
    monkeypatch.setattr(xrv.models, "get_weights", lambda *_, **__: str(tmp_path / published.file))
    network = xrv.models.ResNet(weights=published.name)

    opened = public_weights.open_file(str(tmp_path / published.file), trust=False)
    result = public_weights.import_weights("torchxrayvision", opened, str(tmp_path / "out"))
    trained = [i for i, threshold in enumerate(published.thresholds) if threshold is not None]
    assert result.findings == tuple(FINDINGS[i] for i in trained)
    assert len(trained) == 16
    p = probabilities(result.uri, [path])
    with torch.no_grad():
        own = network(prepared(xrv, path, 512))[:, trained]
    scaled = xrv.models.op_norm(p, torch.tensor([published.thresholds[i] or 0.0 for i in trained]))
    assert (scaled - own).abs().max() < TOLERANCE
    about = checkpoint.load(result.uri).about
    assert about["origin"]["license"] == "Apache-2.0"
    assert about["origin"]["source_url"].endswith(published.file)
    assert about["origin"]["sha256"] == opened.sha256
    assert about["input"]["range"] == [-1024, 1024]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"SHA-256 {opened.sha256}. Their license is Apache-2.0" in card
    assert re.search(r"\| Hernia +\| +0\.5021 ", card)


def test_published_thresholds_are_those_of_the_library(xrv: Any) -> None:
    for weights in PUBLISHED:
        theirs = xrv.models.model_urls[weights.name]
        assert theirs["weights_url"] == public_weights.RELEASE + weights.file
        assert theirs["input_resolution"] == weights.size
        for name, threshold, label in zip(FINDINGS, weights.thresholds, theirs["labels"], strict=True):
            index = FINDINGS.index(name)
            assert label in ("", name)
            published = theirs["op_threshs"][index]
            assert threshold == (published if label and published == published else None)


def yolo_file(folder: Path, names: tuple[str, ...]) -> Path:
    torch.manual_seed(0)
    model = ultralytics("nn.tasks").DetectionModel("yolov5n.yaml", ch=3, nc=len(names), verbose=False)
    model.names = dict(enumerate(names))
    settle(model, torch.rand(2, 3, 128, 128))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".2.weight") and (".cv2." in name or ".cv3." in name):
                parameter *= 0.1  # of the last layers: moderate edges and scores
    torch.save({"model": model.half(), "ema": None, "train_args": {"imgsz": 128}}, folder / "yolov5nu.pt")
    return folder / "yolov5nu.pt"


@pytest.mark.slow
def test_yolov5u_of_ultralytics_detects_the_same_boxes(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    file, path = yolo_file(tmp_path, ("Mass",)), xray(tmp_path, 128, 128)
    yolo = ultralytics("models.yolo.model").YOLO(str(file))
    found = yolo.predict(
        cv2.imread(str(path)), imgsz=128, conf=0.002, iou=0.7, max_det=20, verbose=False, device="cpu"
    )
    theirs = found[0].boxes
    assert len(theirs) > 5

    result = imported(file, "ultralytics", tmp_path / "out")
    assert result.findings == ("Mass",)
    assert result.fit.adapted == ("model.0.conv.weight: summed over 3 input channels",)
    (ours,) = cxr.load(result.uri).predict(str(path))[schema.PRED_BOXES].to_pylist()
    scores = torch.tensor([box[schema.SCORE] for box in ours])[: len(theirs)]
    corners = torch.tensor(
        [[box[n] for n in (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)] for box in ours]
    )
    torch.testing.assert_close(scores, theirs.conf, rtol=0, atol=1e-5)
    torch.testing.assert_close(corners[: len(theirs)], theirs.xyxy, rtol=0, atol=1e-2, check_dtype=False)


def test_a_dinov2_becomes_weights_for_a_backbone(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    result = imported(tmp_path / "dinov2_vits14_pretrain.pth", "dinov2", tmp_path / "out")
    origin = storage.read_json(f"{result.uri}/{public_weights.ORIGIN}")
    assert (origin["backbone"], origin["license"]) == ("timm:vit_small_patch14_dinov2", "Apache-2.0")
    read = pretrained.from_uri(result.uri)
    assert torch.equal(read["blocks.3.attn.qkv.weight"], state["blocks.3.attn.qkv.weight"])


class Attack:
    """Runs code when it is unpickled as usual."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


def test_python_objects_need_trust_and_are_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network = nn.Sequential(nn.Linear(2, 3))
    network.attack = Attack()  # pyright: ignore[reportArgumentType]
    torch.save(network, tmp_path / "network.pt")
    with pytest.raises(UserError, match=r"contains Python objects.* use --trust"):
        public_weights.open_file(str(tmp_path / "network.pt"), trust=False)
    opened = public_weights.open_file(str(tmp_path / "network.pt"), trust=True)
    assert torch.equal(opened.state["0.weight"], network[0].weight)
    assert "unpickled" not in capfd.readouterr().out
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(weight_files.NotWeightsError, match="contains no network that could be read"):
        public_weights.open_file(str(tmp_path / "text.pt"), trust=True)


def test_damaged_files_are_not_said_to_need_trust(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:3000])
    (tmp_path / "cut.safetensors").write_bytes(weight_files.to_safetensors({"a": torch.zeros(10)})[:40])
    for name in ("cut.pt", "cut.safetensors"):
        for trust in (False, True):
            with pytest.raises(weight_files.NotWeightsError, match="cannot be read as weights"):
                public_weights.open_file(str(tmp_path / name), trust=trust)


@pytest.mark.parametrize(
    ("library", "state", "options", "message"),
    [
        ("torchxrayvision", {"a": (1,)}, {}, "expected a DenseNet or a ResNet"),
        ("torchxrayvision", {"fc.weight": (4, 2), "fc.bias": (4,)}, {}, "got 4: name them with --findings"),
        ("torchxrayvision", {"fc.weight": (18, 2), "fc.bias": (18,)}, {}, "resnet50 has 265 tensors and resnet101"),
        ("torchxrayvision", {"a": (1,)}, {"name": "densenet"}, "name: expected one of densenet121-res224-all"),
        ("ultralytics", {"a": (1,)}, {}, "expected YOLOv5u"),
        ("timm", {"a": (1,)}, {}, "the license of .* is not known"),
        ("timm", {"a": (1,)}, {"license": "MIT"}, "got none: add --name"),
        ("timm", {"a": (1,)}, {"license": "MIT", "name": "resnet18"}, "does not fit --from timm: they have none of"),
    ],
)
def test_other_files_are_rejected_with_the_reason(
    library: public_weights.Library,
    state: dict[str, tuple[int, ...]],
    options: dict[str, str],
    message: str,
    tmp_path: Path,
) -> None:
    torch.save({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "file.pt", library, tmp_path / "out", **options)
