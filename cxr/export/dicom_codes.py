"""Codes of findings in exported DICOM objects: standard codes where there are any, otherwise private ones.

Sources of the codes:

    DCM     DICOM PS3.16, Annex D
    SCT     SNOMED CT, International Edition. PS3.16 lists those of effusion (CID 645), mass and nodule (CID 6104),
            pneumothorax (CID 6105), edema (CID 3700) and lung (CID 7155) itself.
    99CXR   private codes of this module, for findings of the data sets that neither has, and for findings of
            checkpoints with labels of their own

The same finding has the same code, whatever a data set calls it.
"""

from __future__ import annotations

import hashlib

from pydicom.sr.coding import Code

PRIVATE_SCHEME, PRIVATE_SCHEME_NAME = "99CXR", "cxr: findings of chest X-ray data sets"
_CODE_LETTERS, _MEANING_LETTERS = 16, 64  # of a code value (SH) and a code meaning (LO), PS3.5 6.2

ATELECTASIS = Code("46621007", "SCT", "Atelectasis")
CARDIOMEGALY = Code("8186001", "SCT", "Cardiomegaly")
CONSOLIDATION = Code("95436008", "SCT", "Lung consolidation")
EDEMA = Code("19242006", "SCT", "Pulmonary edema")
EFFUSION = Code("60046008", "SCT", "Pleural effusion")
EMPHYSEMA = Code("87433001", "SCT", "Pulmonary emphysema")
FIBROSIS = Code("51615001", "SCT", "Fibrosis of lung")
INFILTRATE = Code("112121", "DCM", "Infiltrate")
PNEUMONIA = Code("233604007", "SCT", "Pneumonia")
PNEUMOTHORAX = Code("36118008", "SCT", "Pneumothorax")
PLEURAL_THICKENING = Code("PLEURAL_THICKEN", PRIVATE_SCHEME, "Pleural thickening")
OPACITY = Code("112001", "DCM", "Opacity")

FINDING_CODES: dict[str, Code] = {
    # ChestX-ray14
    "Atelectasis": ATELECTASIS,
    "Cardiomegaly": CARDIOMEGALY,
    "Effusion": EFFUSION,
    "Infiltration": INFILTRATE,
    "Mass": Code("4147007", "SCT", "Mass"),
    "Nodule": Code("27925004", "SCT", "Nodule"),
    "Pneumonia": PNEUMONIA,
    "Pneumothorax": PNEUMOTHORAX,
    "Consolidation": CONSOLIDATION,
    "Edema": EDEMA,
    "Emphysema": EMPHYSEMA,
    "Fibrosis": FIBROSIS,
    "Pleural_Thickening": PLEURAL_THICKENING,
    "Hernia": Code("39839004", "SCT", "Diaphragmatic hernia"),
    # VinBigData and VinDr-CXR, where they use other names
    "Aortic enlargement": Code("AORTIC_ENLARGED", PRIVATE_SCHEME, "Aortic enlargement"),
    "Calcification": Code("112063", "DCM", "Abnormal calcifications"),
    "ILD": Code("233703007", "SCT", "Interstitial lung disease"),
    "Lung Opacity": OPACITY,
    "Nodule/Mass": Code("NODULE_OR_MASS", PRIVATE_SCHEME, "Nodule or mass"),
    "Other lesion": Code("OTHER_LESION", PRIVATE_SCHEME, "Other lesion"),
    "Pleural effusion": EFFUSION,
    "Pleural thickening": PLEURAL_THICKENING,
    "Pulmonary fibrosis": FIBROSIS,
    "Clavicle fracture": Code("58150001", "SCT", "Fracture of clavicle"),
    "Enlarged PA": Code("ENLARGED_PA", PRIVATE_SCHEME, "Enlarged pulmonary artery"),
    "Lung cavity": Code("LUNG_CAVITY", PRIVATE_SCHEME, "Lung cavity"),
    "Lung cyst": Code("LUNG_CYST", PRIVATE_SCHEME, "Lung cyst"),
    "Mediastinal shift": Code("MEDIAST_SHIFT", PRIVATE_SCHEME, "Mediastinal shift"),
    "Rib fracture": Code("33737001", "SCT", "Fracture of rib"),
    "COPD": Code("13645005", "SCT", "Chronic obstructive pulmonary disease"),
    "Lung tumor": Code("126713003", "SCT", "Neoplasm of lung"),
    "Tuberculosis": Code("154283005", "SCT", "Pulmonary tuberculosis"),
    "Other disease": Code("OTHER_DISEASE", PRIVATE_SCHEME, "Other disease"),
    # Masks
    "Lungs": Code("39607008", "SCT", "Lung"),
}
_BY_NAME = {name.casefold().replace("_", " "): code for name, code in FINDING_CODES.items()}

PRESENCE = Code("121052", "DCM", "Presence of property")
PRESENT, ABSENT = Code("52101004", "SCT", "Present"), Code("272519000", "SCT", "Absent")  # CID 240
PROBABILITY = Code("111012", "DCM", "Certainty of Finding")  # in percent, as in CAD reports (PS3.16 TID 4004)
THRESHOLD = Code("DECISION_THRESH", PRIVATE_SCHEME, "Decision threshold")
AREA = Code("131184002", "SCT", "Area of defined region")
PERCENT, PIXELS = Code("%", "UCUM", "Percent"), Code("{pixels}", "UCUM", "Pixels")
SQUARE_MM = Code("mm2", "UCUM", "Square millimeter")
CHEST_XRAY = Code("399208008", "SCT", "Plain X-ray of chest")
ANATOMY = Code("91723000", "SCT", "Anatomical Structure")  # CID 7150, like the next
ABNORMALITY = Code("49755003", "SCT", "Morphologically Abnormal Structure")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")


def finding_code(name: str) -> Code:
    """The code of a finding; a finding that is not in the table gets a private code, derived from its name."""
    known = _BY_NAME.get(name.casefold().replace("_", " "))
    if known is not None:
        return known
    value = name.upper() if name.isascii() and name.isalnum() and len(name) <= _CODE_LETTERS else ""
    return Code(value or f"X{hashlib.sha256(name.encode()).hexdigest()[:15].upper()}", PRIVATE_SCHEME, _meaning(name))


def _meaning(name: str) -> str:
    """The name as a code meaning: without control characters and DICOM's separator."""
    letters = "".join(letter for letter in name if letter.isprintable() and letter != "\\")
    return letters[:_MEANING_LETTERS] or "finding"
