"""An image with its findings drawn, as a secondary capture (PS3.3 A.8) that every viewer shows.

The image keeps its size if that is sensible for a screen. Beside it, a panel lists findings and probabilities. "NOT
FOR DIAGNOSIS" is burned into the image and into the panel.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from highdicom.sc import SCImage
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, uid
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes

from cxr.export.dicom_objects import NOT_FOR_DIAGNOSIS, common_arguments, to_file
from cxr.export.dicom_results import Algorithm, ImageResult
from cxr.export.dicom_source import SourceImage
from cxr.reporting.palette import MARK, PREDICTION, rgb
from cxr.sources import rle

SHORTEST_PX, LONGEST_PX = 1024, 2048  # limits of the longer side of the drawn image
_TEXT_SHARE = 1 / 56  # height of a letter, of the longer side
_PANEL_LETTERS = 21  # width of the panel, in heights of a letter
_WHITE, _GRAY = (235, 235, 235), (150, 150, 150)
_DERIVATION = "Findings of an algorithm drawn over the image. Not for diagnosis."


def secondary_capture(source: SourceImage, result: ImageResult, algorithm: Algorithm, pixels: np.ndarray) -> bytes:
    """The file of the picture, JPEG-compressed.

    Args:
        pixels: the displayed original, (height, width), uint8 or uint16, dense tissue bright.
    """
    picture = drawn(pixels, result, algorithm)
    reference = source.reference
    made = SCImage(
        pixel_array=picture,
        photometric_interpretation="YBR_FULL_422",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=source.study_uid,
        patient_orientation=("L", "F"),  # replaced below; the constructor accepts no unknown one
        transfer_syntax_uid=uid.JPEGBaseline8Bit,
        **common_arguments(source, algorithm, "sc"),
    )
    made.PatientOrientation = reference.PatientOrientation
    made.BodyPartExamined = "CHEST"
    made.ConversionType = "WSD"
    made.BurnedInAnnotation = "YES"
    made.ImageComments = NOT_FOR_DIAGNOSIS
    made.DerivationDescription = _DERIVATION
    made.SourceImageSequence = [_source_reference(source)]
    made.LossyImageCompression = "01"
    ratio, method = round(picture.nbytes / max(len(made.PixelData), 1), 2), "ISO_10918_1"
    before = reference.get("LossyImageCompressionRatio"), reference.get("LossyImageCompressionMethod")
    made.LossyImageCompressionRatio = [*_values(before[0]), ratio] if all(before) else ratio
    made.LossyImageCompressionMethod = [*_values(before[1]), method] if all(before) else method
    return to_file(made, source)


def drawn(pixels: np.ndarray, result: ImageResult, algorithm: Algorithm) -> np.ndarray:
    """The picture: (H, W, 3) uint8, the image at the left and the panel at the right."""
    height, width = pixels.shape
    scale = float(np.clip(max(pixels.shape), SHORTEST_PX, LONGEST_PX)) / max(pixels.shape)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    size = round(width * scale), round(height * scale)
    gray = cv2.resize(
        pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8), size, interpolation=method
    )
    letter = max(12, round(_TEXT_SHARE * max(size)))
    canvas = Image.new("RGB", (size[0] + _PANEL_LETTERS * letter, size[1]))
    canvas.paste(Image.fromarray(gray).convert("RGB"))
    draw = ImageDraw.Draw(canvas)
    if result.mask is not None and result.has_mask:
        mask = rle.decode(result.mask.rle, height, width)
        shown = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        for outline in cv2.findContours(shown, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]:
            points = [tuple(point) for point in outline[:, 0].tolist()]
            draw.line([*points, points[0]], fill=rgb(PREDICTION), width=max(2, letter // 10))
    _draw_boxes(draw, result, scale, size, letter)
    _draw_banner(draw, size, letter)
    _draw_panel(draw, result, algorithm, size, letter)
    return np.asarray(canvas)


def _draw_boxes(
    draw: ImageDraw.ImageDraw, result: ImageResult, scale: float, size: tuple[int, int], letter: int
) -> None:
    """Boxes with their labels, the best one last, so that it is in front."""
    from cxr.reporting.overlays import free_places

    font = _font(letter)
    boxes = sorted(result.boxes, key=lambda box: box.score)
    corners = [[corner * scale for corner in box.corners] for box in boxes]
    labels = [f"{_shown(box.label)} {box.score:.2f}" for box in boxes]
    for box in corners:
        draw.rectangle(box, outline=rgb(PREDICTION), width=max(2, letter // 8))
    for (x, y), label in zip(free_places(corners, labels, size, letter), labels, strict=True):
        left, top, right, bottom = draw.textbbox((x, y), label, font=font)
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=(0, 0, 0))
        draw.text((x, y), label, font=font, fill=rgb(PREDICTION))


def _draw_banner(draw: ImageDraw.ImageDraw, size: tuple[int, int], letter: int) -> None:
    """The warning at the bottom of the image, in the middle."""
    font = _font(round(1.3 * letter))
    left, top, right, bottom = draw.textbbox((0, 0), NOT_FOR_DIAGNOSIS, font=font)
    x, y = (size[0] - (right - left)) // 2, size[1] - (bottom - top) - 2 * letter
    margin = letter // 2
    draw.rectangle((x - margin, y - margin, x + right - left + margin, y + bottom - top + margin), fill=rgb(MARK))
    draw.text((x - left, y - top), NOT_FOR_DIAGNOSIS, font=font, fill=(255, 255, 255))


def _draw_panel(
    draw: ImageDraw.ImageDraw, result: ImageResult, algorithm: Algorithm, size: tuple[int, int], letter: int
) -> None:
    """The algorithm, and a line for each finding: present ones first, then by probability."""
    x, y = size[0] + letter, letter
    right = size[0] + (_PANEL_LETTERS - 1) * letter
    step = round(1.5 * letter)
    draw.text((x, y), NOT_FOR_DIAGNOSIS, font=_font(letter, bold=True), fill=rgb(MARK))
    draw.text((x, y + step), algorithm.name[:30], font=_font(letter), fill=_WHITE)
    draw.text((x, y + 2 * step), algorithm.version, font=_font(round(0.7 * letter)), fill=_GRAY)
    y += round(3.5 * step)
    findings = sorted(result.findings, key=lambda f: (not f.present, -(f.probability or 0.0)))
    room = max(0, (size[1] - letter - y) // step)
    shown = findings if len(findings) <= room else findings[: max(0, room - 1)]
    for finding in shown:
        color = rgb(PREDICTION) if finding.present else _GRAY
        number = "" if finding.probability is None else f"{finding.probability:.2f}"
        if finding.threshold is not None and finding.probability is not None:
            number += f"  ({'≥' if finding.present else '<'} {finding.threshold:.2f})"
        number = number or ("present" if finding.present else "absent")
        draw.text((x, y), _shown(finding.name)[:22], font=_font(letter, bold=bool(finding.present)), fill=color)
        draw.text((right, y), number, font=_font(letter), fill=color, anchor="ra")
        y += step
    if len(shown) < len(findings):
        draw.text((x, y), f"and {len(findings) - len(shown)} more", font=_font(letter), fill=_GRAY)


def _shown(finding: str) -> str:
    return finding.replace("_", " ")


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf", size)


def _source_reference(source: SourceImage) -> Dataset:
    from highdicom.sr import CodedConcept

    item = Dataset()
    item.ReferencedSOPClassUID = source.reference.SOPClassUID
    item.ReferencedSOPInstanceUID = source.reference.SOPInstanceUID
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(purpose)]
    return item


def _values(value: Any) -> list[Any]:
    """The values of an attribute that may have one or several."""
    return list(value) if isinstance(value, (list, tuple, MultiValue)) else [value]
