"""Deep ensembles: several networks of one family that score together, as one checkpoint.

An ensemble is not trained itself. `EnsembleRecipe` wraps the recipes of its members and has the same interface as any
other recipe, so that scoring needs no special cases. How predictions are combined is up to the members' family
(`capabilities.Combinable`).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.data import shards
from cxr.data.batch import Batch, to_device
from cxr.data.shard_loader import ShardStream
from cxr.data.shards import ShardInfo
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files, image_crop, recipe_from_dict
from cxr.families.base import Batches, Communicator, Recipe, ScoringContext, SingleProcess, Task, unit_pixels
from cxr.families.capabilities import HeatMaps, MaskProbabilities, combinable
from cxr.families.checkpoint import Checkpoint
from cxr.families.compatibility import check_pixels, fold_of
from cxr.families.image_crop import ImageCrop
from cxr.models.ensemble import Ensemble
from cxr.models.input_contract import UNIT, InputContract
from cxr.reporting import figures

STORED = ("lung_margin", "denoise", "normalize", "equalize")  # settings of how images are stored
BATCH = 32  # validation images per forward pass
SHOWN_IMAGES = 6


@dataclass(frozen=True, kw_only=True)
class EnsembleRecipe(Recipe):
    """Several networks of one family whose predictions are combined."""

    family: ClassVar[str] = "ensemble"
    own_settings: ClassVar[tuple[str, ...]] = ()

    members: tuple[dict[str, Any], ...] = ()
    """The recipes of the members, as `Recipe.to_dict` describes them."""

    @classmethod
    def of(cls, members: Sequence[Recipe]) -> Self:
        """The ensemble of networks trained with these recipes.

        Raises:
            UserError: their predictions cannot be combined; the message names a setting that differs.
        """
        check_members(members)
        return cls.around(members)

    @classmethod
    def around(cls, members: Sequence[Recipe], **settings: Any) -> Self:
        """A recipe with the images of these members, which must be the same, and with other settings."""
        first = members[0]
        return cls(
            members=tuple(json.loads(json.dumps(recipe.to_dict())) for recipe in members),
            size=max(recipe.size for recipe in members),
            **{first.crop_setting or "lung_crop": first.crop_checkpoint},
            **{name: getattr(first, name) for name in STORED},
            **settings,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members:
            return
        if all(isinstance(recipe, HeatMaps) for recipe in self.recipes):  # then an ensemble is `HeatMaps`, too
            object.__setattr__(self, "heat_maps", self._mean_heat_maps)
        if all(isinstance(recipe, MaskProbabilities) for recipe in self.recipes):
            object.__setattr__(self, "mask_probabilities", self._mean_mask_probabilities)

    def to_dict(self) -> dict[str, Any]:
        """Without the settings of training."""
        names = ("members", "size", "lung_crop", "aligner", *STORED, *self.own_settings)
        return {"family": self.family, **{name: value for name, value in super().to_dict().items() if name in names}}

    @cached_property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes of the members."""
        return tuple(map(recipe_from_dict, self.members))

    @property
    def first(self) -> Recipe:
        """The recipe of the first member, whose settings turn combined predictions into scores."""
        return self.recipes[0]

    # ---- What other recipes declare as class variables is that of the members' family.

    @property
    def mode(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.first.mode

    @property
    def columns(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.first.columns

    @property
    def score_columns(self) -> pa.Schema:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.first.score_columns

    @property
    def mask_label(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.first.mask_label

    @property
    def monitor(self) -> str:
        return self.first.monitor

    @property
    def input_contract(self) -> InputContract:
        """Each member applies its own contract to gray values in [0, 1]."""
        contract = self.first.input_contract
        return UNIT.replace(size=self.size, crop=contract.crop, resampling=contract.resampling)

    def with_tta_flip(self, on: bool) -> Self | None:
        changed = [recipe.with_tta_flip(on) for recipe in self.recipes]
        return None if None in changed else self.replace(members=tuple(r.to_dict() for r in changed if r))

    def network(self, findings: Sequence[str]) -> Ensemble:
        members = [recipe.network(findings) for recipe in self.recipes]
        return Ensemble(members, findings, combinable(self.first).decision_buffers)

    def task(self, network: nn.Module) -> EnsembleTask:
        return EnsembleTask(self, network)

    def raw_predictions(self, network: nn.Module, batch: Batch, only: Sequence[int] = ()) -> dict[str, Tensor]:
        """Combined predictions before thresholds.

        Args:
            only: indices of the members to combine; by default all.
        """
        assert isinstance(network, Ensemble)
        pairs = list(zip(self.recipes, network.members, strict=True))
        chosen = [pairs[index] for index in only] if only else pairs
        return combinable(self.first).combine(
            [combinable(recipe).raw_predictions(member, batch) for recipe, member in chosen]
        )

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return combinable(self.first).decide(self.raw_predictions(network, batch), network)

    def scored(self, predicted: Mapping[str, Tensor], rows: pa.Table, context: ScoringContext) -> pa.Table:
        return self.first.scored(predicted, rows, context)

    def render(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return combinable(self.first).draw(self.raw_predictions(network, batch), network, batch)

    def _mean_heat_maps(self, network: nn.Module, batch: Batch) -> Tensor:
        """The mean of the members' heat maps, at the size of the first member's; see `HeatMaps`."""
        assert isinstance(network, Ensemble)
        pairs = zip(self.recipes, network.members, strict=True)
        maps = [recipe.heat_maps(member, batch) for recipe, member in pairs if isinstance(recipe, HeatMaps)]
        resized = [F.interpolate(map_BFhw, maps[0].shape[-2:], mode="bilinear") for map_BFhw in maps]
        return torch.stack(resized).mean(0)

    def _mean_mask_probabilities(self, network: nn.Module, batch: Batch) -> Tensor:
        """The mean of the members' probabilities; see `MaskProbabilities`."""
        assert isinstance(network, Ensemble)
        pairs = zip(self.recipes, network.members, strict=True)
        members = [r.mask_probabilities(m, batch) for r, m in pairs if isinstance(r, MaskProbabilities)]
        return torch.stack([member.float() for member in members]).mean(0)


class EnsembleTask(Task):
    """Evaluates an ensemble and chooses its thresholds; it cannot be trained."""

    def __init__(self, recipe: EnsembleRecipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network
        self.evaluation: Any = combinable(recipe.first).raw_evaluation(network)

    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        return self.evaluate_raw(
            ((batch, self.recipe.raw_predictions(self.network, batch)) for batch in batches()), workers
        )

    def evaluate_raw(
        self, predictions: Iterable[tuple[Batch, Mapping[str, Tensor]]], workers: Communicator
    ) -> dict[str, float]:
        """Metrics of combined predictions; see `capabilities.RawEvaluation`."""
        return self.evaluation.evaluate_raw(predictions, workers)

    def describe(self) -> dict[str, Any]:
        return self.evaluation.describe()

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path, image_ids: Sequence[str]) -> None:
        """predictions.png: images and what `EnsembleRecipe.render` draws of them."""
        batch = {name: values[:SHOWN_IMAGES] for name, values in next(iter(batches())).items()}
        drawn = self.recipe.render(self.network, batch)
        if drawn:
            rows = {"image": unit_pixels(batch, self.recipe.size)[:, 0].cpu().numpy()}
            rows |= {name: images.cpu().numpy() / 255 for name, images in drawn.items()}
            figures.save_figure(figures.picture_rows(rows, image_ids[:SHOWN_IMAGES]), str(folder), "predictions.png")


def check_members(recipes: Sequence[Recipe]) -> None:
    """Raise UserError unless networks of these recipes can form an ensemble."""
    if not recipes:
        raise UserError("an ensemble needs at least one network, got none")
    first = recipes[0]
    for recipe in recipes:
        if recipe.family != first.family:
            raise UserError(
                f"an ensemble needs networks of one family, got {first.family} and {recipe.family}: train the "
                f"members with the same command"
            )
        for name in combinable(recipe).shared_settings():
            _check_alike(name, getattr(first, name), getattr(recipe, name))
    check_images(recipes)


def check_images(recipes: Sequence[Recipe]) -> None:
    """Raise UserError unless networks of these recipes see the same images, perhaps in different sizes."""
    first = recipes[0]
    for recipe in recipes:
        for name in STORED:
            _check_alike(name, getattr(first, name), getattr(recipe, name))
        contracts = first.input_contract, recipe.input_contract
        for name in ("crop", "resampling"):
            values = getattr(contracts[0], name), getattr(contracts[1], name)
            if values[0] != values[1]:
                raise UserError(
                    f"networks whose input has different {name} ({values[0]} and {values[1]}) cannot form an ensemble"
                )


def _check_alike(name: str, value: Any, other: Any) -> None:
    if value != other:
        raise UserError(
            f"networks with different {name} ({value} and {other}) cannot form an ensemble: train the members with "
            f"the same {name}"
        )


def check_crops(members: Sequence[Checkpoint]) -> None:
    """Raise UserError unless these checkpoints score images that are cropped in the same way."""
    crops = [_described(image_crop.of_checkpoint(member)) for member in members]
    for member, crop in zip(members, crops, strict=True):
        if crop != crops[0]:
            raise UserError(
                f"{members[0].uri} and {member.uri} are for images that are cropped differently, so they cannot form "
                f"an ensemble: train both with the same lung_crop or aligner"
            )


def join(members: Sequence[Checkpoint], data: str, target: str, device: torch.device) -> Checkpoint:
    """Write checkpoints of one family as a single checkpoint at the URI `target`, and load it.

    It contains copies of the members' weights. Its thresholds are chosen on its own predictions for the validation
    images of `data`. If members were trained in folds, the predictions for an image are combined only from members
    that were not trained on it.

    Args:
        data: shards that the members can score.

    Raises:
        UserError: the members differ in family, findings, crop, or settings that they must share; or `data` does not
            suit them.
    """
    first = members[0]
    for member in members:
        if member.findings != first.findings:
            raise UserError(
                f"{first.uri} and {member.uri} have different findings ({', '.join(first.findings)}; "
                f"{', '.join(member.findings)}), so they cannot form an ensemble: train both on the same archive"
            )
    check_crops(members)
    recipe = EnsembleRecipe.of([member.recipe for member in members])
    recipe = recipe.with_crop_checkpoint(checkpoint_files.crop_checkpoint_of(first.uri, recipe.crop_checkpoint))
    info = _suitable(data, recipe, first)
    buffers = combinable(recipe.first).decision_buffers
    network = Ensemble([copy.deepcopy(member.network) for member in members], first.findings, buffers).to(device)
    task = recipe.task(network.eval())
    with torch.inference_mode():
        metrics = task.evaluate_raw(_validation_predictions(recipe, network, info, device), SingleProcess())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(
            Path(folder),
            recipe,
            task,
            network.state_dict(),
            findings=first.findings,
            metrics=metrics,
            data=first.about.get("data"),
            reading=first.about.get("reading"),
        )
        return checkpoint.load(checkpoint_files.copy_for_scoring(folder, target))


def _described(crop: ImageCrop | None) -> dict[str, Any] | None:
    return crop.describe() if crop else None


def _suitable(data: str, recipe: EnsembleRecipe, first: Checkpoint) -> ShardInfo:
    """The shards `data`; raises UserError unless the members can be evaluated on them."""
    info = shards.read_info(data)
    check_pixels(info, recipe, image_crop.of_checkpoint(first))
    if {schema.LABELS, schema.BOXES} & {*recipe.columns} and info.findings != first.findings:
        raise UserError(
            f"{info.uri} has the findings {', '.join(info.findings)}, but the members of the ensemble predict "
            f"{', '.join(first.findings)}: use shards with the same findings in the same order"
        )
    return info


def _validation_predictions(
    recipe: EnsembleRecipe, network: Ensemble, info: ShardInfo, device: torch.device
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Batches of validation images, and the combined predictions of the members that were not trained on them."""
    folds = [fold_of(member) for member in recipe.recipes]
    for fold in dict.fromkeys(folds):
        stream = ShardStream(
            info, "val", recipe.columns, batch_size=BATCH, cache_bytes=0, mask_label=recipe.mask_label, fold=fold
        )
        members = [index for index, other in enumerate(folds) if other == fold]
        for batch in stream.every():
            on_device = to_device(batch, device)
            yield on_device, recipe.raw_predictions(network, on_device, members)
