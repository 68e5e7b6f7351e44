"""Initial weights: read once per run, stored with it, and an error if named weights are missing."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cxr import schema
from cxr.errors import UserError
from cxr.families import checkpoint, recipe_from_dict
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.attend import AttendRecipe
from cxr.families.base import Recipe, SingleProcess
from cxr.families.detect import DetectRecipe
from cxr.families.localize import LocalizeRecipe
from cxr.families.lungs import LungsRecipe
from cxr.families.pneumothorax import PneumothoraxRecipe
from cxr.families.presets import preset
from cxr.models import perceptual, pretrained, weight_files
from cxr.models.classifier import Classifier, load_body
from cxr.models.small_unet import LungField
from tests.by_family import by_family
from tests.families.test_recipes import SMALL, some_batches

NAME = "IMAGENET1K_V1"
FROZEN = PneumothoraxRecipe(
    size=32, backbone="resnet18", batch_size=4, backbone_pretrained=NAME, freeze_backbone=True
)
# A recipe of each family that starts from weights of torchvision's by name, and the setting that names them.
NAMED: dict[str, tuple[Recipe, str]] = {
    "aecnn": (SMALL["aecnn"].replace(backbone_pretrained=NAME), "backbone_pretrained"),
    "align": (
        SMALL["align"].replace(feature_network="vgg16", feature_weight=1.0, feature_pretrained=NAME),
        "feature_pretrained",
    ),
    "align backbone": (
        SMALL["align"].replace(backbone="resnet18", pooling="mean", backbone_pretrained=NAME),
        "backbone_pretrained",
    ),
    "attend": (SMALL["attend"].replace(backbone_pretrained=NAME), "backbone_pretrained"),
    "localize": (SMALL["localize"].replace(backbone="resnet18", backbone_pretrained=NAME), "backbone_pretrained"),
    "lungs": (
        SMALL["lungs"].replace(architecture="unet", backbone="resnet18", backbone_pretrained=NAME),
        "backbone_pretrained",
    ),
    "pneumothorax": (FROZEN, "backbone_pretrained"),
}


class Server:
    """Replaces torchvision's server by random weights, until it is made unreachable."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.gone = False

    def __call__(self, network: str, name: str) -> Mapping[str, Tensor]:
        self.asked.append((network, name))
        if self.gone:
            raise OSError("no route to host")
        from torchvision import models

        torch.manual_seed(7)
        if network == "vgg16":  # most of it is in its classifier, which is slow to make
            features = torch.nn.Module()
            features.features = models.vgg.make_layers(models.vgg.cfgs["D"])
            return features.state_dict() | {"classifier.6.weight": torch.zeros(9)}
        return getattr(models, network)(weights=None).state_dict()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(pretrained, "from_torchvision", server)
    return server


@pytest.mark.parametrize("family", by_family(NAMED, quick={"align", "localize", "lungs"}))
def test_workers_start_from_the_weights_in_out_and_never_ask_torchvision(
    family: str, server: Server, tmp_path: Path
) -> None:
    recipe, setting = NAMED[family]
    assert recipe.unresolved_weights == (setting,)
    resolved, notes = recipe.resolve_weights(str(tmp_path))
    assert len(server.asked) == 1
    assert re.fullmatch(rf"{setting}=IMAGENET1K_V1: \d+ tensors loaded.*", "".join(notes))
    stored = getattr(resolved, setting)
    assert stored.startswith(f"{tmp_path}/weights/")
    assert resolved.unresolved_weights == ()
    server.gone = True
    on_worker = recipe_from_dict(json.loads(json.dumps(resolved.to_dict())))
    task = on_worker.task(on_worker.network(schema.FINDINGS))
    task.begin(some_batches, SingleProcess())
    given = pretrained.from_uri(stored)
    kept = [values for values in task.state_dict().values() if values.ndim == 4]
    convolutions = [values for values in given.values() if values.ndim == 4]
    assert sum(any(torch.equal(values, own) for own in kept) for values in convolutions) >= 3
    assert len(server.asked) == 1


