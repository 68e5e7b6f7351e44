"""Replace the labels of a manifest by those of a table, and rename or merge findings.

The table may also name patients and splits. Its patients replace those of the archive, and if the archive's splits
are not disjoint by these patients, a hash of the patients replaces them. A column of splits takes precedence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources.image_match import match_images
from cxr.sources.label_mapping import LabelMapping, read_mapping
from cxr.sources.label_table import read_label_table
from cxr.sources.labeler import UNCERTAIN
from cxr.sources.manifest import Manifest, labels_column, replace_column
from cxr.sources.options import Labeling
from cxr.sources.splits import official_splits, split_by_patient
from cxr.wording import counted

_EXAMPLES = 3
_FINDINGS_IN_NOTE = 20
_SHOWN = 100  # letters of a name in an error message


def with_label_table(manifest: Manifest, labeling: Labeling) -> Manifest:
    """The images that the table of `labeling` names, with its labels, patients and splits.

    Raises:
        UserError: as `read_label_table`, the table names none of the images, or a patient is in several splits.
    """
    table = read_label_table(labeling)
    file = storage.name(table.location)
    match = match_images(manifest.table, table.names)
    listed = match.rows >= 0
    if not listed.any():
        ids = manifest.table[schema.IMAGE_ID]
        raise UserError(
            f"expected labels of the archive's {counted(len(ids), 'image')}, such as {_short(ids[0])}, got "
            f"{table.location}, which names {counted(len(table.rows), 'image')}, such as {_short(table.names[0])}: "
            f"use another table, or name its column of images with --image-column"
        )
    row_N = match.rows[listed]
    notes = [*manifest.notes, *table.notes, f"labels from {file}: {len(row_N):,} of {_images(len(listed))}"]
    if len(row_N) < len(listed):
        examples = _examples(manifest.table[schema.IMAGE_ID].take(np.flatnonzero(~listed)[:_EXAMPLES]).to_pylist())
        skipped = _images(len(listed) - len(row_N))
        notes.append(f"skipped, because {file} has no row for them: {skipped} ({examples}){match.ambiguity(file)}")
    unused = np.setdiff1d(np.arange(len(table.rows)), row_N)
    if len(unused):
        examples = _examples([f"row {row}" for row in table.rows[unused[:_EXAMPLES]]])
        notes.append(f"in {file}, but not in the archive: {_images(len(unused))} ({examples})")

    rows = manifest.table.filter(pa.array(listed)) if not listed.all() else manifest.table
    details = {name: column.take(pa.array(row_N)) for name, column in table.details.items()}
    own_splits = manifest.table[schema.SPLIT]
    hashed = pc.all(pc.equal(own_splits, split_by_patient(schema.patients_of(manifest.table)))).as_py()
    rows, split_notes = _with_splits(rows, details, file, hashed=hashed)
    for name in details.keys() - {schema.PATIENT_ID, schema.SPLIT}:
        rows = replace_column(rows, name, pc.coalesce(details[name].cast(rows[name].type), rows[name]))
    labels_NF = table.labels[row_N]
    rows = replace_column(rows, schema.LABELS, labels_column(labels_NF))
    rows = _with_renamed_boxes(rows, table.mapping)
    notes += [*split_notes, labels_note(labels_NF, table.findings)]
    return Manifest(rows, table.findings, notes)


def _with_splits(
    rows: pa.Table, details: dict[str, pa.Array], file: str, *, hashed: bool
) -> tuple[pa.Table, list[str]]:
    """Patients and splits of the table; the archive's own remain unless they follow from its patients (`hashed`)."""
    patients = schema.patients_of(rows)
    notes = []
    if schema.PATIENT_ID in details:
        patients = pc.coalesce(details[schema.PATIENT_ID], patients)
        rows = replace_column(rows, schema.PATIENT_ID, patients)
        notes.append(f"patients from {file}, not from the archive: {pc.count_distinct(patients).as_py():,}")
    if schema.SPLIT in details:
        several = _in_several(patients, details[schema.SPLIT])
        if several and schema.PATIENT_ID in details:
            raise UserError(
                f"expected the images of each patient in one split, got {counted(several, 'patient')} in several in "
                f"{file}: correct the splits, or derive them from the patients with --split-column none"
            )
        if several:
            notes.append(
                f"splits from {file}: they divide the images of {counted(several, 'patient')}, as the archive's "
                f"layout identifies patients; if it is wrong, name the patients with --patient-column"
            )
            patients = rows[schema.IMAGE_ID]
        splits = official_splits(patients, details[schema.SPLIT])
    elif hashed:
        splits = split_by_patient(patients)
    elif schema.PATIENT_ID in details and (several := _in_several(patients, rows[schema.SPLIT])):
        splits = split_by_patient(patients)
        notes.append(
            f"the archive's own splits are not used, because they divide the images of "
            f"{counted(several, 'patient')} of {file}"
        )
    else:
        splits = rows[schema.SPLIT]
    counts = pc.value_counts(splits)
    by_split = {entry["values"]: entry["counts"] for entry in counts.to_pylist()}
    notes.append("images by split: " + ", ".join(f"{name} {by_split.get(name, 0):,}" for name in schema.SPLITS))
    return replace_column(rows, schema.SPLIT, splits), notes


