"""Family `pneumothorax`: segments air between lung and chest wall, which most images do not show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cxr import schema
from cxr.errors import UserError
from cxr.families.segmentation import SegmentationRecipe


@dataclass(frozen=True, kw_only=True)
class PneumothoraxRecipe(SegmentationRecipe):
    """Segments pneumothorax as annotated for SIIM-ACR (2019), with the losses and the mask rule of its winners.

    More than three quarters of its images are negative: an empty mask for every image has a mean Dice of .78.
    """

    family: ClassVar[str] = "pneumothorax"
    mask_label: ClassVar[str] = schema.PNEUMOTHORAX
    chooses_rule: ClassVar[bool] = True

    size: int = 512
    epochs: int = 20
    batch_size: int = 8
    lr: float = 5e-4
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    bce_weight: float = 3.0
    focal_weight: float = 4.0
    image_weight: float = 0.5
    positive_fraction_start: float = 0.0
    """Fraction of images with a pneumothorax in the first epoch. 0: as in the archive."""
    positive_fraction_end: float = 0.0
    """The same fraction in the last epoch, with a linear change in between. The winners used .8 and .4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fractions = (self.positive_fraction_start, self.positive_fraction_end)
        if not all(0 <= fraction <= 1 for fraction in fractions) or (0 in fractions and any(fractions)):
            raise UserError(
                f"expected positive_fraction_start and positive_fraction_end both above 0 and at most 1, or both 0 "
                f"for the images as they are, got {self.positive_fraction_start} and {self.positive_fraction_end}"
            )

    @property
    def sampled_finding(self) -> str:
        return self.mask_label

    def positive_fraction_of(self, epoch: int) -> float | None:
        if not self.positive_fraction_start:
            return None
        progress = epoch / max(1, self.total_epochs - 1)
        start, end = self.positive_fraction_start, self.positive_fraction_end
        return start + progress * (end - start)
