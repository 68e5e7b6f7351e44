"""The options of `--plan`. This module imports neither torch nor Ray, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cxr.errors import UserError, check_least


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Show what the job needs instead of running it."""

    plan: bool = False
    """Print which resources the job needs and how long it will take, and exit. Nothing is written. Ray starts only to
    join the cluster in RAY_ADDRESS."""
    plan_images: int | None = None
    """Number of images to train on, ingest or score. Default: counted in the archive."""
    plan_cpus: int | None = None
    """Number of CPUs to plan for. Default: those of the cluster in RAY_ADDRESS, or of this machine."""
    plan_gpus: int | None = None
    """Number of GPUs to plan for. Default: those of the cluster in RAY_ADDRESS, or of this machine."""
    images_per_second: float | None = None
    """Measured speed of one training process, one CPU that ingests, or one replica that scores, in images per second.
    Default: the speed of an earlier run in OUT, if there is one."""

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        for name, value in given.items():
            option = f"--{name.replace('_', '-')}"
            if value is not None and not self.plan:
                raise UserError(f"{option} has an effect only with --plan: add --plan, or omit it")
        check_least(self, plan_images=1, plan_cpus=1, plan_gpus=0)
        if self.images_per_second is not None and not self.images_per_second > 0:
            raise UserError(f"images_per_second: expected a positive number, got {self.images_per_second:g}")
