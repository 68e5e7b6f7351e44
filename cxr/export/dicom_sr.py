"""Findings of an image as a structured report: TID 1500 "Measurement Report" (PS3.16) in a Comprehensive SR (PS3.3).

One measurement group (TID 1501) for each finding says whether it is present, with its probability and the threshold;
one group (TID 1410) for each box or mask says where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import highdicom
import numpy as np
from highdicom import sr
from pydicom import Dataset, uid
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from cxr.export import dicom_codes
from cxr.export.dicom_codes import finding_code
from cxr.export.dicom_objects import MANUFACTURER, common_arguments, instance_uid, private_scheme, series_uid, to_file
from cxr.export.dicom_results import Algorithm, BoxScore, FindingScore, ImageResult, MaskScore
from cxr.export.dicom_source import SourceImage, derived_uid


def structured_report(source: SourceImage, result: ImageResult, algorithm: Algorithm, *, with_mask: bool) -> bytes:
    """The file of the report.

    Args:
        with_mask: the image's segmentation (`dicom_seg`) is exported too, and the report refers to it.
    """
    image, evidence = source.reference, [source.reference]
    if with_mask:
        evidence.append(_segmentation_reference(source, algorithm))
    observer = sr.DeviceObserverIdentifyingAttributes(
        uid=derived_uid("device", algorithm.sha256, algorithm.member),
        name=algorithm.name,
        manufacturer_name=MANUFACTURER,
        model_name=algorithm.name,
        serial_number=algorithm.sha256,
    )
    context = sr.ObservationContext(
        observer_device_context=sr.ObserverContext(
            observer_type=codes.DCM.Device, observer_identifying_attributes=observer
        )
    )
    report = sr.MeasurementReport(
        observation_context=context,
        procedure_reported=dicom_codes.CHEST_XRAY,
        imaging_measurements=[*_groups(source, result, algorithm, with_mask)],
        title=codes.DCM.ImagingMeasurementReport,
    )
    made = sr.ComprehensiveSR(
        evidence=evidence,
        content=report,
        is_complete=True,
        coding_schemes=[private_scheme()],
        transfer_syntax_uid=uid.ExplicitVRLittleEndian,
        **common_arguments(source, algorithm, "sr"),
    )
    assert made.StudyInstanceUID == image.StudyInstanceUID
    return to_file(made, source)


def _groups(source: SourceImage, result: ImageResult, algorithm: Algorithm, with_mask: bool) -> Iterator[Any]:
    identification = sr.AlgorithmIdentification(
        name=algorithm.name,
        version=algorithm.version,
        parameters=[f"weights_sha256={algorithm.sha256}"],
        manufacturer=MANUFACTURER,
    )
    for finding in result.findings:
        yield _finding_group(source, finding, algorithm, identification)
    for number, box in enumerate(result.boxes, 1):
        yield _box_group(source, box, number, algorithm, identification)
    if with_mask and result.mask is not None:
        yield _mask_group(source, result.mask, algorithm, identification)


def _tracking(source: SourceImage, algorithm: Algorithm, name: str) -> sr.TrackingIdentifier:
    return sr.TrackingIdentifier(tracking_uid(source, algorithm, name), name)


def tracking_uid(source: SourceImage, algorithm: Algorithm, name: str) -> str:
    """The UID of a finding, box or mask, in the report as well as in the segmentation."""
    return derived_uid("tracking", algorithm.sha256, algorithm.member, source.sop_uid, name)


def _finding_group(
    source: SourceImage, finding: FindingScore, algorithm: Algorithm, identification: sr.AlgorithmIdentification
) -> sr.MeasurementsAndQualitativeEvaluations:
    evaluations = []
    if finding.present is not None:
        value = dicom_codes.PRESENT if finding.present else dicom_codes.ABSENT
        evaluations.append(sr.QualitativeEvaluation(dicom_codes.PRESENCE, value))
    measurements = []
    if finding.probability is not None:
        measurements.append(_percent(dicom_codes.PROBABILITY, finding.probability))
    if finding.threshold is not None:
        measurements.append(_percent(dicom_codes.THRESHOLD, finding.threshold))
    image = source.reference
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(source, algorithm, f"finding: {finding.name}"),
        finding_type=finding_code(finding.name),
        algorithm_id=identification,
        measurements=measurements or None,
        qualitative_evaluations=evaluations or None,
        source_images=[sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)],
    )


def _box_group(
    source: SourceImage,
    box: BoxScore,
    number: int,
    algorithm: Algorithm,
    identification: sr.AlgorithmIdentification,
) -> sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    """DICOM's image-relative coordinates (PS3.3 C.18.6.1.2) have edges at integers, like ours."""
    x0, x1 = np.clip([box.corners[0], box.corners[2]], 0, source.width)
    y0, y1 = np.clip([box.corners[1], box.corners[3]], 0, source.height)
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]])
    image = source.reference
    region = sr.ImageRegion(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=corners,
        source_image=sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID),
    )
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(source, algorithm, f"box {number}: {box.label}"),
        referenced_region=region,
        finding_type=finding_code(box.label),
        algorithm_id=identification,
        measurements=[_percent(dicom_codes.PROBABILITY, box.score)],
    )


def _mask_group(
    source: SourceImage, mask: MaskScore, algorithm: Algorithm, identification: sr.AlgorithmIdentification
) -> sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    image = source.reference
    measurements = [sr.Measurement(dicom_codes.AREA, mask.area_px, dicom_codes.PIXELS)]
    if spacing := source.spacing_mm:
        area = mask.area_px * spacing[0] * spacing[1]
        measurements.append(sr.Measurement(dicom_codes.AREA, area, dicom_codes.SQUARE_MM))
    segment = sr.ReferencedSegmentationFrame(
        sop_class_uid=uid.SegmentationStorage,
        sop_instance_uid=instance_uid(source, algorithm, "seg"),
        frame_number=1,
        segment_number=1,
        source_image=sr.SourceImageForSegmentation(image.SOPClassUID, image.SOPInstanceUID),
    )
    del segment[0].ReferencedSOPSequence[0].ReferencedSegmentNumber  # not beside a frame's number (PS3.3 C.18.4)
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(source, algorithm, f"mask: {mask.label}"),
        referenced_segment=segment,
        finding_type=finding_code(mask.label),
        algorithm_id=identification,
        measurements=measurements,
    )


def _percent(name: Code, value: float) -> sr.Measurement:
    return sr.Measurement(name, 100 * float(value), dicom_codes.PERCENT)


def _segmentation_reference(source: SourceImage, algorithm: Algorithm) -> Dataset:
    """What the report's evidence has to say of the segmentation."""
    reference = Dataset()
    reference.StudyInstanceUID = source.study_uid
    reference.SeriesInstanceUID = series_uid(source, algorithm, "seg")
    reference.SOPInstanceUID = instance_uid(source, algorithm, "seg")
    reference.SOPClassUID = highdicom.UID(uid.SegmentationStorage)
    return reference
