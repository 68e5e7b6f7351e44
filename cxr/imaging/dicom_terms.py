"""Values of DICOM attributes as codes, numbers and dates, and which images are frontal chest X-rays.

Files contain these codes with qualifiers, as synonyms, or as free text that may name a patient. This module returns
only the codes that it lists.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Iterable

# View Position (PS3.3 C.8.1.2 and C.8.11.3), the views of CID 4010 and 4014 that have no such code, and FRONTAL if
# the direction of the beam is unknown.
VIEWS = set(
    """
    AP PA FRONTAL LL RL LATERAL LLD RLD DECUBITUS LLO RLO LAO RAO LPO RPO OBLIQUE AXIAL TAN CC CV FB ML LM MLO LMO
    XCCL XCCM
    """.split()  # noqa: SIM905
)
_FRONTAL_VIEWS = {"AP", "PA", "FRONTAL"}
_TILTED_VIEWS = {"LLD", "RLD", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBLIQUE"}  # also if the beam is AP or PA
_VIEW_WORDS = {
    "ANTEROPOSTERIOR": "AP",
    "POSTEROANTERIOR": "PA",
    "LAT": "LATERAL",
    "LLAT": "LL",
    "RLAT": "RL",
    "DECUB": "DECUBITUS",
    "OBL": "OBLIQUE",
}
_SIDES = {"L": "L", "LEFT": "L", "R": "R", "RIGHT": "R"}

# SNOMED CT and, in older files, SNOMED RT (PS3.16 CID 4010 "DX View", CID 4014 "View for Mammography").
_VIEW_CODES = {
    "399348003": "AP",
    "R-10206": "AP",
    "272479007": "PA",
    "R-10214": "PA",
    "R-40888": "PA",
    "399033003": "FRONTAL",
    "R-10202": "FRONTAL",
    "399067008": "LATERAL",
    "R-102CD": "LATERAL",
    "399173006": "LL",
    "R-10236": "LL",
    "399198007": "RL",
    "R-10232": "RL",
    "399135007": "LAO",
    "R-10220": "LAO",
    "399356000": "RAO",
    "R-10218": "RAO",
    "R-40985": "RAO",
    "399006002": "LPO",
    "R-10212": "LPO",
    "399038007": "RPO",
    "R-10210": "RPO",
    "399182000": "OBLIQUE",
    "R-102C1": "OBLIQUE",
    "399184004": "OBLIQUE",
    "R-10238": "OBLIQUE",
    "399236003": "OBLIQUE",
    "R-10234": "OBLIQUE",
    "399312000": "OBLIQUE",
    "R-10208": "OBLIQUE",
    "399059000": "OBLIQUE",
    "R-10216": "OBLIQUE",
    "399160007": "OBLIQUE",
    "R-10204": "OBLIQUE",
    "399061009": "AXIAL",
    "R-10241": "AXIAL",
    "399110001": "TAN",
    "R-102C2": "TAN",
    "399162004": "CC",
    "R-10242": "CC",
    "399196006": "FB",
    "R-10244": "FB",
    "399260004": "ML",
    "R-10224": "ML",
    "399352003": "LM",
    "R-10228": "LM",
    "399368009": "MLO",
    "R-10226": "MLO",
    "399099002": "LMO",
    "R-10230": "LMO",
}

# Body Part Examined (PS3.16 annex L).
BODY_PARTS = set(
    """
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BILEDUCT BLADDER BRAIN BREAST BRONCHUS BUTTOCK
    CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX
    COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FIBULA
    FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE
    LARYNX LEG LIVER LSPINE LSSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN
    NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS RECTUM RIB
    SACRUM SCALP SCAPULA SCLERA SCROTUM SELLA SHOULDER SIJOINT SINUS SKULL SPINE SPLEEN SSPINE STERNUM STOMACH
    SUBMANDIBULAR TESTIS THIGH THUMB THYMUS THYROID TIBIA TLSPINE TMJ TOE TONGUE TRACHEA TSPINE ULNA URETER URETHRA
    UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA
    """.split()  # noqa: SIM905
)
_BODY_PART_WORDS = {"THORAX": "CHEST", "RIBS": "RIB", "LUNGS": "LUNG"}
_CHEST = {"CHEST", "LUNG", "HEART", "MEDIASTINUM", "RIB", "STERNUM"}

_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")
_UID = re.compile(r"[0-9.]{1,64}")
_AGE = re.compile(r"(?P<number>\d{1,3})(?P<unit>[DWMY])")
_UNITS_IN_A_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0}
_MAX_AGE_YEARS = 130

# Modality (PS3.3 C.7.3.1.1.1); DR and SC are not defined there, but devices write them.
MODALITIES = set(
    """
    CR DX DR RG RF XA PX IO MG CT MR US NM PT OT SC ES XC GM SM OP OCT BMD BI HC TG
    """.split()  # noqa: SIM905
)
_RADIOGRAPHS = {"CR", "DX", "DR", "RG", "RF", "XA", "HC", "SC", "OT"}  # HC, SC and OT may be copies of radiographs


def view(text: str | None) -> str | None:
    """The code in `VIEWS` for a View Position such as "PA", "AP AXIAL", "Left Lateral" or "XTABLE LATERAL"."""
    words = _words(text)
    codes = [_VIEW_WORDS.get(word, word) for word in ("".join(words), *words)]  # "POSTERO-ANTERIOR" is one word
    codes = [code for code in codes if code in VIEWS]
    side = next((_SIDES[word] for word in words if word in _SIDES), "")
    if not codes:
        return None
    if "DECUBITUS" in codes:
        return f"{side}LD" if side else "DECUBITUS"
    if tilted := [code for code in codes if code in _TILTED_VIEWS]:
        return tilted[0]
    return f"{side}L" if side and codes[0] == "LATERAL" else codes[0]


def coded_view(code_value: str) -> str | None:
    """The code in `VIEWS` for the Code Value of a View Code Sequence."""
    return _VIEW_CODES.get(code_value.strip().upper())


def body_part(text: str | None) -> str | None:
    """The code in `BODY_PARTS` for a Body Part Examined such as "CHEST", "Thorax" or "CHEST NO GRID"."""
    words = _words(text)
    for word in ("".join(words), *words):
        code = _BODY_PART_WORDS.get(word, word)
        if code in BODY_PARTS:
            return code
    return None


def modality(text: str | None) -> str | None:
    """The code in `MODALITIES` for a Modality."""
    code = (text or "").strip().upper()
    return code if code in MODALITIES else None


def uid(text: str | None) -> str | None:
    """A UID (PS3.5 9.1); None if it has other characters than digits and dots."""
    content = (text or "").strip(" \0")
    return content if _UID.fullmatch(content) else None


def sex(text: str | None) -> str | None:
    """Patient's Sex (PS3.3 C.7.1.1): F, M or O (other)."""
    content = (text or "").strip().upper()
    return content if content in ("F", "M", "O") else None


