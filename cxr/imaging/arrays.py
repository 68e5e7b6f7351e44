"""X-rays that a program already holds as arrays, checked and converted like image files."""

from __future__ import annotations

import numpy as np

from cxr.errors import ImageRejectedError
from cxr.imaging.image import Image, full_range, to_gray

_HINT = "pass the DICOM file or dataset itself if you have it, so that its display settings are applied"


def image_from_array(array: np.ndarray) -> Image:
    """An image from pixels (H, W), (H, W, 1), or (H, W, 3) or (H, W, 4) in RGB(A) order; dense tissue is bright.

    uint8 and uint16 are read like the samples of a PNG file: 16-bit pixels that use only lower bits, such as 12-bit
    X-rays, are shifted to the full range. Floats must be in [0, 1].

    Raises:
        ImageRejectedError: another shape, type or range, or a color image.
    """
    gray_or_color = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not gray_or_color or not array.size:
        raise ImageRejectedError(
            f"array of shape {array.shape}: expected (height, width), or (height, width, 3) in RGB, of one image; "
            f"pass several images as a list"
        )
    native = array.dtype.newbyteorder("=")
    if native in (np.uint8, np.uint16):
        pixels = array.astype(native, copy=False)
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also if one of them is not a number
            raise ImageRejectedError(
                f"float array: expected values from 0 to 1, got {low:g} to {high:g}; scale it to 0 to 1, or {_HINT}"
            )
        pixels = np.rint(array.astype(np.float32) * np.float32(65535)).astype(np.uint16)
    else:
        raise ImageRejectedError(
            f"{array.dtype} array: expected uint8, uint16, or floats from 0 to 1; convert it, or {_HINT}"
        )
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else to_gray(pixels[..., 2::-1])
    is_float = array.dtype.kind == "f"
    return Image(np.ascontiguousarray(pixels if is_float else full_range(pixels)))
