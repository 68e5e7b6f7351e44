"""fit() with an average of the best epochs: made if a run stopped before it, and kept if the run resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.training.fit import fit
from cxr.training.options import RunOptions
from cxr.training.run_log import best_row, read_metrics
from tests.made_shards import write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]
RECIPE = AlignRecipe(size=32, epochs=3, batch_size=8, backbone="conv3", lungs=False)


def test_an_averaged_network_competes_with_the_best_epoch(tmp_path: Path) -> None:
    made, out = write_shards(tmp_path / "shards", {"train": 32, "val": 9}, size=32), str(tmp_path / "out")
    fit(RECIPE, made, out, RunOptions(workers=2, keep_checkpoints=3))
    epochs = read_metrics(out)
    fitted = fit(
        RECIPE, made, out, RunOptions(workers=2, average_checkpoints=2), resume=True
    )  # as if killed before the average
    rows = read_metrics(out)
    assert rows[:3] == epochs
    assert [(row["epoch"], row["stage"]) for row in rows[3:]] == [(3, "average")]
    values = {row["epoch"]: row[RECIPE.monitor] for row in epochs}
    assert rows[3]["averaged"] == sorted(sorted(values, key=lambda epoch: values[epoch])[-2:])
    kept = [checkpoint.load(f"{out}/train/epoch_{epoch:04d}").network.state_dict() for epoch in rows[3]["averaged"]]
    mean = checkpoint.load(f"{out}/train/{rows[3]['checkpoint']}").network.state_dict()
    for name, value in checkpoint.averaged(kept).items():
        torch.testing.assert_close(mean[name], value, atol=1e-6, rtol=1e-5)
    assert fitted.epochs == 3
    longer = fit(RECIPE.replace(epochs=4), made, out, RunOptions(workers=2, average_checkpoints=2), resume=True)
    assert [(row["epoch"], row["stage"]) for row in read_metrics(out)[3:]] == [
        (3, "average"),
        (4, ""),
        (4, "average"),
    ]
    best = best_row(read_metrics(out), RECIPE)
    assert best is not None
    assert longer.metrics[RECIPE.monitor] == best[RECIPE.monitor]
