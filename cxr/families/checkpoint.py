"""Saving and loading checkpoints; `checkpoint_files` lists the files of a checkpoint's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cxr import storage
from cxr.errors import UserError
from cxr.families import recipe_from_dict
from cxr.families.base import Recipe, Task
from cxr.families.checkpoint_files import ABOUT, CARD, CROPPED_BY, KIND, RESUME, TASK, VERSION, WEIGHTS, read_about
from cxr.families.model_card import model_card
from cxr.models import pretrained, weight_files
from cxr.models.input_contract import InputContract
from cxr.runtime import provenance


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; `network` is on the CPU in eval mode."""

    uri: str
    recipe: Recipe
    network: nn.Module
    findings: tuple[str, ...]
    about: dict[str, Any]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Decision thresholds that replace the checkpoint's own; see `families.thresholds_file`."""

    def task(self) -> Task:
        """The training task around the network, with the state it had besides the network."""
        task = self.recipe.task(self.network)
        restore_task_state(task, safetensors.torch.load(storage.read_bytes(storage.join(self.uri, TASK))))
        return task


def save(
    folder: Path,
    recipe: Recipe,
    task: Task,
    weights: Mapping[str, Tensor],
    *,
    findings: Sequence[str],
    metrics: Mapping[str, float],
    data: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None,
    resume: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of `task` to a local folder.

    Args:
        weights: the network state to score with.
        data: the images that it was trained on, for the model card: `source`, and `images` by split.
        reading: which images of the archive were used; see `ReadOptions.describe`.
        origin: where imported weights come from; see `families.public_weights`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weight_files.to_safetensors(weights))
    (folder / TASK).write_bytes(weight_files.to_safetensors(task_state(task)))
    if resume is not None:
        torch.save(dict(resume), folder / RESUME)
    about = {
        "kind": KIND,
        "version": VERSION,
        "recipe": recipe.to_dict(),
        "findings": list(findings),
        "input": recipe.input_contract.to_dict(),
        CROPPED_BY: recipe.crop_checkpoint,
        "metrics": dict(metrics),
        "data": dict(data or {}),
        "reading": dict(reading or {}),
        "learned": task.describe(),
        **({"origin": dict(origin)} if origin else {}),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    (folder / CARD).write_text(model_card(about))
    storage.write_json(str(folder / ABOUT), about)


def read_resume(folder: Path) -> dict[str, Any]:
    """The `resume` that `save` wrote to a local folder; never runs a pickle's code.

    Raises:
        UserError: it is damaged, or holds other objects than tensors and plain values.
    """
    return weight_files.load((folder / RESUME).read_bytes(), RESUME)


def load(uri: str) -> Checkpoint:
    """Load a checkpoint folder from any URI.

    Raises:
        UserError: there is no checkpoint, it has another version, or its weights are damaged.
    """
    uri = storage.normalize(uri)
    about = read_about(uri)
    recipe = recipe_from_dict(about["recipe"])
    data = storage.read_bytes(storage.join(uri, WEIGHTS))
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise UserError(
            f"{uri}/{WEIGHTS} is damaged: its SHA-256 differs from the one in {ABOUT}. Copy the checkpoint again"
        )
    network = recipe.network(about["findings"])
    if differences := recipe.input_contract.differences(InputContract.from_dict(about["input"])):
        raise UserError(
            f"{uri} has weights for other inputs than its recipe gives them ({'; '.join(differences)}): use the "
            f"version of cxr that wrote it, or train again"
        )
    state = safetensors.torch.load(data)
    try:
        pretrained.load(network, state, "the network", exact=True)
    except ValueError as error:
        raise UserError(
            f"{uri} does not contain the weights of the network that its recipe describes: {error}. Use "
            f"another checkpoint"
        ) from error
    return Checkpoint(uri, recipe, network.eval(), tuple(about["findings"]), about)


def check_same_settings(about: Mapping[str, Any], recipe: Recipe, findings: Sequence[str]) -> None:
    """Raise UserError unless training can resume from a checkpoint: only how long to train may have changed."""
    changed = recipe.changes_from(about["recipe"], free=recipe.may_change_on_resume)
    if list(findings) != about["findings"]:
        changed.append("the archive has different findings")
    if changed:
        raise UserError(
            f"the run to resume has different settings ({'; '.join(changed)}): use the same settings, or another "
            f"--out"
        )


def averaged(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each floating-point tensor, including batch-norm statistics; other tensors are the first
    state's."""
    return {
        name: _mean([state[name] for state in states]) if value.is_floating_point() else value
        for name, value in states[0].items()
    }


def _mean(values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)


def task_state(task: Task) -> dict[str, Tensor]:
    """Persistent buffers of the task itself, without its networks."""
    state = task.state_dict()
    return {name: state[name] for name, _ in task.named_buffers(recurse=False) if name in state}


def restore_task_state(task: Task, state: Mapping[str, Tensor]) -> None:
    """Restore what `task_state` returned. Shapes are taken from the state, since `begin` may have set them."""
    for name, values in state.items():
        task.register_buffer(name, values.to(next(task.network.parameters()).device))