def test_a_search_resolves_weights_that_only_some_trials_use(server: Server, tmp_path: Path) -> None:
    base = SMALL["align"].replace(feature_network="vgg16", feature_weight=0.0)
    resolved, _ = base.resolve_weights(str(tmp_path))
    server.gone = True
    trial = resolved.replace(feature_weight=0.5, feature_layers=2)
    assert trial.task(trial.network([])).features.names == {"3", "8"}  # pyright: ignore
    stored = pretrained.from_uri(resolved.feature_pretrained)  # pyright: ignore[reportAttributeAccessIssue]
    assert not [name for name in stored if name.startswith("classifier")], "nine tenths of VGG16, which are not used"


@pytest.mark.parametrize("family", by_family(NAMED, quick={"align", "localize", "lungs"}))
def test_unavailable_named_weights_raise_an_error_with_instructions(
    family: str, server: Server, tmp_path: Path
) -> None:
    server.gone = True
    recipe, setting = NAMED[family]
    option = f"--{setting.replace('_', '-')}"
    with pytest.raises(
        UserError, match=rf"{setting}=IMAGENET1K_V1: .*no route to host.*https://.*pth.* {option}"
    ) as e:
        recipe.resolve_weights(str(tmp_path))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "weights").exists()


def test_a_frozen_backbone_does_not_fall_back_even_by_default(server: Server, tmp_path: Path) -> None:
    server.gone = True
    with pytest.raises(UserError, match=r"backbone_pretrained=auto: .*could not be fetched"):
        FROZEN.replace(backbone_pretrained="auto").resolve_weights(str(tmp_path))


def test_default_weights_fall_back_with_a_note_for_all_runs_in_one_out(server: Server, tmp_path: Path) -> None:
    server.gone = True
    given = preset(AecnnRecipe, "published").replace(
        size=128, crop=0, compressor="residual", compression=4, backbone="resnet18", patch=64
    )
    resolved, notes = given.resolve_weights(str(tmp_path))
    assert resolved.backbone_pretrained == ""
    assert pretrained.sources(resolved)["backbone_pretrained"] is None
    assert len(notes) == 1
    assert "no route to host" in notes[0]
    server.gone = False
    again, told = given.resolve_weights(str(tmp_path))
    assert again == resolved, "trials of one search start alike"
    assert "at the first run" in told[0]
    insisted, notes = given.replace(backbone_pretrained=NAME).resolve_weights(str(tmp_path))
    assert pretrained.sources(insisted)["backbone_pretrained"]["given"] == NAME  # pyright: ignore
    assert len(notes) == 1
    assert "tensors loaded" in notes[0]
    elsewhere, notes = given.resolve_weights(str(tmp_path / "other"))
    assert pretrained.is_uri(elsewhere.backbone_pretrained)


def test_the_record_says_which_weights_were_used(server: Server, tmp_path: Path) -> None:
    resolved, _ = FROZEN.resolve_weights(str(tmp_path))
    record = pretrained.sources(resolved)["backbone_pretrained"]
    assert record == {
        "given": NAME,
        "network": "resnet18",
        "sha256": pretrained.digest(pretrained.from_uri(resolved.backbone_pretrained)),
        "fit": {"loaded": 100, "adapted": [], "kept": [], "unused": ["fc.weight", "fc.bias"]},
        "uri": f"{tmp_path}/weights/resnet18-IMAGENET1K_V1",
    }
    assert pretrained.sources(FROZEN.replace(backbone_pretrained="", freeze_backbone=False)) == {
        "backbone_pretrained": None
    }


