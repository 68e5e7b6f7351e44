"""Images with the outlines of ground-truth or predicted boxes and masks, for the pictures that families make."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr.reporting import palette

Color = tuple[int, int, int]  # red, green and blue, 0 to 255
TRUTH_COLOR, PREDICTION_COLOR = palette.rgb(palette.TRUTH), palette.rgb(palette.PREDICTION)


def outlined_boxes(x_B1HW: Tensor, boxes_BN4: Tensor, color: Color = PREDICTION_COLOR) -> Tensor:
    """Images in [0, 1] with outlines of boxes (fractions of the image, or NaN), uint8 (B, H, W, 3) on the CPU."""
    pictures = (x_B1HW[:, 0, :, :, None].expand(-1, -1, -1, 3) * 255).round().to(torch.uint8).cpu().numpy().copy()
    size = np.array([x_B1HW.shape[-1], x_B1HW.shape[-2]] * 2)
    for picture, boxes in zip(pictures, boxes_BN4.cpu().numpy(), strict=True):
        for box in boxes[~np.isnan(boxes[:, 0])]:
            left, top, right, bottom = np.rint(box.clip(0, 1) * size).astype(int).tolist()
            cv2.rectangle(picture, (left, top), (right - 1, bottom - 1), color, max(1, picture.shape[0] // 256))
    return torch.from_numpy(pictures)


def outlined_masks(x_B1HW: Tensor, mask_BHW: Tensor, color: Color = PREDICTION_COLOR) -> Tensor:
    """Images in [0, 1] with the outlines of their bool masks, uint8 (B, H, W, 3)."""
    mask = mask_BHW[:, None].float()
    edge = F.max_pool2d(mask, 3, 1, 1) - mask
    paint = torch.tensor(color, device=x_B1HW.device).view(3, 1, 1) / 255
    return ((1 - edge) * x_B1HW + edge * paint).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
