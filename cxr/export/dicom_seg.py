"""Masks of an image as a DICOM segmentation (PS3.3 A.51), pixel for pixel on the original image."""

from __future__ import annotations

from copy import copy

import numpy as np
from highdicom import AlgorithmIdentificationSequence, seg
from highdicom.color import CIELabColor
from pydicom import uid

from cxr import schema
from cxr.export import dicom_codes
from cxr.export.dicom_codes import finding_code
from cxr.export.dicom_objects import MANUFACTURER, common_arguments, to_file
from cxr.export.dicom_results import Algorithm, ImageResult
from cxr.export.dicom_source import SourceImage
from cxr.export.dicom_sr import tracking_uid
from cxr.reporting.palette import PREDICTION, rgb
from cxr.sources import rle

LARGEST = 255  # value of a fractional segmentation that stands for the probability 1


def segmentation(
    source: SourceImage, result: ImageResult, algorithm: Algorithm, probabilities: np.ndarray | None = None
) -> bytes:
    """The file of the segmentation.

    Args:
        result: with a mask that is not empty.
        probabilities: float (height, width) in [0, 1], for a segmentation of type FRACTIONAL; None: BINARY.
    """
    assert result.mask is not None
    label = result.mask.label
    original = copy(source.reference)
    if "PixelSpacing" in original:  # would become Pixel Measures, which readers reject without a slice thickness
        del original.PixelSpacing
    mask = rle.decode(result.mask.rle, source.height, source.width)
    description = seg.SegmentDescription(
        segment_number=1,
        segment_label=label,
        segmented_property_category=dicom_codes.ANATOMY if label == schema.LUNGS else dicom_codes.ABNORMALITY,
        segmented_property_type=finding_code(label),
        algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=algorithm.name,
            family=dicom_codes.ARTIFICIAL_INTELLIGENCE,
            version=algorithm.version,
            source=MANUFACTURER,
            parameters={"weights_sha256": algorithm.sha256},
        ),
        tracking_uid=tracking_uid(source, algorithm, f"mask: {label}"),
        tracking_id=f"mask: {label}",
        display_color=CIELabColor.from_rgb(*rgb(PREDICTION)),
    )
    made = seg.Segmentation(
        source_images=[original],
        pixel_array=mask if probabilities is None else probabilities,
        segmentation_type="BINARY" if probabilities is None else "FRACTIONAL",
        fractional_type="PROBABILITY",
        max_fractional_value=LARGEST,
        segment_descriptions=[description],
        content_label="CXR_MASK",
        content_description=f"{label} as segmented by {algorithm.name}; not for diagnosis"[:64],
        transfer_syntax_uid=uid.ExplicitVRLittleEndian,
        omit_empty_frames=False,
        **common_arguments(source, algorithm, "seg"),
    )
    made.PatientOrientation = source.reference.PatientOrientation
    return to_file(made, source)
