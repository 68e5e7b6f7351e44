"""A training loop without this project, for comparison: batches in memory, a loss, an optimizer. Imports no Ray."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cxr.data.batch import Batch
from cxr.families.base import Recipe, Task
from cxr.training.engine import casts


class BareLoop:
    """Steps with a task's own losses, in the recipe's first stage."""

    def __init__(self, task: Task, recipe: Recipe, device: torch.device) -> None:
        self.task, self.clip, self.casts = task.to(device).train(), recipe.clip, casts(recipe.precision, device)
        task.enter_stage(recipe.stages()[0].name)
        if self.casts:
            task.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """A step for each batch on the device; the last loss."""
        loss = torch.zeros(())
        for batch in batches:
            augmented = self.task.augment(batch)
            with torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16, enabled=self.casts):
                terms = self.task(augmented)
            loss = torch.stack(list(terms.values())).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self.optimizer.step()
        return loss.detach()
