"""What all exported DICOM objects have in common: their kinds, UIDs and equipment, and how they become files."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Literal, get_args

from pydicom import Dataset
from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR

import cxr
from cxr.errors import UserError
from cxr.export.dicom_codes import PRIVATE_SCHEME, PRIVATE_SCHEME_NAME
from cxr.export.dicom_results import Algorithm
from cxr.export.dicom_source import UTF8, SourceImage, derived_uid

Kind = Literal["sr", "seg", "sc"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MANUFACTURER = "cxr"
NOT_FOR_DIAGNOSIS = "NOT FOR DIAGNOSIS"
SERIES_NUMBERS: dict[Kind, int] = {"sr": 9001, "seg": 9002, "sc": 9003}
_CONTENTS: dict[Kind, str] = {"sr": "findings", "seg": "masks", "sc": "findings drawn"}


def require_packages() -> None:
    """Raise UserError if the packages of the extra dicom-export are missing."""
    try:
        import dicomweb_client  # noqa: F401
        import highdicom  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"expected the package {error.name}, which is not installed: run pip install 'cxr[dicom-export]'"
        ) from None


def instance_uid(source: SourceImage, algorithm: Algorithm, kind: Kind) -> str:
    """The same for every export of a model's results for an image, so that a PACS replaces the object."""
    return derived_uid("instance", kind, algorithm.sha256, algorithm.member, source.sop_uid)


def series_uid(source: SourceImage, algorithm: Algorithm, kind: Kind) -> str:
    """One series for each kind of object, model and study."""
    return derived_uid("series", kind, algorithm.sha256, algorithm.member, source.study_uid)


def common_arguments(source: SourceImage, algorithm: Algorithm, kind: Kind) -> dict[str, Any]:
    """Arguments that the constructors of all highdicom objects take."""
    return {
        "series_instance_uid": series_uid(source, algorithm, kind),
        "series_number": SERIES_NUMBERS[kind],
        "sop_instance_uid": instance_uid(source, algorithm, kind),
        "instance_number": source.reference.InstanceNumber,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": algorithm.name,
        "software_versions": cxr.__version__,
        "device_serial_number": algorithm.sha256,
        "series_description": f"{algorithm.name}: {_CONTENTS[kind]}, not for diagnosis"[:64],
    }


def private_scheme() -> Any:
    """The identification of the private coding scheme, for objects that use it (PS3.3 C.12.1.1.4)."""
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    return CodingSchemeIdentificationItem(PRIVATE_SCHEME, name=PRIVATE_SCHEME_NAME, responsible_organization="cxr")


def to_file(made: Dataset, source: SourceImage) -> bytes:
    """The bytes of an object's file, with the patient and study of its source.

    It has the source's character set, or UTF-8 if our own texts have letters that the source's may lack.
    """
    copied = [element for element in source.reference if element.keyword not in _OF_IMAGE]
    for element in copied:
        made.pop(element.tag, None)
    character_set = source.character_set if _is_ascii(made) else UTF8
    for element in copied:
        made[element.tag] = element
    if character_set is not None:
        made.SpecificCharacterSet = character_set
    file = BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _is_ascii(made: Dataset) -> bool:
    return all(str(element.value).isascii() for element in made.iterall() if element.VR in CUSTOMIZABLE_CHARSET_VR)


_OF_IMAGE = {  # attributes of the original image itself, not of its patient and study
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "SOPClassUID",
    "Rows",
    "Columns",
    "Modality",
    "InstanceNumber",
    "PatientOrientation",
    "FrameOfReferenceUID",
    "PixelSpacing",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
}
