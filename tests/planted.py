"""An archive whose headers, folders and files name patients, and a search for these names in everything written."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from pydicom import Dataset, Sequence

from tests.odd_files import dataset, dicom, encoded, odd_files, radiograph

# Each is searched for by itself, whatever the case of its letters.
HEADER = (
    *("Zebrafish", "Quentin", "MRN-77123", "OTH-44871", "ACC-55987", "19511224", "Wolverine", "PRIV-90210"),
    *("1.2.826.0.1.5550.1", "1.2.826.0.1.5551.2", "1.2.826.0.1.5552.3", "St Elsewhere"),
)
PATHS = ("Quokkasetonix", "Walterstein", "Axolotlmexicanum", "Numbatfasciatus", "19630402", "Tapirindicus")
PLANTED = (*HEADER, *PATHS)
BROKEN = ("cut_in_half.png", "error_page.dcm", "cut_in_pixels.dcm", "blank.png", "no_pixels.dcm", "bomb.png")


def xray(number: int) -> Dataset:
    ds = dataset(
        radiograph(seed=number),
        SOPInstanceUID=f"1.2.826.0.1.5550.1.{number}",
        StudyInstanceUID="1.2.826.0.1.5551.2",
        SeriesInstanceUID="1.2.826.0.1.5552.3",
        PatientName="Zebrafish^Quentin",
        PatientID="MRN-77123",
        OtherPatientIDs="OTH-44871",
        AccessionNumber="ACC-55987",
        PatientBirthDate="19511224",
        ReferringPhysicianName="Wolverine^Ann",
        InstitutionName="St Elsewhere",
        StudyDescription="Zebrafish chest",
        ViewPosition="PA",
        BodyPartExamined="Wolverine",  # free text where a code belongs
        Modality="DX",
    )
    other = Dataset()
    other.PatientID = "OTH-44871"
    ds.OtherPatientIDsSequence = Sequence([other])
    private = ds.private_block(0x0011, "CXR TEST", create=True)
    private.add_new(0x01, "LO", "PRIV-90210")
    return ds


def write_archive(folder: Path) -> int:
    """DICOM and PNG files in folders named after patients, some of them broken; returns their number."""
    odd = {file.name: file.data for file in odd_files()}
    files = {
        f"Quokkasetonix^Walterstein 19630402/Numbatfasciatus {number}.dcm": dicom(xray(number)) for number in range(3)
    }
    files |= {
        f"Axolotlmexicanum/Numbatfasciatus{number}.png": encoded(radiograph(seed=10 + number)) for number in range(2)
    }
    files |= {f"Axolotlmexicanum/Tapirindicus {number} {name}": odd[name] for number, name in enumerate(BROKEN)}
    torn = dicom(xray(7))
    files["Quokkasetonix^Walterstein 19630402/Tapirindicus torn.dcm"] = torn[: len(torn) // 2]
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return len(files)


def leaks(*folders: Path, text: str = "") -> list[str]:
    """Where planted names are in a text, and in the names and decoded contents of all files in the folders."""
    found = []
    for place, content in [("text", text), *(named for folder in folders for named in _contents(folder))]:
        found += [f"{planted} in {place}" for planted in PLANTED if planted.lower() in content.lower()]
    return found


def _contents(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        yield f"the name of {path}", str(path.relative_to(folder))
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield str(path), data.decode("latin-1")
        yield str(path), data.replace(b"\0", b"").decode("latin-1")  # UTF-16
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield str(path), f"{table.schema.metadata} {table.schema.names} {table.to_pylist()}"
        if path.suffix == ".png":
            yield str(path), _text_chunks(data)
        if path.suffix == ".html":
            for code in re.findall(rb"data:[\w/]+;base64,([\w+/=]+)", data):
                picture = base64.b64decode(code)
                yield f"a picture in {path}", picture.decode("latin-1")
                if picture.startswith(b"\x89PNG"):
                    yield f"a picture in {path}", _text_chunks(picture)


def _text_chunks(png: bytes) -> str:
    return str(Image.open(io.BytesIO(png)).info)