def test_weights_by_uri_are_copied_once_and_may_be_deleted_afterwards(tmp_path: Path) -> None:
    given, out = tmp_path / "mine", str(tmp_path / "out")
    given.mkdir()
    torch.save(Classifier("resnet18", 3).body.state_dict(), given / "resnet18.pt")
    recipe = FROZEN.replace(backbone_pretrained=str(given / "resnet18.pt"))
    resolved, _ = recipe.resolve_weights(out)
    assert resolved.resolve_weights(out) == (resolved, [])
    state = pretrained.from_uri(resolved.backbone_pretrained)
    torch.save(Classifier("resnet18", 3).body.state_dict(), given / "resnet18.pt")
    with pytest.raises(UserError, match=r"other weights than those that an earlier run in .* started from"):
        recipe.resolve_weights(out)
    shutil.rmtree(given)
    again, _ = recipe.resolve_weights(out)
    assert again == resolved
    torch.testing.assert_close(dict(pretrained.from_uri(again.backbone_pretrained)), dict(state))


def test_a_perceptual_loss_resumes_only_with_the_same_weights(server: Server, tmp_path: Path) -> None:
    given = SMALL["align"].replace(feature_network="vgg16", feature_weight=1.0, feature_pretrained=NAME)
    out = str(tmp_path / "out")
    begun, _ = given.resolve_weights(out)
    server.gone = True
    assert given.replace(epochs=9).resume_from(begun.to_dict(), out) == (begun.replace(epochs=9), [])
    shutil.move(out, tmp_path / "moved")
    moved, _ = given.resume_from(begun.to_dict(), str(tmp_path / "moved"))
    assert moved.changes_from(begun.to_dict()) == []
    other = {name: values + 1 for name, values in pretrained.from_uri(moved.feature_pretrained).items()}  # pyright: ignore
    torch.save(other, tmp_path / "other.pt")
    changed, _ = given.replace(feature_pretrained=str(tmp_path / "other.pt")).resume_from(begun.to_dict(), out)
    assert changed.changes_from(begun.to_dict())[0].startswith("feature_sha256 was ")


def _one_channel() -> dict[str, Tensor]:
    state = dict(Classifier("resnet18", 3).body.state_dict())
    return state | {"conv1.weight": state["conv1.weight"][:, :1].clone()}


