"""Read a table of labels: a row for each image, or for each image and finding, in any usual form.

    file,patient,split,effusion,mass     image,finding,value     image,labels
    a/1.png,7,train,1,0                  1,effusion,1            1.dcm,effusion|mass
    a/2.png,8,test,-1,                   1,mass,0                2.dcm,No finding

A finding is positive (1, true, yes), negative (0, false, no), uncertain (-1) or not mentioned (blank). In a list of
findings, those that are not listed are negative. "No finding" makes all findings that are not mentioned negative,
except "Support Devices", as in CheXpert. Repeated rows of an image count once, and values that contradict each other
are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.arrow_csv import invalid_value
from cxr.sources.csv_table import folded
from cxr.sources.image_match import normalized
from cxr.sources.image_table import SEXES, ages, blank_as_null, numbers, translated
from cxr.sources.label_mapping import LabelMapping, read_mapping
from cxr.sources.label_rows import contradictions_note, word_key
from cxr.sources.options import NO_COLUMN, Labeling
from cxr.sources.splits import SPLIT_WORDS
from cxr.sources.text_table import LIST_SEPARATOR, read_table
from cxr.wording import counted

# Usual names of columns, as `word_key`s, the most specific first.
IMAGE_COLUMNS = [
    "path",
    "imagepath",
    "filepath",
    "relativepath",
    "filename",
    "imagefilename",
    "imagefile",
    "file",
    "imageindex",
    "imagename",
    "image",
    "imageid",
    "sopinstanceuid",
    "dicomid",
    "uri",
    "id",
]
DETAIL_COLUMNS = {
    schema.PATIENT_ID: ["patientid", "patient", "subjectid", "subject"],
    schema.SPLIT: ["split", "subset", "partition"],
    schema.VIEW: ["viewposition", "view", "projection", "appa"],
    schema.SEX: ["sex", "gender", "patientsex", "patientgender"],
    schema.AGE_YEARS: ["ageyears", "age", "patientage"],
    schema.STUDY_ID: ["studyinstanceuid", "studyuid", "studyid", "study"],
    schema.SERIES_ID: ["seriesinstanceuid", "seriesuid", "seriesid", "series"],
}
_LISTS = ["findinglabels", "findings", "finding", "labels", "label", "diagnoses", "diagnosis", "classname", "class"]
_VALUE_COLUMNS = ["value", "present", "presence", "positive", "target", "result", "status"]
_NO_NAME = ("", "unnamed0")  # a column without a name, as pandas writes its index

_NEGATIVE, _POSITIVE, _UNCERTAIN = 1, 2, 4  # what rows say of an image and a finding; 0: nothing
_VALUES = {
    # The last words are Excel's TRUE and FALSE in German, French, Spanish and Italian.
    _POSITIVE: [
        "1",
        "1.0",
        "1,0",
        "true",
        "yes",
        "y",
        "t",
        "positive",
        "present",
        "wahr",
        "vrai",
        "verdadero",
        "vero",
    ],
    _NEGATIVE: ["0", "0.0", "0,0", "false", "no", "n", "f", "negative", "absent", "falsch", "faux", "falso"],
    _UNCERTAIN: ["-1", "-1.0", "-1,0", "uncertain", "unknown", "?"],
    0: ["", *["nan", "na", "n/a", "<na>", "null", "none"]],
}
_VALUE_WORDS = [word for words in _VALUES.values() for word in words]  # as a pa.array, it would import pandas here
_VALUE_BITS = np.array([bits for bits, words in _VALUES.items() for _ in words], np.uint8)
_EXPECTED_VALUE = "1, 0, -1 or blank"
_VIEWS = {
    "pa": "PA",
    "posteroanterior": "PA",
    "ap": "AP",
    "anteroposterior": "AP",
    "frontal": "FRONTAL",
    "lateral": "LATERAL",
    "lat": "LATERAL",
    "l": "LATERAL",
    "ll": "LL",
    "rl": "RL",
}
_DEVICES = "supportdevices"  # not a disease: "No finding" says nothing about it
_MOST_FINDINGS = 1000
_NAMED = 10  # columns in a message


@dataclass(frozen=True)
class LabelTable:
    """The contents of a table for the M images that it names."""

    location: str
    names: pa.ChunkedArray
    """(M,) the images' `image_match.normalized` names, each once."""
    rows: np.ndarray
    """(M,) number of each image's first row in the file; the header is row 1."""
    findings: tuple[str, ...]
    labels: np.ndarray
    """(M, findings) int8, as `schema.LABELS`."""
    details: Mapping[str, pa.Array]
    """(M,) other columns of `schema.MANIFEST` that the table has; null where it is blank."""
    mapping: LabelMapping
    notes: Sequence[str]


