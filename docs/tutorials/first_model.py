# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Train and use a first model
#
# This tutorial generates synthetic chest X-rays, trains a small lung segmentation network, saves it as a checkpoint,
# and applies the checkpoint to images that were not trained on. It uses plain PyTorch and takes about a minute on one
# CPU core: no Ray, no GPU, no download. The command `cxr train lungs` does the same on a cluster.
#
# Run it as a script (`python docs/tutorials/first_model.py`) or open it in Jupyter with jupytext.

# %%
from pathlib import Path

import pyarrow.compute as pc
import torch

from cxr import schema
from cxr.data.batch import Batch, to_columns, to_tensors
from cxr.data.decode import make_rows
from cxr.families import checkpoint
from cxr.families.base import SingleProcess
from cxr.families.lungs import LungsRecipe
from cxr.families.segmentation import MASK_VALUES
from cxr.phantom.archive import write_phantom
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from cxr.training.engine import Engine

OUT = Path("runs/tutorial")

# %% [markdown]
# ## An archive
#
# `write_phantom` writes synthetic X-rays in the layout of ChestX-ray14, with ground truth: lung masks, findings and
# boxes. `open_manifest` lists the images of an archive without decoding them; it reads a folder of your own images in
# the same way.

# %%
write_phantom(str(OUT / "phantoms"), 48, size=128, seed=0)
manifest = open_manifest(str(OUT / "phantoms"))
print(f"{manifest.table.num_rows} images, findings: {', '.join(manifest.findings[:3])}, …")

# %% [markdown]
# ## Batches
#
# `make_rows` decodes images and their masks to one size. If a file cannot be decoded, its row has the reason in the
# column `error`.

# %%
PIXELS = PixelFormat(64)


def batches(split: str, size: int = 8) -> list[Batch]:
    """The images of a split with their lung masks, `size` at a time."""
    decoded = make_rows(manifest.table.filter(pc.field(schema.SPLIT) == split), PIXELS)
    decoded = decoded.filter(decoded[schema.ERROR].is_null())
    columns = to_columns(decoded, (schema.PIXELS, schema.MASKS), PIXELS, mask_label=schema.LUNGS)
    whole = to_tensors(columns, PIXELS)
    return [
        {name: values[start : start + size] for name, values in whole.items()}
        for start in range(0, decoded.num_rows, size)
    ]


training, validation = batches("train"), batches("val")

# %% [markdown]
# ## Training
#
# A *recipe* holds the settings of one family of models. It creates the network and the *task*, which computes losses
# and metrics. `Engine` is the training loop that the `cxr` commands use, too.

# %%
torch.manual_seed(0)
recipe = LungsRecipe(size=64, epochs=6, warmup_size=0, warmup_epochs=0, batch_size=8, ema=0.0)
network = recipe.network(())
task = recipe.task(network)
task.begin(lambda: iter(training), SingleProcess())
metrics: dict[str, float] = {}
engine = Engine(task, recipe, SingleProcess(), steps_per_epoch=len(training), device=torch.device("cpu"))
for epoch in range(recipe.epochs):
    losses = engine.epoch(iter(training))
    metrics = engine.finish_epoch(lambda: iter(validation))
    print(f"epoch {epoch + 1}: loss {losses['loss']:.3f}, Dice {metrics['dice']:.3f}")

# %% [markdown]
# ## A checkpoint
#
# A checkpoint is a self-contained folder: weights, recipe, metrics, versions. `cxr score` applies it to archives.

# %%
saved = OUT / "checkpoint"
checkpoint.save(saved, recipe, task, network.state_dict(), findings=(), metrics=metrics)
loaded = checkpoint.load(str(saved))

# %% [markdown]
# ## Prediction
#
# The loaded network is on the CPU in evaluation mode. The recipe turns its outputs into predictions: here a
# probability map, which is thresholded at .5 to obtain the mask.

# %%
with torch.inference_mode():
    predicted = loaded.recipe.predict(loaded.network, validation[0])
for number, mask in enumerate(predicted[MASK_VALUES] >= 0.5):
    print(f"image {number}: the lungs cover {mask.float().mean():.0%} of the image")
