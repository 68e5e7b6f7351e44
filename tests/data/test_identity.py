"""Pseudonyms of ids and paths, messages without names, and the crosswalk that leads back."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema, storage
from cxr.data.identity import COLUMNS, Identity, open_identity, read_crosswalk
from cxr.errors import UserError
from cxr.sources.options import ReadOptions
from cxr.sources.pseudonyms import Pseudonyms

KEY = b"a secret of at least sixteen bytes"
ARCHIVE = "/data/archive"
COLUMN_TYPES = [(name, pa.string()) for name in (*COLUMNS, schema.ERROR, schema.EXTRA)]


def identity(tmp_path: Path, key: bytes = KEY) -> Identity:
    return Identity(Pseudonyms(key), str(tmp_path / "crosswalk"), (ARCHIVE,))


def image(number: int, **values: Any) -> dict[str, Any]:
    known = {"image_id": f"1.2.3.{number}", "source_uri": f"{ARCHIVE}/DOE JANE/{number} left.dcm"}
    return known | {"patient_id": "MRN-77123", "study_id": "1.2.9.1", "extra": '{"name": "Doe"}'} | values


def rows(*images: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(images), pa.schema(COLUMN_TYPES))


def test_ids_and_paths_become_pseudonyms_and_free_text_is_dropped(tmp_path: Path) -> None:
    first, second = identity(tmp_path).applied(rows(image(1), image(2, error="blank"))).to_pylist()
    values = [first[name] for name in COLUMNS if name != "series_id"]
    assert all(len(value) == 32 and set(value) <= set("0123456789abcdef") for value in values)
    assert len(set(values)) == 4
    assert first["series_id"] is None
    assert (first["extra"], first["error"], second["error"]) == (None, None, "blank")
    assert (first["patient_id"], first["study_id"]) == (second["patient_id"], second["study_id"])
    assert first["image_id"] != second["image_id"]


def test_pseudonyms_depend_on_the_key_and_on_the_kind_of_id(tmp_path: Path) -> None:
    same = rows(image(1, patient_id="1.2.3.1"))
    (one,), (again,) = (identity(tmp_path).applied(same).to_pylist() for _ in range(2))
    (other,) = identity(tmp_path, b"another secret of sixteen bytes").applied(same).to_pylist()
    assert one == again
    assert one["patient_id"] != one["image_id"]
    assert not {one[name] for name in COLUMNS if one[name]} & {other[name] for name in COLUMNS}
    assert KEY.decode() not in repr(identity(tmp_path))


def test_the_crosswalk_leads_back_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    table = rows(image(1), image(2))
    for _ in range(2):
        identity(tmp_path).record(table)
    (path,) = (tmp_path / "crosswalk").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    stored = pq.read_table(path).to_pylist()
    replaced = identity(tmp_path).applied(table).to_pylist()
    assert [{name: row[name] for name in COLUMNS} for row in stored] == table.select(list(COLUMNS)).to_pylist()
    assert [[row[f"pseudonym_{name}"] for name in COLUMNS] for row in stored] == [
        [row[name] for name in COLUMNS] for row in replaced
    ]


def test_scores_get_their_paths_again_and_truth_gets_pseudonyms(tmp_path: Path) -> None:
    table = rows(image(1), image(2))
    identity(tmp_path).record(table.slice(0, 1))
    identity(tmp_path).record(table.slice(1))
    crosswalk, scores = read_crosswalk(str(tmp_path / "crosswalk")), identity(tmp_path).applied(table)
    with_paths = crosswalk.with_paths(scores)
    assert with_paths["source_uri"].to_pylist() == table["source_uri"].to_pylist()
    assert with_paths["image_id"] == scores["image_id"]
    asked = pa.array([scores["image_id"][1].as_py(), None, "0" * 32, "ä"])
    assert crosswalk.originals("image_id", asked).to_pylist() == ["1.2.3.2", None, None, None]
    truth = rows(image(2), image(3, patient_id="MRN-1"), image(4, patient_id="MRN-1"), image(5, patient_id=None))
    made = crosswalk.pseudonymized(truth).to_pylist()
    assert made[0]["image_id"] == scores["image_id"][1].as_py()
    assert made[0]["patient_id"] == scores["patient_id"][1].as_py()
    assert [row["image_id"] for row in made[1:]] == ["not scored 1", "not scored 2", "not scored 3"]
    assert made[1]["patient_id"] == made[2]["patient_id"] == "not scored 1"
    assert made[3]["patient_id"] is None


def test_an_image_of_two_runs_is_in_the_crosswalk_once(tmp_path: Path) -> None:
    identity(tmp_path).record(rows(image(1), image(2)))
    identity(tmp_path).record(rows(image(2), image(3)))
    assert read_crosswalk(str(tmp_path / "crosswalk")).table.num_rows == 3


def test_options_say_neither_which_images_were_selected_nor_where_the_key_is(tmp_path: Path) -> None:
    options = {"batch_size": 8, "pseudonymize": "/secret/key", "crosswalk": "/secret/crosswalk"}
    options |= {"reading": {"select": "patient_id in MRN-1", "gate": "warn", "id_key": "/secret/key"}}
    hidden = identity(tmp_path).hidden_settings(options)
    assert "MRN-1" not in str(hidden)
    assert "secret" not in str(hidden)
    assert (hidden["batch_size"], hidden["reading"]["gate"]) == (8, "warn")
    other = identity(tmp_path).hidden_settings({"select": "patient_id in MRN-2"})
    assert other["select_hmac"] != hidden["reading"]["select_hmac"]
    assert identity(tmp_path).hidden_settings({"select": ""}) == {}


def test_a_folder_without_a_crosswalk_is_refused(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "scores.csv"), "a,b\n")
    with pytest.raises(UserError, match="expected a crosswalk in"):
        read_crosswalk(str(tmp_path))
    pq.write_table(pa.table({"image_id": ["a"]}), tmp_path / "part.parquet")
    with pytest.raises(UserError, match="expected a crosswalk in"):
        read_crosswalk(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("cannot read /data/archive/DOE JANE/1 left.dcm: denied", "cannot read [removed]: denied"),
        ("[Errno 5] '1 left.dcm'", "[Errno 5] '[removed]'"),
        ("two images named 1 left", "two images named [removed]"),
        ("DOE JANE is not mounted in /data/archive", "[removed] is not mounted in /data/archive"),
        ("id 1.2.3.1 twice", "id [removed] twice"),
        ("id 1.2.3.12 twice", "id 1.2.3.12 twice"),
        ("study 1.2.9.1, patient MRN-77123", "study [removed], patient [removed]"),
        ("1 image of 2", "1 image of 2"),
    ],
)
def test_messages_name_nothing_of_the_images(text: str, hidden: str, tmp_path: Path) -> None:
    assert identity(tmp_path).hide(text, [rows(image(1), image(2))]) == hidden


def test_errors_keep_their_kind_but_name_nothing(tmp_path: Path) -> None:
    made, table = identity(tmp_path), rows(image(1))
    lost = storage.StorageError(f"{ARCHIVE}/DOE JANE/1 left.dcm: the disk is gone")
    lost.__cause__ = OSError("DOE JANE")
    with pytest.raises(storage.StorageError, match=r"^\[removed\]: the disk is gone$") as raised:
        fail(made, table, lost)
    assert raised.value.__suppress_context__
    assert raised.value.__cause__ is None
    with pytest.raises(RuntimeError, match=r"^unexpected KeyError in test_identity.py:\d+$"):
        fail(made, table, KeyError("DOE JANE"))


def fail(made: Identity, table: pa.Table, error: Exception) -> None:
    with made.hidden_in_errors([table]):
        raise error


def test_errors_of_an_archive_that_cannot_be_read_do_not_name_its_files(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "archive" / "DOE JANE" / "list.csv"), b"x")
    made = Identity(Pseudonyms(KEY), str(tmp_path / "crosswalk"), (str(tmp_path / "archive"), str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"^\[removed\] in \[removed\] is empty$"), made.hidden_in_errors([]):
        raise UserError("list.csv in DOE JANE is empty")


def test_key_and_crosswalk_lie_outside_of_the_results(tmp_path: Path) -> None:
    key = tmp_path / "secret" / "key.txt"
    storage.write_bytes(str(key), KEY)
    out = str(tmp_path / "out")
    made = open_identity(str(key), "", out, [ARCHIVE])
    assert made is not None
    assert made.crosswalk == str(tmp_path / "secret" / "crosswalk")
    reading = made.private(ReadOptions())
    assert (reading.headers, reading.id_key) == (str(tmp_path / "secret" / "headers"), str(key))
    assert open_identity("", "", out, [ARCHIVE]) is None
    with pytest.raises(UserError, match="expected --pseudonymize with --crosswalk"):
        open_identity("", str(tmp_path / "crosswalk"), out, [ARCHIVE])
    with pytest.raises(UserError, match=r"--crosswalk: expected a location outside --out"):
        open_identity(str(key), f"{out}/crosswalk", out, [ARCHIVE])
    storage.write_bytes(f"{out}/key.txt", KEY)
    with pytest.raises(UserError, match=r"--pseudonymize: expected a location outside --out"):
        open_identity(f"{out}/key.txt", "", out, [ARCHIVE])
    key.write_text("short")
    with pytest.raises(UserError, match="at least 16 bytes in --pseudonymize"):
        open_identity(str(key), "", out, [ARCHIVE])