def read_label_table(labeling: Labeling) -> LabelTable:
    """Read the table of `labeling`, with its mapping.

    Raises:
        UserError: it is not a table, a column is missing or cannot be recognized, a value is invalid, or rows of an
            image contradict each other in its patient or split.
        StorageError: it cannot be read.
    """
    location = storage.normalize(labeling.labels)
    mapping = read_mapping(labeling.label_mapping, labeling.uncertain_as)
    table = read_table(location)
    columns = _recognize(location, table, labeling)
    names = normalized(table[columns.image])
    if (blank := pc.index(names, "").as_py()) >= 0:
        raise invalid_value(location, blank, f"an image in the column {columns.image}", "")
    encoded = pa.concat_arrays(names.chunks).dictionary_encode()
    image_R, images = encoded.indices.to_numpy(), len(encoded.dictionary)
    if columns.finding:
        statements = _read_lists(location, table, columns, mapping, image_R, images)
    else:
        statements = _read_values(location, table, columns, mapping, image_R, images)
    labels_MF, findings = mapping.merge(statements.labels(mapping, labeling.blank_as), statements.words)
    if not findings:
        raise UserError(f"{location}: expected findings, got none that are not ignored: correct --label-mapping")
    details, differing_M = _read_details(location, table, columns.details, image_R, images)
    contradictory = int((statements.contradictory | differing_M).sum())
    return LabelTable(
        location=location,
        names=pa.chunked_array([encoded.dictionary]),
        rows=_first_rows(image_R, images) + 2,
        findings=findings,
        labels=labels_MF,
        details=details,
        mapping=mapping,
        notes=[*statements.notes, *contradictions_note(contradictory, storage.name(location))],
    )


# ---- Columns


@dataclass(frozen=True)
class _Columns:
    """Which column has what. There are either `findings` or a `finding`."""

    image: str
    details: Mapping[str, str]  # by the column of the manifest
    findings: Sequence[str] = ()  # columns of values, a finding each
    finding: str = ""  # column of names of findings
    value: str = ""  # column of values of `finding`
    notes: Sequence[str] = ()


def _recognize(location: str, table: pa.Table, labeling: Labeling) -> _Columns:
    """The columns that the options name, or that have a usual name or usual values."""

    def find(named: str, option: str, usual: Sequence[str]) -> str | None:
        if named.casefold() == NO_COLUMN:
            return None
        if named:
            return _named(location, table, named, option)
        by_key = {word_key(name): name for name in reversed(table.column_names)}
        return next((by_key[key] for key in usual if key in by_key), None)

    image = find(labeling.image_column, "--image-column", IMAGE_COLUMNS)
    if image is None:
        got = _some(table.column_names)
        raise UserError(
            f"{location}: expected a column with the images' names, got {got}: name it with --image-column"
        )
    named = {
        schema.PATIENT_ID: (labeling.patient_column, "--patient-column"),
        schema.SPLIT: (labeling.split_column, "--split-column"),
        schema.VIEW: (labeling.view_column, "--view-column"),
    }
    columns = {name: find(*named.get(name, ("", "")), usual) for name, usual in DETAIL_COLUMNS.items()}
    label_columns = [_named(location, table, name, "--label-columns") for name in labeling.label_columns]
    details = {name: column for name, column in columns.items() if column and column not in (image, *label_columns)}
    remaining = [name for name in table.column_names if name not in (image, *details.values())]
    remaining = [name for name in remaining if word_key(name) not in _NO_NAME]

    finding = ""
    if len(label_columns) == 1 and not _has_values(table[label_columns[0]]):
        finding = label_columns[0]
    elif not label_columns:
        usual = [name for key in _LISTS for name in remaining if word_key(name) == key]
        finding = next((name for name in usual if not _has_values(table[name])), "")
    if finding:
        value = find(labeling.value_column, "--value-column", _VALUE_COLUMNS)
        if value and not labeling.value_column and not _has_values(table[value]):
            value = None
        return _Columns(image, details, finding=finding, value=value or "")
    if labeling.value_column and labeling.value_column.casefold() != NO_COLUMN:
        raise UserError(
            f"{location}: expected a column with the names of findings for --value-column, got none: name it with "
            f"--label-columns"
        )
    findings = label_columns or [name for name in remaining if _has_values(table[name])]
    if not findings:
        raise UserError(
            f"{location}: expected columns with {_EXPECTED_VALUE}, or one with the names of findings, got "
            f"{_some(table.column_names)}: name them with --label-columns"
        )
    unused = [name for name in remaining if name not in findings]
    notes = [f"columns of {storage.name(location)} that are not used: {_some(unused)}"] if unused else []
    return _Columns(image, details, findings=findings, notes=notes)


def _named(location: str, table: pa.Table, name: str, option: str) -> str:
    """The column with this name, regardless of case."""
    for column in table.column_names:
        if folded(column) == folded(name):
            return column
    raise UserError(f"{location}: expected the column {name!r}, got {_some(table.column_names)}: correct {option}")