def _checkpoint(folder: Path) -> None:
    recipe = SMALL["attend"]
    task = recipe.task(recipe.network(schema.FINDINGS))
    checkpoint.save(folder, recipe, task, task.network.state_dict(), findings=schema.FINDINGS, metrics={})


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        (AecnnRecipe(backbone="resnet18"), "backbone_pretrained"),
        (AttendRecipe(), "backbone_pretrained"),
        (LocalizeRecipe(backbone="resnet18"), "backbone_pretrained"),
        (PneumothoraxRecipe(backbone="resnet18"), "backbone_pretrained"),
    ],
)
def test_weights_for_one_input_channel_are_adapted_and_the_note_says_so(
    recipe: Recipe, setting: str, tmp_path: Path
) -> None:
    torch.save(_one_channel(), tmp_path / "gray.pt")
    given = recipe.replace(**{setting: str(tmp_path / "gray.pt")})
    resolved, notes = given.resolve_weights(str(tmp_path / "out"))
    assert "repeated for 3 input channels and divided by 3" in notes[0]
    record = pretrained.sources(resolved)[setting]
    assert record is not None
    assert len(record["fit"]["adapted"]) == 1
    assert record["fit"]["loaded"] > 60


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        (AecnnRecipe(), "start_from"),
        (AecnnRecipe(), "backbone_pretrained"),
        (AlignRecipe(), "lung_pretrained"),
        (AlignRecipe(feature_network="lungs", feature_pretrained="/x"), "feature_pretrained"),
        (AttendRecipe(), "aligner"),
        (AttendRecipe(backbone="resnet50"), "backbone_pretrained"),
        (DetectRecipe(size=32), "pretrained"),
        (LocalizeRecipe(), "backbone_pretrained"),
        (LungsRecipe(), "backbone_pretrained"),
    ],
)
def test_a_checkpoint_of_another_family_is_rejected_with_the_difference(
    recipe: Recipe, setting: str, tmp_path: Path
) -> None:
    _checkpoint(tmp_path / "attend")
    with pytest.raises(UserError, match=f"^{setting}=.*, a checkpoint of family 'attend', does not fit: ") as refused:
        recipe.replace(**{setting: str(tmp_path / "attend")}).resolve_weights(str(tmp_path / "out"))
    assert len(str(refused.value)) < 500 + len(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_damaged_checkpoint_folder_is_rejected(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    about = json.loads((tmp_path / "checkpoint.json").read_text())
    about["recipe"]["backbone"] = "resnet50"
    (tmp_path / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(
        UserError, match="does not contain the weights of the network that its recipe describes: "
    ) as e:
        checkpoint.load(str(tmp_path))
    assert "\n" not in str(e.value)


def test_names_and_uris_are_distinguished() -> None:
    assert not any(map(pretrained.is_uri, (NAME, "auto")))
    assert all(map(pretrained.is_uri, ("s3://bucket/run", "/data/vgg.pth", "vgg.pth")))


def test_files_and_checkpoint_folders_are_read(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    (tmp_path / "weights.safetensors").write_bytes(weight_files.to_safetensors(state))
    torch.save(state, tmp_path / "torch.pt")
    torch.save({"epoch": 3, "model": {"state_dict": state}}, tmp_path / "wrapped.pt")
    for name in ("", "/weights.safetensors", "/torch.pt", "/wrapped.pt"):
        torch.testing.assert_close(pretrained.from_uri(f"{tmp_path}{name}"), state)


@pytest.mark.parametrize("divided", [False, True])
def test_folders_of_model_hubs_are_read(divided: bool, tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0), "b": torch.ones(2)}
    (tmp_path / "config.json").write_text("{}")
    if divided:
        names = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(state, 1)}
        for name, file in names.items():
            (tmp_path / file).write_bytes(weight_files.to_safetensors({name: state[name]}))
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        (tmp_path / "model.safetensors").write_bytes(weight_files.to_safetensors(state))
    torch.testing.assert_close(pretrained.from_uri(str(tmp_path)), state)


@pytest.mark.parametrize("index", [{}, {"weight_map": {"a": "../outside.safetensors"}}])
def test_an_index_only_names_files_of_its_own_folder(tmp_path: Path, index: dict[str, object]) -> None:
    (tmp_path / "outside.safetensors").write_bytes(weight_files.to_safetensors({"a": torch.ones(2)}))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(weight_files.NotWeightsError, match="expected the names of files in its own folder"):
        pretrained.from_uri(str(tmp_path / "hub"))


def test_files_without_a_state_dict_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3, "losses": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save({"model": LungField()}, tmp_path / "objects.pt")
    for name in ("text.pt", "list.pt", "other.pt", "objects.pt"):
        with pytest.raises(weight_files.NotWeightsError, match="expected a state dict") as refused:
            pretrained.from_uri(str(tmp_path / name))
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError):
        pretrained.from_uri(str(tmp_path / "missing.pt"))


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        pretrained.from_torchvision("vgg16", "IMAGENET")


def test_an_unreachable_server_raises_an_os_error_quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patience = []

    def unreachable(*args: object, **options: object) -> None:
        patience.append(socket.getdefaulttimeout())
        raise OSError("unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(OSError, match="unreachable"):
        pretrained.from_torchvision("vgg16", "IMAGENET1K_V1")
    assert patience == [pretrained.TIMEOUT_S]
    assert socket.getdefaulttimeout() is None


def test_a_damaged_download_counts_as_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"PK\x03\x04 half a file")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"^[^\n]+$"):
        pretrained.from_torchvision("resnet18", NAME)


def test_old_torchvision_files_are_read(tmp_path: Path) -> None:
    classifier = Classifier("densenet121", 3)
    state = classifier.body.state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): v for name, v in state.items()}
    old = {name: v for name, v in old.items() if not name.endswith("num_batches_tracked")}
    assert any("denselayer1.norm.1.weight" in name for name in old)
    torch.save(old, tmp_path / "densenet121.pth")
    found = pretrained.from_uri(str(tmp_path / "densenet121.pth"))
    fresh = Classifier("densenet121", 3)
    load_body(fresh, found, head=True)
    assert torch.equal(
        fresh.body.features.denseblock1.denselayer1.conv1.weight,
        state["features.denseblock1.denselayer1.conv1.weight"],
    )
    assert perceptual.build("densenet121", found, 5) is not None


