"""Family `lungs`: finds both lung fields, for crops around them and for measures of size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from cxr import schema
from cxr.errors import UserError
from cxr.families.segmentation import Architecture, SegmentationRecipe
from cxr.imaging.lung_bbox import largest_two
from cxr.metrics.segmentation.mask_thresholds import MaskRule


@dataclass(frozen=True, kw_only=True)
class LungsRecipe(SegmentationRecipe):
    """Both lung fields as one mask, from archives with lung masks: `montgomery`, `shenzhen`, `jsrt`, phantoms."""

    family: ClassVar[str] = "lungs"
    mask_label: ClassVar[str] = schema.LUNGS
    measures_distance: ClassVar[bool] = True
    rule: ClassVar[MaskRule] = MaskRule(top=0.5, min_area=0, bottom=0.5)

    epochs: int = 30
    first_size: int = 128
    first_epochs: int = 50
    batch_size: int = 4
    lr: float = 2e-3
    ema: float = 0.996
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    architecture: Architecture = "small_unet"
    rotation_deg: float = 12.0
    scale: float = 1.16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lung_crop:
            raise UserError(f"lung_crop={self.lung_crop}: lungs are sought in whole images. Leave it out")

    def cleaned(self, shares_HW: np.ndarray) -> np.ndarray:
        """Shares without specks: only the two largest components stay."""
        found = shares_HW >= 0.5
        return np.where(found & ~largest_two(found), 0, shares_HW)
