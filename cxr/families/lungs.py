"""Family `lungs`: segments both lung fields, for cropping images to them and for measurements."""

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
    """Segments both lung fields as one mask; needs lung masks, as montgomery, shenzhen, jsrt and phantoms have."""

    family: ClassVar[str] = "lungs"
    mask_label: ClassVar[str] = schema.LUNGS
    measures_distance: ClassVar[bool] = True
    rule: ClassVar[MaskRule] = MaskRule(top=0.5, min_area=0, bottom=0.5)

    epochs: int = 30
    warmup_size: int = 128
    warmup_epochs: int = 50
    batch_size: int = 4
    lr: float = 2e-3
    ema: float = 0.996
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    architecture: Architecture = "small_unet"
    rotation_deg: float = 12.0
    max_zoom: float = 1.16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lung_crop:
            raise UserError(f"lung_crop: expected nothing, got {self.lung_crop}. Lungs are segmented in whole images")

    def cleaned(self, values_HW: np.ndarray) -> np.ndarray:
        """The values of the two largest components; all others become 0."""
        mask = values_HW >= 0.5
        return np.where(mask & ~largest_two(mask), 0, values_HW)