def _has_values(texts: pa.ChunkedArray) -> bool:
    """Whether most texts that are not blank are 1, 0 or -1 in some form; the others are then mistakes."""
    code = _value_codes(texts)
    valid = int((code >= 0).sum())
    blank = int((_VALUE_BITS[code[code >= 0]] == 0).sum())
    return valid - blank > len(code) - valid


def _value_codes(texts: pa.ChunkedArray) -> np.ndarray:
    """Each text's index in `_VALUE_BITS`; -1 for others."""
    code = pc.index_in(pc.utf8_lower(texts), value_set=pa.array(_VALUE_WORDS))
    return pc.fill_null(code, -1).to_numpy()


def _value_bits(location: str, table: pa.Table, column: str) -> np.ndarray:
    """(R,) what each row of a column of values says: `_NEGATIVE`, `_POSITIVE`, `_UNCERTAIN` or 0."""
    code = _value_codes(table[column])
    if (code < 0).any():
        row = int((code < 0).argmax())
        raise invalid_value(location, row, f"{_EXPECTED_VALUE} in the column {column}", table[column][row].as_py())
    return _VALUE_BITS[code]


def _some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


# ---- Labels


@dataclass(frozen=True)
class _Statements:
    """The labels of W words in the rows of M images."""

    words: Sequence[str]
    bits: np.ndarray  # uint8 (M, W): any of `_NEGATIVE`, `_POSITIVE`, `_UNCERTAIN`; 0: nothing
    notes: Sequence[str] = ()

    @property
    def contradictory(self) -> np.ndarray:
        """(M,) bool: whether rows of the image contradict each other."""
        return np.logical_or.reduce(self.bits & (self.bits - 1), axis=1, dtype=bool)  # more than one bit

    def labels(self, mapping: LabelMapping, blank_as: str) -> np.ndarray:
        """int8 (M, W), as `schema.LABELS`; contradictory ones are unknown."""
        labels_MW = np.empty(self.bits.shape, np.int8)
        by_bits = np.full(8, schema.UNKNOWN, np.int8)
        by_bits[_NEGATIVE], by_bits[_POSITIVE] = schema.NEGATIVE, schema.POSITIVE
        by_bits[0] = schema.NEGATIVE if blank_as == "negative" else schema.UNKNOWN
        for number, word in enumerate(self.words):
            by_bits[_UNCERTAIN] = mapping.uncertain_label(mapping.finding(word) or word)
            labels_MW[:, number] = by_bits[self.bits[:, number]]
        return labels_MW


def _read_values(
    location: str, table: pa.Table, columns: _Columns, mapping: LabelMapping, image_R: np.ndarray, images: int
) -> _Statements:
    """A column for each finding. A column "No finding" is none, unless it is the only one."""
    healthy = [name for name in columns.findings if word_key(name) in mapping.no_finding]
    words = [name for name in columns.findings if name not in healthy] or healthy
    bits_MW = np.zeros((images, len(words)), np.uint8)
    once = images == len(image_R)
    for number, word in enumerate(words):
        bits = _value_bits(location, table, word)
        if once:
            bits_MW[:, number] = bits
        else:
            np.bitwise_or.at(bits_MW[:, number], image_R, bits)
    if words != healthy:
        for name in healthy:
            healthy_M = np.zeros(images, bool)
            healthy_M[image_R[_value_bits(location, table, name) == _POSITIVE]] = True
            _apply_no_finding(bits_MW, words, healthy_M)
    return _Statements(words, bits_MW, columns.notes)