OWN = {
    "conv.weight": torch.zeros(4, 3, 2, 2),
    "norm.num_batches_tracked": torch.tensor(0),
    "norm.bias": torch.ones(4),
}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: values + 1 for name, values in OWN.items()}


def test_the_prefix_with_the_most_matching_tensors_is_used() -> None:
    decoy = {"other.norm.bias": torch.ones(4), "conv.weight": torch.zeros(9)}
    fit = pretrained.match(OWN, decoy | prefixed("deep.body."), "it")
    found = fit.state
    assert (fit.loaded, fit.unused) == (2, ("other.norm.bias", "conv.weight"))
    assert found.keys() == OWN.keys()
    assert all(torch.equal(found[name], values + 1) for name, values in OWN.items())


def test_counters_may_be_missing_and_linear_layers_fit_convolutions() -> None:
    given = {"conv.weight": torch.ones(4, 12), "norm.bias": torch.ones(4)}
    found = pretrained.match(OWN, given, "it").state
    assert found["conv.weight"].shape == (4, 3, 2, 2)
    assert "norm.num_batches_tracked" not in found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": torch.ones(1)}, "they have none of the 2 tensors of it, such as conv.weight"),
        ({"a.conv.weight": OWN["conv.weight"]}, "they lack 1 of the 2 tensors of it, such as a.norm.bias"),
        (
            prefixed("") | {"conv.weight": torch.ones(4, 2, 2, 2)},
            "conv.weight of it: expected shape 4 x 3 x 2 x 2, got 4 x 2 x 2 x 2 (input channels: expected 3, got 2)",
        ),
        (
            {name: torch.ones(7) for name in OWN},
            "conv.weight of it: expected shape 4 x 3 x 2 x 2, got 7; 1 more tensors differ in shape",
        ),
    ],
)
def test_the_error_names_the_difference(given: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        pretrained.match(OWN, given, "it")


def test_an_exact_match_has_no_prefix_and_no_other_tensors() -> None:
    assert pretrained.match(OWN, prefixed(""), "it", exact=True).state.keys() == OWN.keys()
    with pytest.raises(ValueError, match="none of the 2"):
        pretrained.match(OWN, prefixed("body."), "it", exact=True)
    with pytest.raises(ValueError, match="they have 1 tensor that it does not have, such as more"):
        pretrained.match(OWN, prefixed("") | {"more": torch.ones(1)}, "it", exact=True)
    with pytest.raises(ValueError, match="got 4 x 1 x 2 x 2"):
        pretrained.match(OWN, prefixed("") | {"conv.weight": torch.ones(4, 1, 2, 2)}, "it", exact=True)


@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (1, 3)])
def test_a_first_convolution_for_other_channels_gives_the_same_output_for_gray_images(theirs: int, ours: int) -> None:
    given, network = nn.Conv2d(theirs, 8, 3), nn.Conv2d(ours, 8, 3)
    fit = pretrained.load(network, given.state_dict(), "the network")
    assert fit.adapted[0].startswith("weight: ")
    gray = torch.rand(2, 1, 9, 9)
    expected = given(gray.expand(-1, theirs, -1, -1))
    torch.testing.assert_close(network(gray.expand(-1, ours, -1, -1)), expected)


def test_the_summary_names_what_was_not_loaded() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), **{f"head.{i}": torch.ones(1) for i in range(3)}}
    fit = pretrained.load(network, state, "the network", skip=("1.",))
    assert fit.summary() == (
        "2 tensors loaded; 2 tensors (1.weight, 1.bias) of the network not loaded, since the weights do not have "
        "them; 3 tensors (head.0, head.1, …) of the weights not used"
    )
    assert fit.describe()["unused"] == ["head.0", "head.1", "head.2"]