def _in_several(patients: pa.ChunkedArray | pa.Array, splits: pa.ChunkedArray | pa.Array) -> int:
    """The number of patients with images in several splits."""
    pairs = pa.table({"patient": patients, "split": splits}).filter(pc.is_valid(splits))
    counts = pairs.group_by("patient").aggregate([("split", "count_distinct")])["split_count_distinct"]
    return pc.sum(pc.greater(counts, 1)).as_py() or 0


def labels_note(labels_NF: np.ndarray, findings: Sequence[str]) -> str:
    """A note with the numbers of positive, negative and unknown images of each finding."""
    counts = [(labels_NF == label).sum(0) for label in (schema.POSITIVE, schema.NEGATIVE, schema.UNKNOWN)]
    of_finding = [
        f"{name} {positive:,}/{negative:,}/{unknown:,}"
        for name, positive, negative, unknown in zip(findings, *counts, strict=True)
    ]
    more = f", and {len(findings) - _FINDINGS_IN_NOTE:,} more" if len(findings) > _FINDINGS_IN_NOTE else ""
    return f"images with positive/negative/unknown label: {', '.join(of_finding[:_FINDINGS_IN_NOTE])}{more}"


def mapped(manifest: Manifest, labeling: Labeling) -> Manifest:
    """Apply the mapping and the policy for uncertain labels to the labels and boxes of an archive's source.

    Raises:
        UserError: there are no labels.
    """
    if not manifest.findings:
        raise UserError(
            "expected an archive with labels for --uncertain-as and --label-mapping, got one without: add --labels"
        )
    mapping = read_mapping(labeling.label_mapping, labeling.uncertain_as)
    table, findings = manifest.table, manifest.findings
    known = table[schema.LABELS].is_valid()
    flat = pc.list_flatten(table[schema.LABELS]).to_numpy()
    labels_NW = np.full((table.num_rows, len(findings)), schema.UNKNOWN, np.int8)
    labels_NW[known.to_numpy()] = flat.reshape(-1, len(findings))
    for number, uncertain_N in _uncertain(table[schema.EXTRA], findings).items():
        label = mapping.uncertain_label(mapping.finding(findings[number]) or findings[number])
        labels_NW[uncertain_N & (labels_NW[:, number] == schema.UNKNOWN), number] = label
    labels_NF, merged = mapping.merge(labels_NW, findings)
    labels = labels_column(labels_NF)
    rows = replace_column(table, schema.LABELS, pc.if_else(known, labels, None))
    return Manifest(_with_renamed_boxes(rows, mapping), merged, [*manifest.notes, labels_note(labels_NF, merged)])


def _uncertain(extra: pa.ChunkedArray, findings: Sequence[str]) -> dict[int, np.ndarray]:
    """(N,) bool by finding: whether it is uncertain, for the findings that `labeler` marked so in `schema.EXTRA`.

    Other findings are marked there if a file of boxes has replaced those of the source.
    """
    encoded = extra.combine_chunks().dictionary_encode()
    code_N = pc.fill_null(encoded.indices, -1).to_numpy()
    marked = np.zeros((len(findings), len(encoded.dictionary) + 1), bool)  # the last is that of null
    numbers = {finding: number for number, finding in enumerate(findings)}
    for at, text in enumerate(encoded.dictionary.to_pylist()):
        if UNCERTAIN in text:
            for finding in numbers.keys() & json.loads(text).get(UNCERTAIN, "").split("|"):
                marked[numbers[finding], at] = True
    return {number: marked[number][code_N] for number in np.flatnonzero(marked.any(1)).tolist()}


def _with_renamed_boxes(rows: pa.Table, mapping: LabelMapping) -> pa.Table:
    """Boxes labeled with findings; boxes of ignored words keep them, so that no model uses these boxes."""
    lists = pa.concat_arrays(rows[schema.BOXES].chunks)
    if not mapping.findings or not len(lists.values):
        return rows
    encoded = lists.values.field(schema.LABEL).dictionary_encode()
    renamed = pa.array([mapping.finding(label) or label for label in encoded.dictionary.to_pylist()], pa.string())
    columns = [lists.values.field(field.name) for field in schema.BOX_TYPE]
    columns[schema.BOX_TYPE.get_field_index(schema.LABEL)] = renamed.take(encoded.indices)
    values = pa.StructArray.from_arrays(columns, fields=list(schema.BOX_TYPE))
    return replace_column(rows, schema.BOXES, pa.ListArray.from_arrays(lists.offsets, values, mask=lists.is_null()))


def _images(count: int) -> str:
    return counted(count, "image")


def _examples(names: Sequence[str]) -> str:
    return f"for example {', '.join(names)}"


def _short(name: pa.Scalar) -> str:
    text = name.as_py()
    return repr(text if len(text) <= _SHOWN else f"…{text[-_SHOWN:]}")
