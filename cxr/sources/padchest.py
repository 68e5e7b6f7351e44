"""PadChest as the BIMCV publishes it (Bustos et al. 2020): 160,861 PNG files of 16 bits from one Spanish hospital.

    PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv[.gz]    ImageID, StudyID, PatientID, …, Labels
    0/ImageID … 54/ImageID                                       or all in one folder, or anywhere below the root

`Labels` lists words such as ['cardiomegaly', 'pleural effusion'] out of 193. `padchest_words` says to which finding
a word belongs; words without one are counted in a note, and all words are in `schema.EXTRA`. A finding that the
words do not name is negative. It is unknown if there are no words; if they say only that nothing changed or that
the image is poor; if one of them is "exclude", which marks reports that the authors left out; if one is
unrecognized; or if "normal" stands beside findings.

There are no official splits: they are a hash of the patient. About a quarter of the reports were labeled by
physicians and the others by a program, which `MethodLabel` in `schema.EXTRA` says.

Quirks: some values contain line breaks. Sex is M, F, O or "None". Age is the year of the exam minus that of birth.
The view is `Projection`, and AP_horizontal (lying) counts as AP, COSTAL (ribs) as unknown. Some files of the
distribution are damaged (`DAMAGED`); they are listed as all others are, and decoding rejects those that it cannot
read. The reports are in the list too; they are not read.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.arrow_csv import has_columns, invalid_value, locate, read_columns
from cxr.sources.image_files import PATH, image_ids, image_keys, list_images
from cxr.sources.image_table import (
    SEXES,
    ages,
    blank_as_null,
    json_objects,
    listing_notes,
    match,
    merged_rows,
    numbers,
    taken,
    translated,
)
from cxr.sources.label_rows import contradictions_note, unknown_words_note, word_key
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.padchest_words import EXCLUDED, FINDINGS, NORMAL, UNINFORMATIVE, WITHOUT_FINDING, WORDS
from cxr.sources.splits import split_by_patient
from cxr.wording import counted

name = "padchest"

LIST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
IMAGE, STUDY, PATIENT = "ImageID", "StudyID", "PatientID"
STUDY_DATE, BIRTH, SEX = "StudyDate_DICOM", "PatientBirth", "PatientSex_DICOM"
PROJECTION, METHOD, LABELS = "Projection", "MethodLabel", "Labels"

_KEY = "key"
_VIEWS = {"pa": "PA", "ap": "AP", "ap_horizontal": "AP", "l": "LATERAL"}
_NO_LIST = {"", "nan", "none"}  # texts in `Labels` for no list
_OTHER_WORDS = {*WITHOUT_FINDING, *UNINFORMATIVE, NORMAL, EXCLUDED}
_WORDS_IN_NOTE = 10

# Files that are missing, truncated or broken in the distribution, as torchxrayvision lists them.
DAMAGED = frozenset(
    """
    216840111366964012819207061112010307142602253_04-014-084 216840111366964012989926673512011074122523403_00-163-058
    216840111366964012959786098432011033083840143_00-176-115 216840111366964012558082906712009327122220177_00-102-064
    216840111366964012339356563862009072111404053_00-043-192 216840111366964013076187734852011291090445391_00-196-188
    216840111366964012373310883942009117084022290_00-064-025 216840111366964012283393834152009033102258826_00-059-087
    216840111366964012373310883942009170084120009_00-097-074 216840111366964012819207061112010315104455352_04-024-184
    216840111366964012819207061112010306085429121_04-020-102 216840111366964012989926673512011083134050913_00-168-009
    216840111366964012373310883942009152114636712_00-102-045 216840111366964012819207061112010281134410801_00-129-131
    216840111366964012487858717522009280135853083_00-075-001 216840111366964012989926673512011151082430686_00-157-045
    216840111366964013686042548532013208193054515_02-026-007 216840111366964013590140476722013058110301622_02-056-111
    216840111366964013590140476722013043111952381_02-065-198 216840111366964013829543166512013353113303615_02-092-190
    216840111366964013962490064942014134093945580_01-178-104
    """.split()  # noqa: SIM905
)


def detect(uri: str) -> bool:
    location = locate(uri, LIST)
    return location is not None and has_columns(location, (IMAGE, LABELS))


def manifest(uri: str) -> Manifest:
    """List every image file once, joined to the list by its name; notes count missing and unlisted images.

    Raises:
        UserError: the list is missing or damaged, or there are no images.
    """
    location = locate(uri, LIST)
    if location is None:
        raise UserError(f"expected {LIST} or {LIST}.gz in {uri}, got neither: add it, or use --source folder")
    file = storage.name(location)
    listed = read_columns(location, (IMAGE, LABELS), (STUDY, PATIENT, STUDY_DATE, BIRTH, SEX, PROJECTION, METHOD))
    list_keys = image_keys(listed[IMAGE].combine_chunks())
    if (row := list_keys.index("").as_py()) >= 0:
        raise invalid_value(location, row, "an image name", listed[IMAGE][row].as_py())
    rows, contradictory = merged_rows(listed.drop_columns(IMAGE).append_column(_KEY, list_keys), _KEY)
    files, notes = list_images(uri)
    paths = files[PATH].combine_chunks()
    keys = image_keys(paths)
    row_of_image = match(keys, rows, _KEY)
    columns = taken(rows, row_of_image)
    labels_NF, label_notes = _labels(columns[LABELS], file)
    names = pa.array([path.rpartition("/")[2] for path in paths.to_pylist()], pa.string())
    ids, id_notes = image_ids(paths, names)
    patients = pc.coalesce(blank_as_null(columns[PATIENT]), keys)
    exam_years = numbers(pc.utf8_slice_codeunits(columns[STUDY_DATE], 0, 4))
    table = manifest_table(
        {
            schema.IMAGE_ID: ids,
            schema.PATIENT_ID: patients,
            schema.STUDY_ID: blank_as_null(columns[STUDY]),
            schema.SPLIT: split_by_patient(patients),
            schema.SOURCE_URI: files[schema.SOURCE_URI],
            schema.SEX: translated(columns[SEX], SEXES),
            schema.AGE_YEARS: ages(exam_years - numbers(columns[BIRTH])),
            schema.VIEW: translated(columns[PROJECTION], _VIEWS),
            schema.LABELS: labels_column(labels_NF),
            schema.EXTRA: json_objects({each: columns[each] for each in (PROJECTION, METHOD, LABELS)}),
        }
    )
    notes += [
        *listing_notes(file, rows.num_rows, row_of_image),
        *id_notes,
        *contradictions_note(contradictory, file),
    ]
    damaged = pc.sum(pc.is_in(keys, value_set=pa.array(sorted(DAMAGED)))).as_py()
    notes += [f"known to be damaged in the distribution: {counted(damaged, 'image')}"] if damaged else []
    return Manifest(table, FINDINGS, [*notes, *label_notes])


def _labels(texts: pa.Array, file: str) -> tuple[np.ndarray, list[str]]:
    """int8 (N, findings) from the column `Labels`, and notes. Each different text is read once."""
    encoded = texts.dictionary_encode()
    number = encoded.indices.to_numpy(zero_copy_only=False)
    images = np.bincount(number, minlength=len(encoded.dictionary)).tolist()
    labels_TF = np.full((len(images), len(FINDINGS)), schema.UNKNOWN, np.int8)
    unrecognized: Counter[str] = Counter()
    unmapped: Counter[str] = Counter()
    contradictory = 0
    for text, (content, count) in enumerate(zip(encoded.dictionary.to_pylist(), images, strict=True)):
        words = _words(content)
        findings = {finding for word in words for finding in WORDS.get(word, ())}
        unlisted = [word for word in words if word not in WORDS]
        strange = [word for word in unlisted if word not in _OTHER_WORDS]
        unrecognized.update(dict.fromkeys(strange, count))
        unmapped.update(dict.fromkeys((word for word in unlisted if word in WITHOUT_FINDING), count))
        is_contradictory = NORMAL in words and bool(findings)
        contradictory += count if is_contradictory else 0
        is_complete = not strange and EXCLUDED not in words and any(word not in UNINFORMATIVE for word in words)
        named = schema.UNKNOWN if is_contradictory else schema.POSITIVE
        unnamed = schema.NEGATIVE if is_complete else schema.UNKNOWN
        labels_TF[text] = [named if finding in findings else unnamed for finding in FINDINGS]
    notes = unknown_words_note(unrecognized, file, "the other findings of these images are unknown")
    if unmapped:
        shown = [f"{WITHOUT_FINDING[word]!r} ({count:,})" for word, count in unmapped.most_common(_WORDS_IN_NOTE)]
        more = len(unmapped) - len(shown)
        rest = f" and {counted(more, 'other word')}" if more > 0 else ""
        notes.append(f"words in {file} that belong to none of the findings: {', '.join(shown)}{rest}")
    if contradictory:
        images_text = counted(contradictory, "image")
        notes.append(f"{NORMAL!r} together with findings in {file}: {images_text}; these findings are unknown")
    return labels_TF[number], notes


def _words(text: str) -> dict[str, None]:
    """The words of a list such as "['nodule', ' pleural effusion']", by `word_key`, in order and once each."""
    if text.casefold() in _NO_LIST:
        return {}
    words = (word.strip(" []'\"\r\n\t") for word in text.split(","))
    return {word_key(word): None for word in words if word}
