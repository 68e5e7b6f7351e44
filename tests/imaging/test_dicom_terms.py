"""Codes of views, body parts and modalities; free text never gets through."""

from __future__ import annotations

import pytest
from pydicom import Dataset, Sequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from cxr.imaging import dicom_terms
from cxr.imaging.decode import decode
from tests.odd_files import dataset, dicom, radiograph

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")  # from writing invalid values

VIEWS = {
    "PA": "PA",
    " pa ": "PA",
    "P.A.": "PA",
    "CHEST PA": "PA",
    "PA LLD": "LLD",
    "AP DECUB": "DECUBITUS",
    "AP LEFT LATERAL DECUBITUS": "LLD",
    "AP RPO": "RPO",
    "PA OBLIQUE": "OBLIQUE",
    "AP": "AP",
    "AP AXIAL": "AP",
    "AP_PORTABLE": "AP",
    "antero-posterior": "AP",
    "Postero Anterior": "PA",
    "LL": "LL",
    "LATERAL": "LATERAL",
    "Lat": "LATERAL",
    "XTABLE LATERAL": "LATERAL",
    "LEFT LATERAL": "LL",
    "LATERAL RIGHT": "RL",
    "R LAT": "RL",
    "LLD": "LLD",
    "LEFT LATERAL DECUBITUS": "LLD",
    "AP OBLIQUE": "OBLIQUE",
    "LAO": "LAO",
    "MLO": "MLO",
    "": None,
    "DOE": None,
    "Doe^Jane": None,
    "MS DOE": None,
}


@pytest.mark.parametrize(("written", "code"), VIEWS.items())
def test_a_view_position_with_qualifiers_gives_a_view(written: str, code: str | None) -> None:
    assert dicom_terms.view(written) == code


BODY_PARTS = {
    "CHEST": "CHEST",
    " Chest": "CHEST",
    "THORAX": "CHEST",
    "CHEST NO GRID": "CHEST",
    "CHEST_ABDOMEN": "CHESTABDOMEN",
    "HAND": "HAND",
    "LEFT HAND": "HAND",
    "DOE": None,
    "": None,
}


@pytest.mark.parametrize(("written", "code"), BODY_PARTS.items())
def test_a_body_part_is_a_code_of_the_standard(written: str, code: str | None) -> None:
    assert dicom_terms.body_part(written) == code


@pytest.mark.parametrize(("written", "code"), [("DX", "DX"), (" cr ", "CR"), ("DOE", None), ("", None), (None, None)])
def test_a_modality_is_a_code_of_the_standard(written: str | None, code: str | None) -> None:
    assert dicom_terms.modality(written) == code


def test_snomed_codes_of_views_are_those_of_cid_4010() -> None:
    """SNOMED CT and SNOMED RT, whose equivalent codes pydicom treats as equal."""
    meant = {
        codes.cid4010.AnteroPosterior: "AP",
        codes.cid4010.PosteroAnterior: "PA",
        codes.cid4010.LateralProjection: "LATERAL",
        codes.cid4010.LeftLateral: "LL",
        codes.cid4010.RightLateral: "RL",
        codes.cid4010.Frontal: "FRONTAL",
        codes.cid4010.LeftAnteriorOblique: "LAO",
        codes.cid4010.RightPosteriorOblique: "RPO",
        codes.cid4014.CranioCaudal: "CC",
        codes.cid4014.MedioLateralObliqueProjection: "MLO",
    }
    for code, view in meant.items():
        assert dicom_terms.coded_view(code.value) == view
    for older, view in {"R-10206": "AP", "R-102CD": "LATERAL", "R-10236": "LL", "R-40888": "PA"}.items():
        assert meant[next(code for code in meant if code == Code(older, "SRT", ""))] == view
        assert dicom_terms.coded_view(older) == view


def test_a_dicom_gives_its_view_body_part_and_modality() -> None:
    tags = {"ViewPosition": "LATERAL", "BodyPartExamined": "Chest ", "Modality": "DX"}
    image = decode(dicom(dataset(radiograph(), **tags)))
    assert (image.view, image.body_part, image.modality) == ("LATERAL", "CHEST", "DX")


def test_free_text_in_a_dicom_gives_none() -> None:
    tags = {"ViewPosition": "JANE DOE", "BodyPartExamined": "DOE", "Modality": "JANE"}
    image = decode(dicom(dataset(radiograph(), **tags)))
    assert (image.view, image.body_part, image.modality) == (None, None, None)


@pytest.mark.parametrize(("scheme", "value"), [("SCT", "272479007"), ("SRT", "R-10214"), ("SNM3", "R-40888")])
def test_a_view_code_sequence_gives_a_view_where_view_position_gives_none(scheme: str, value: str) -> None:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, "postero-anterior"
    for position in ("", "DOE"):
        ds = dataset(radiograph(), ViewCodeSequence=Sequence([item]), ViewPosition=position)
        assert decode(dicom(ds)).view == "PA"
    ds = dataset(radiograph(), ViewCodeSequence=Sequence([item]), ViewPosition="AP")
    assert decode(dicom(ds)).view == "AP"


def test_images_other_than_frontal_chest_count_once() -> None:
    views = ["PA", "AP", "LATERAL", None, None, "LL", None, None]
    parts = ["CHEST", None, "CHEST", "HAND", None, "HAND", "CHEST", "RIB"]
    kinds = ["DX", "CR", "DX", "DX", None, "CT", None, "MR"]
    counts = dicom_terms.other_than_frontal_chest(views, parts, kinds)
    assert counts == {"view LATERAL": 1, "body part HAND": 1, "modality CT": 1, "modality MR": 1}
