"""The 14 columns of the CheXpert labeler (Irvin et al. 2019), which also labeled MIMIC-CXR-JPG.

A column contains 1 (the report states the finding), 0 (it denies it), -1 (it is uncertain) or nothing (it does not
mention it). "No Finding" is 1 if the report states no finding, except perhaps support devices.

Uncertain and unmentioned findings are unknown here. `schema.EXTRA` lists the uncertain ones under `UNCERTAIN`, which
distinguishes them from unmentioned ones. "No Finding" is not a finding itself: it makes the unmentioned findings
negative, except Support Devices. A stated finding beside it contradicts it and is unknown.

Many implementations count unmentioned findings as negative. Here they are unknown, as in torchxrayvision (Cohen et
al. 2022): a report that does not mention a rib fracture does not rule it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.sources.arrow_csv import invalid_value
from cxr.wording import counted

FINDINGS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
NO_FINDING = "No Finding"  # as the lists spell it
COLUMNS = (NO_FINDING, *FINDINGS)
UNCERTAIN = "uncertain"  # key in `schema.EXTRA`: the image's uncertain findings, joined by "|"

_VALUES = {"": "", "1": "1", "1.0": "1", "0": "0", "0.0": "0", "-1": "-1", "-1.0": "-1"}


@dataclass(frozen=True)
class Labels:
    """The labels of N images."""

    values: np.ndarray  # int8 (N, findings), as `schema.LABELS`
    uncertain: pa.Array  # the uncertain findings, joined by "|"
    contradictory: int  # images with a finding and "No Finding"

    def notes(self, file: str) -> list[str]:
        """A note on contradictory images."""
        if not self.contradictory:
            return []
        images = counted(self.contradictory, "image")
        return [f"{NO_FINDING!r} together with a finding in {file}: {images}; these findings are unknown"]


def checked(table: pa.Table, location: str) -> pa.Table:
    """The table with the labeler's columns as "1", "0", "-1" or "".

    Raises:
        UserError: a column contains something else; the message names the row.
    """
    for name in COLUMNS:
        number = pc.index_in(table[name].combine_chunks(), value_set=pa.array(list(_VALUES)))
        if number.null_count:
            row = number.is_null().index(True).as_py()
            raise invalid_value(location, row, f"a value of 1, 0, -1 or blank in {name}", table[name][row].as_py())
        values = pa.array(list(_VALUES.values())).take(number)
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table


def labels(columns: Mapping[str, pa.Array]) -> Labels:
    """The labels in the `checked` columns of N images."""
    texts = np.array(["", "0", "1", "-1"])
    values_NF = np.stack([_codes(columns[name], texts) for name in FINDINGS], 1)
    blank, negative, positive, uncertain = (values_NF == code for code in range(4))
    normal_N1 = (_codes(columns[NO_FINDING], texts) == 2)[:, None]
    abnormal_F = np.array([finding != "Support Devices" for finding in FINDINGS])
    implied, contradicting = (values & normal_N1 & abnormal_F for values in (blank, positive))
    labels_NF = np.select(
        [positive & ~contradicting, negative | implied], [schema.POSITIVE, schema.NEGATIVE], schema.UNKNOWN
    )
    patterns = pa.array(uncertain @ (1 << np.arange(len(FINDINGS)))).dictionary_encode()
    names = [
        "|".join(finding for bit, finding in enumerate(FINDINGS) if pattern >> bit & 1)
        for pattern in patterns.dictionary.to_pylist()
    ]
    uncertain_N = pa.array(names, pa.string()).take(patterns.indices)
    return Labels(labels_NF.astype(np.int8), uncertain_N, int(contradicting.any(1).sum()))


def _codes(texts: pa.Array, values: np.ndarray) -> np.ndarray:
    """int32 (N): the index of each text in `values`."""
    return pc.index_in(texts, value_set=pa.array(values.tolist())).to_numpy(zero_copy_only=False)
