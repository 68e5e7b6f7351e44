"""How an aligner is trained and judged: its target, its loss terms, its metrics and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import schema
from cxr.augment.affine_exposure import random_affine, random_exposure
from cxr.data.batch import NO_MASK, Batch
from cxr.errors import UserError
from cxr.families import lung_pretraining
from cxr.families.base import Batches, Communicator, Task, unit_pixels
from cxr.metrics import alignment
from cxr.metrics.meters import Mean
from cxr.models import pretrained
from cxr.models.backbones import normalise_contrast
from cxr.models.perceptual import as_unit, feature_distance
from cxr.models.small_unet import soft_dice
from cxr.models.spatial_transformer import (
    compose,
    corner_distance,
    frame_distance,
    identity,
    invert,
    warp,
)
from cxr.reporting import figures

Strategy = Literal["mean", "features", "structure"]

NEIGHBORHOODS = (0.12, 0.4)  # sides of the squares in which structure is compared, shares of the width
MASKS_COMPARED = 512  # over all workers
WARPS = 4  # of each validation image, from which its lungs must land in the same place
WARPS_DRAWN, SHOWN = "warps", "shown"  # of an augmented batch; see `AlignTask.augmented`
PICTURED = 64  # images in the mean before and after
ROWS_PICTURED = 8


@dataclass(frozen=True)
class TermWeights:
    """Weight of each loss term, 0 to leave it out; the first needs a network that sees lungs."""

    overlap: float
    pixel: float
    feature: float
    structure: float
    equivariance: float
    identity: float


@dataclass(frozen=True)
class Augmentation:
    """Largest random warps of training images; see `imaging.augment.random_affine`."""

    rotation_deg: float
    scale: float
    shift: float

    def affine(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """`count` random warps on `device`; see `random_affine`."""
        return random_affine(
            count,
            rotation_deg=self.rotation_deg,
            scale=self.scale,
            shift=self.shift,
            device=device,
            generator=generator,
        )


class AlignTask(Task):
    """An aligner, the target that it aligns to, and a frozen network that compares the two.

    All pictures that are compared are contrast-normalized, so that 0 (outside of the image) is neutral.

    Args:
        network: images in [0, 1] (B, 1, size, size) to transforms (B, 2, 3).
        features: contrast-normalized images to feature maps; see `models.perceptual`.
        target_HW: a target to keep; else `strategy` says how it is made.
        lung_weights: URI of weights for `network.lungs`, if that is not None; read when training begins.
    """

    target: Tensor
    lung_target: Tensor

    def __init__(
        self,
        network: nn.Module,
        features: nn.Module,
        *,
        size: int,
        strategy: Strategy,
        terms: TermWeights,
        augmentation: Augmentation,
        target_HW: Tensor | None = None,
        lung_weights: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.features = network, features
        self.size, self.terms, self.augmentation, self.seed = size, terms, augmentation, seed
        self.lung_weights = lung_weights
        self.strategy = "given" if target_HW is not None else strategy
        given = torch.zeros(size, size) if target_HW is None else target_HW.float()
        target = F.interpolate(given[None, None], (size, size), mode="bilinear", antialias=True)
        self.register_buffer("target", target)
        self.register_buffer("lung_target", torch.zeros_like(target))
        self.feature_targets: tuple[str, ...] = ()  # names of buffers, shallow to deep
        if self.strategy == "features":
            self._keep_features([torch.zeros_like(values) for values in self.features(target)])
        self._seen, self._frames = Mean(), Mean()

    def begin(self, batches: Batches, workers: Communicator) -> None:
        """Make the target from the training images as they are.

        Raises:
            UserError: the network sees lungs, and nobody has taught it what they are.
        """
        if self._lung_network is not None:
            if not self.lung_weights:
                raise UserError(
                    "no lung_weights: call recipe.pretrain_shared(out) first, which teaches the lung network"
                )
            self._lung_network.load_state_dict(lung_pretraining.matched(pretrained.from_uri(self.lung_weights)))
        if self.strategy == "given":
            self.lung_target = self._lungs(self.target)
            return
        image, lungs, features = Mean(), Mean(), [Mean() for _ in self.feature_targets]
        with torch.no_grad():
            for batch in batches():
                z = normalise_contrast(unit_pixels(batch, self.size))
                image.add(z)
                lungs.add(self._lungs(z))
                for meter, values in zip(features, self.features(z) if features else (), strict=True):
                    meter.add(values)
        self.target = normalise_contrast(image.over(workers, self.target[0])[None].float())
        self.lung_target = lungs.over(workers, self.target[0])[None].float()
        likes = [self.get_buffer(name)[0] for name in self.feature_targets]
        self._keep_features(
            [meter.over(workers, like)[None].float() for meter, like in zip(features, likes, strict=True)]
        )

    @property
    def _lung_network(self) -> nn.Module | None:
        return getattr(self.network, "lungs", None)

    @torch.no_grad()
    def _lungs(self, z_B1HW: Tensor) -> Tensor:
        """Lung fields of contrast-normalized images, (B, 1, H, W); empty from a network that sees none."""
        return torch.zeros_like(z_B1HW) if self._lung_network is None else self._lung_network(z_B1HW)

    def augmented(self, batch: Batch) -> Batch:
        """Two random warps of each image, and how these look in another exposure.

        pixels: (B, size, size), as stored but for their size. warps: (2B, 2, 3), those of all images twice. shown:
        what the network sees, (2B, 1, size, size).
        """
        x = unit_pixels(batch, self.size)
        warps = self.augmentation.affine(2 * len(x), x.device)
        shown = random_exposure(warp(x.repeat(2, 1, 1, 1), warps))
        return batch | {schema.PIXELS: x[:, 0], WARPS_DRAWN: warps, SHOWN: shown}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Align two random warps of each image; compare the results with the target and with each other."""
        z = normalise_contrast(unit_pixels(batch, self.size))
        shown = torch.cat([z, self._lungs(z)], 1).repeat(2, 1, 1, 1)
        frames = compose(batch[WARPS_DRAWN], self.network(batch[SHOWN]))  # of the images as stored
        aligned = warp(shown, frames)
        if self.strategy == "structure":
            self._seen.add(aligned)
            self._frames.add(frames)
        return self._terms(aligned, frames)

    def _terms(self, aligned_B2HW: Tensor, frames: Tensor) -> dict[str, Tensor]:
        aligned, lungs = aligned_B2HW.split(1, 1)
        one, two = frames.chunk(2)
        sides = [int(self.size * share) // 2 * 2 + 1 for share in NEIGHBORHOODS]
        measures = {
            "overlap": lambda: (1 - soft_dice(lungs, self.lung_target)).mean(),
            "pixel": lambda: (aligned - self.target).square().mean(),
            "feature": lambda: feature_distance(self.features(aligned), self._wanted_features()),
            "structure": lambda: torch.stack(
                [1 - alignment.local_correlation(aligned, self.target, side).mean() for side in sides]
            ).mean(),
            "equivariance": lambda: frame_distance(one, two).mean(),
            "identity": lambda: corner_distance(self._mean_of_all(frames), identity(1, frames.device)).mean(),
        }
        return {name: weight * measures[name]() for name, weight in vars(self.terms).items() if weight}

    def _mean_of_all(self, frames: Tensor) -> Tensor:
        """(1, 2, 3) over the images of all workers: the distance of a mean is not the mean of distances."""
        return self.workers.all_rows(frames).mean(0, True)

    def end_epoch(self, workers: Communicator) -> None:
        """Under "structure", take the mean of what was aligned in this epoch as the next target.

        Its mean transform is removed, else the frame drifts; its contrast is restored, else it fades.
        """
        if self.strategy != "structure":
            return
        mean = self._seen.over(workers, torch.cat([self.target, self.lung_target], 1)[0])[None].float()
        drift = self._frames.over(workers, identity(1, mean.device)[0])[None].float()
        image, self.lung_target = warp(mean, invert(drift)).split(1, 1)
        self.target = normalise_contrast(image)
        self._seen, self._frames = Mean(), Mean()

    @torch.no_grad()
    def evaluate(self, batches: Batches, workers: Communicator) -> dict[str, float]:
        """Metrics of `metrics.alignment`, all with the group's mean transform removed.

        Always: agreement, the mean IoU of pairs of the lung fields that the network finds, each aligned from
        some random warps of its image, or the correlation if it looks for none; correlation, spread;
        consistency_pct, the distance between the frames found before and after a random warp; mean_scale,
        drift_pct and mirrored, by which `alignment.degenerate` judges. With lung masks: iou_aligned. With known
        poses: corner_error_pct (mean) and corner_error_median_pct. Names with `given` tell the same of the
        images as they are; distances are in % of the width.
        """
        device = self.target.device
        frames, mirrored, consistency, known = Mean(), Mean(), Mean(), [torch.zeros(0, 12, device=device)]
        generator = torch.Generator().manual_seed(self.seed + workers.rank)
        for x, theta, batch in self._aligned(batches):
            frames.add(theta)
            mirrored.add(alignment.mirrored(theta))
            warps = self.augmentation.affine(len(x), device, generator)
            consistency.add(frame_distance(compose(warps, self.network(warp(x, warps))), theta))
            known.append(_known_poses(theta, batch))
        mean_theta = frames.over(workers, identity(1, device)[0])[None].float()
        number = torch.zeros((), device=device)
        return {
            **self._overlap(batches, workers, mean_theta),
            "consistency_pct": 100 * float(consistency.over(workers, number)),
            **_pose_metrics(workers.gather(torch.cat(known))),
            "mean_scale": float(alignment.mean_scale(mean_theta)),
            "drift_pct": 100 * float(alignment.middle_shift(mean_theta)),
            "mirrored": float(mirrored.over(workers, number)),
        }

    def _overlap(self, batches: Batches, workers: Communicator, mean_theta: Tensor) -> dict[str, float]:
        device, kept = self.target.device, -(-MASKS_COMPARED // workers.size)
        given, aligned, found = (alignment.Overlap(self.size, device, kept) for _ in range(3))
        generator = torch.Generator().manual_seed(self.seed + workers.rank)
        for x, theta, batch in self._aligned(batches):
            centerd = alignment.centerd(theta, mean_theta)
            for overlap, shown in ((given, identity(len(x), device)), (aligned, centerd)):
                overlap.add(x, shown)
                if schema.MASKS in batch:
                    present = batch[schema.MASKS][:, 0, 0] != NO_MASK
                    overlap.add_masks(batch[schema.MASKS][present], shown[present])
            if self._lung_network is not None and not found.full:
                lungs = self._lungs(normalise_contrast(x))[:, 0]
                for _ in range(WARPS):
                    warps = self.augmentation.affine(len(x), device, generator)
                    moved = compose(warps, self.network(warp(x, warps)))
                    found.add_masks(lungs, alignment.centerd(moved, mean_theta))
        after, before = aligned.results(workers), given.results(workers)
        metrics = {
            "agreement": found.iou(workers, of_empty=0.0) if self._lung_network is not None else after["correlation"],
            "correlation": after["correlation"],
            "correlation_given": before["correlation"],
            "spread": after["spread"],
            "spread_given": before["spread"],
        }
        if "iou" in after:
            metrics |= {"iou_aligned": after["iou"], "iou_given": before["iou"]}
        return metrics

    @torch.inference_mode()
    def save_pictures(self, batches: Batches, folder: Path) -> None:
        """before_after.png, mean_before_after.png, target.png; and target.pt, (H, W) for `target_uri`."""
        given, aligned, count = [], [], 0
        for x, theta, _ in self._aligned(batches):
            given.append(x[:, 0].cpu())
            aligned.append(warp(x, theta)[:, 0].cpu())
            count += len(x)
            if count >= PICTURED:
                break
        before, after = torch.cat(given).numpy(), torch.cat(aligned).numpy()
        target = self.target[0, 0].cpu()
        rows = {"given": before[:ROWS_PICTURED], "aligned": after[:ROWS_PICTURED]}
        figures.save_figure(figures.picture_rows(rows), str(folder), "before_after.png")
        means = {
            "mean as given": before.mean(0),
            "mean aligned": after.mean(0),
            "target": as_unit(target).numpy(),
        }
        figures.save_figure(figures.pictures(means), str(folder), "mean_before_after.png")
        figures.save_gray(as_unit(target).numpy(), str(folder), "target.png")
        torch.save(target.clone(), folder / "target.pt")

    def _aligned(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor, Batch]]:
        """Each batch's images in [0, 1] and the transforms found for them."""
        for batch in batches():
            x = unit_pixels(batch, self.size)
            yield x, self.network(x), batch

    def _wanted_features(self) -> list[Tensor]:
        if self.feature_targets:
            return [self.get_buffer(name) for name in self.feature_targets]
        return self.features(self.target)

    def _keep_features(self, features: list[Tensor]) -> None:
        self.feature_targets = tuple(f"feature_target_{i}" for i in range(len(features)))
        for name, values in zip(self.feature_targets, features, strict=True):
            self.register_buffer(name, values)


def _known_poses(theta: Tensor, batch: Batch) -> Tensor:
    """Rows (K, 12) of found and known transforms of the batch's K images whose pose is known."""
    if schema.TRUE_THETA not in batch:
        return theta.new_zeros(0, 12)
    pose = batch[schema.TRUE_THETA]
    return torch.cat([theta.flatten(1), pose], 1)[~pose.isnan().any(1)]


def _pose_metrics(rows_12: Tensor) -> dict[str, float]:
    if not len(rows_12):
        return {}
    found, pose = (rows.reshape(-1, 2, 3) for rows in rows_12.split(6, 1))
    errors = 100 * alignment.pose_errors(found, pose)
    given = 100 * alignment.pose_errors(identity(len(pose), pose.device), pose)
    return {
        "corner_error_pct": float(errors.mean()),
        "corner_error_median_pct": float(errors.quantile(0.5)),
        "corner_error_given_pct": float(given.mean()),
    }
