"""Family `pneumothorax`: finds air between lung and chest wall, which most images do not show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cxr import schema
from cxr.errors import UserError
from cxr.families.segmentation import SegmentationRecipe


@dataclass(frozen=True, kw_only=True)
class PneumothoraxRecipe(SegmentationRecipe):
    """Pneumothorax as SIIM-ACR (2019) marks it. Losses and rule are those of its winners.

    Three quarters of the images have nothing to find: an empty mask for every image has a mean Dice of .78 there.
    """

    family: ClassVar[str] = "pneumothorax"
    mask_label: ClassVar[str] = schema.PNEUMOTHORAX
    chooses_rule: ClassVar[bool] = True

    size: int = 512
    epochs: int = 20
    batch_size: int = 8
    lr: float = 5e-4
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    bce: float = 3.0
    focal: float = 4.0
    image_weight: float = 0.5
    positives_from: float = 0.0
    """Share of an epoch's images that show pneumothorax, in the first epoch; 0: images as they are."""
    positives_to: float = 0.0
    """The same in the last epoch; the winners' fell from .8 to .4. Between the two it changes evenly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = (self.positives_from, self.positives_to)
        if not all(0 <= share <= 1 for share in shares) or (0 in shares and any(shares)):
            raise UserError(
                f"positives_from={self.positives_from}, positives_to={self.positives_to}: wanted two shares above 0 "
                f"and up to 1, or 0 in both for images as they are"
            )

    @property
    def sampled_finding(self) -> str:
        return self.mask_label

    def positive_fraction_of(self, epoch: int) -> float | None:
        if not self.positives_from:
            return None
        done = epoch / max(1, self.total_epochs - 1)
        return self.positives_from + done * (self.positives_to - self.positives_from)