def _read_lists(
    location: str, table: pa.Table, columns: _Columns, mapping: LabelMapping, image_R: np.ndarray, images: int
) -> _Statements:
    """A column with the names of findings: with a value, the only one in its row, else all that are positive."""
    texts = pa.concat_arrays(table[columns.finding].cast(pa.large_string()).chunks)
    if columns.value:
        row_P, bits_P = np.arange(len(texts)), _value_bits(location, table, columns.value)
    else:
        separator = next((each for each in (LIST_SEPARATOR, ";") if _contains(texts, each)), ",")
        lists = pc.split_pattern(texts, separator)
        row_P, texts = pc.list_parent_indices(lists).to_numpy(), pc.utf8_trim_whitespace(pc.list_flatten(lists))
        bits_P = np.full(len(texts), _POSITIVE, np.uint8)
    encoded = texts.dictionary_encode()
    numbers: dict[str, int] = {}  # by `word_key`
    words: list[str] = []
    blank, healthy = -1, -2
    number_D = np.full(len(encoded.dictionary), blank)
    for at, word in enumerate(encoded.dictionary.to_pylist()):
        key = word_key(word)
        if key in mapping.no_finding:
            number_D[at] = healthy
        elif word.lower() not in _VALUES[0]:
            if key not in numbers:
                numbers[key] = len(words)
                words.append(word)
            number_D[at] = numbers[key]
    if len(words) > _MOST_FINDINGS:
        raise UserError(
            f"{location}: expected at most {_MOST_FINDINGS:,} findings, got {len(words):,} in the column "
            f"{columns.finding}: name another column with --label-columns"
        )
    number_P, image_P = number_D[encoded.indices.to_numpy()], image_R[row_P]
    bits_MW = np.zeros((images, len(words)), np.uint8)
    named_P = number_P >= 0
    np.bitwise_or.at(bits_MW, (image_P[named_P], number_P[named_P]), bits_P[named_P])
    healthy_M = np.zeros(images, bool)
    healthy_M[image_P[(number_P == healthy) & (bits_P == _POSITIVE)]] = True
    file = storage.name(location)
    _apply_no_finding(bits_MW, words, healthy_M)
    notes = []
    if not columns.value:
        listed_M = np.zeros(images, bool)
        listed_M[image_P[named_P]] = True
        bits_MW[listed_M] |= np.where(bits_MW[listed_M] == 0, _NEGATIVE, 0).astype(np.uint8)
        if silent := images - int((listed_M | healthy_M).sum()):
            notes.append(
                f"without findings in {file}: {counted(silent, 'image')}; --blank-as decides their labels, and words "
                f"such as 'No finding' make findings negative"
            )
    return _Statements(words, bits_MW, notes)


def _contains(texts: pa.Array, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring(texts, pattern), min_count=0).as_py())


def _apply_no_finding(bits_MW: np.ndarray, words: Sequence[str], healthy_M: np.ndarray) -> None:
    """Make findings of healthy images that are not mentioned negative, and contradict those that are positive."""
    abnormal_W = np.array([word_key(word) != _DEVICES for word in words], bool)
    bits = bits_MW[np.ix_(healthy_M, abnormal_W)]
    bits_MW[np.ix_(healthy_M, abnormal_W)] = np.where(bits & (_NEGATIVE | _UNCERTAIN), bits, bits | _NEGATIVE)


# ---- Patients, splits and other details


def _read_details(
    location: str, table: pa.Table, columns: Mapping[str, str], image_R: np.ndarray, images: int
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """(M,) columns of the manifest; (M,) bool, whether the rows of an image differ in one of them, which is null.

    Raises:
        UserError: rows of an image differ in the patient or the split, or a split is none.
    """
    details, differing_M = {}, np.zeros(images, bool)
    for name, column in columns.items():
        texts = pa.concat_arrays(table[column].chunks)
        encoded = blank_as_null(texts).dictionary_encode()
        code_R = pc.fill_null(encoded.indices, -1).to_numpy()
        filled = np.flatnonzero(code_R >= 0)
        row_M = np.full(images, -1)
        row_M[image_R[filled][::-1]] = filled[::-1]  # the first that is not blank
        differs_R = (code_R >= 0) & (code_R != code_R[row_M[image_R]])
        if differs_R.any() and name in (schema.PATIENT_ID, schema.SPLIT):
            row = int(differs_R.argmax())
            expected = f"the same {column} as in row {row_M[image_R[row]] + 2} for the same image"
            raise invalid_value(location, row, expected, texts[row].as_py())
        different_M = np.zeros(images, bool)
        different_M[image_R[differs_R]] = True
        differing_M |= different_M
        of_image = texts.take(pa.array(row_M, mask=(row_M < 0) | different_M))
        details[name] = _detail(location, column, name, texts, of_image)
    return details, differing_M


def _detail(location: str, column: str, name: str, texts: pa.Array, of_image: pa.Array) -> pa.Array:
    """A column of the manifest from the texts of the images, which are null where they are blank."""
    if name == schema.SPLIT:
        splits = translated(texts, SPLIT_WORDS)
        wrong = pc.and_(pc.is_null(splits), pc.not_equal(texts, ""))
        if (row := pc.index(wrong, True).as_py()) >= 0:
            raise invalid_value(location, row, f"train, val or test in the column {column}", texts[row].as_py())
        return translated(of_image, SPLIT_WORDS)
    if name == schema.VIEW:
        return translated(of_image, _VIEWS)
    if name == schema.SEX:
        return translated(of_image, SEXES)
    if name == schema.AGE_YEARS:  # "63", "63,5" or, as in DICOM, "063Y"
        years = pc.replace_substring_regex(pc.replace_substring(pc.fill_null(of_image, ""), ",", "."), "[Yy]$", "")
        return ages(numbers(years))
    return of_image


def _first_rows(image_R: np.ndarray, images: int) -> np.ndarray:
    first_M = np.empty(images, np.int64)
    first_M[image_R[::-1]] = np.arange(len(image_R))[::-1]
    return first_M