def laterality(text: str | None) -> str | None:
    """Laterality (PS3.3 C.7.3.1.1.2) or Image Laterality: L, R, B (both) or U (unpaired)."""
    content = (text or "").strip().upper()
    return content if content in ("L", "R", "B", "U") else None


def photometric(text: str | None) -> str | None:
    """Photometric Interpretation (PS3.3 C.7.6.3.1.2), if it has the form of a code."""
    content = (text or "").strip().upper()
    return content if _CODE.fullmatch(content) else None


def date(text: str | None) -> datetime.date | None:
    """A date (PS3.5, DA), also in the older form with dots."""
    try:
        return datetime.datetime.strptime((text or "").strip().replace(".", ""), "%Y%m%d").date()
    except ValueError:
        return None


def age_years(age: str | None, birth_date: str | None, study_date: str | None) -> float | None:
    """Patient's Age (PS3.5, AS), else the time from the birth date to the study date, from 0 to 130 years."""
    stated = _AGE.fullmatch((age or "").strip().upper())
    if stated:
        years = int(stated["number"]) / _UNITS_IN_A_YEAR[stated["unit"]]
    else:
        born, studied = date(birth_date), date(study_date)
        if born is None or studied is None:
            return None
        years = (studied - born).days / _UNITS_IN_A_YEAR["D"]
        years = float(math.floor(years)) if years >= 2 else years  # as Patient's Age states it
    return years if 0 <= years <= _MAX_AGE_YEARS else None


def other_than_frontal_chest(views: Iterable, body_parts: Iterable, modalities: Iterable) -> Counter[str]:
    """Count the images that are known not to be frontal chest radiographs, by reason.

    Each image counts once, by the first of modality, body part and view that rules it out. Unknown values (None) rule
    nothing out.
    """
    counts: Counter[str] = Counter()
    for image_view, part, kind in zip(views, body_parts, modalities, strict=True):
        if kind is not None and kind not in _RADIOGRAPHS:
            counts[f"modality {kind}"] += 1
        elif part is not None and part not in _CHEST:
            counts[f"body part {part}"] += 1
        elif image_view is not None and image_view not in _FRONTAL_VIEWS:
            counts[f"view {image_view}"] += 1
    return counts


def _words(text: str | None) -> list[str]:
    return re.findall(r"[A-Z]+", (text or "").upper().replace(".", ""))
