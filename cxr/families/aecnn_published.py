"""AE-CNN with the settings of the paper."""

from __future__ import annotations

import dataclasses

from cxr.families.aecnn import AecnnRecipe


def published(**changes: object) -> AecnnRecipe:
    """The recipe of Ranjan et al. 2018: mean AUROC .8241 on ChestX-ray14 (DenseNet-201), 35.8 dB on patches.

    Otherwise than there, learning rates rise, then fall along a cosine, not by tenths every 5 epochs; the optimizer
    is AdamW, gradients are clipped, the three stages share a batch size, and batch norm adapts throughout. Needs
    images stored at 1024 px. The classifier starts from ImageNet weights where they can be fetched.
    """
    recipe = AecnnRecipe(
        size=1024,
        crop=896,
        patch=128,
        compressor="published",
        clip_latent=False,
        classifier="densenet201",
        classifier_weights="auto",
        batch_size=8,
        epochs=15,
        classifier_epochs=15,
        autoencoder_epochs=5,
        lr=1e-4,
        classifier_lr=1e-4,
        autoencoder_lr=1e-3,
        weight_decay=1e-5,
        test="ten",
    )
    return recipe.replace(**changes)


def as_published(given: AecnnRecipe) -> AecnnRecipe:
    """The published recipe, with what `given` has otherwise than by default."""
    usual = dataclasses.asdict(AecnnRecipe())
    return published(**{name: value for name, value in dataclasses.asdict(given).items() if value != usual[name]})
