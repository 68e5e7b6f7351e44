"""Export of the scores of millions of images as CSV: seconds of CPU time and peak memory.

    python -m tests.export.large_scores FOLDER ROWS PER

writes a run of a classifier with 14 findings, four images of each study, to FOLDER, unless it is there, and prints
{"rows": …, "cpu_s": …, "peak_mib": …} of its export per image, study or patient (PER).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema
from cxr.cli.exports import export_csv
from cxr.data.run_ledger import Increment, folder_of
from cxr.evaluation.run import read_run
from tests.peak_memory import peak_mib
from tests.written_runs import write_ledger

_FILE_ROWS, _GROUP_ROWS = 100_000, 4096


def write(folder: Path, rows: int) -> None:
    """Scores of which the images of a study are a quarter of the run apart, in files like those of `cxr score`."""
    from tests.export.scored_parts import part  # imports torch, which the export does without

    scores, rng = folder / folder_of(0), np.random.default_rng(0)
    scores.mkdir(parents=True)
    empty = part("classify", [])
    about = empty.schema.with_metadata({schema.FINDINGS_KEY: json.dumps(schema.FINDINGS)})
    files = -(-rows // _FILE_ROWS)
    for file in range(files):
        with pq.ParquetWriter(scores / f"part-{file:05d}.parquet", about) as writer:
            end = min((file + 1) * _FILE_ROWS, rows)
            for start in range(file * _FILE_ROWS, end, _GROUP_ROWS):
                numbers = np.arange(start, min(start + _GROUP_ROWS, end))
                writer.write_table(_table(numbers, rows, rng, about))
    settings = {"archive": "/archive", "checkpoint_sha256": "0" * 64, "recipe": {"family": "classify"}}
    write_ledger(folder, settings, Increment(0, files, rows, new=rows, changed=0))


def _table(numbers: np.ndarray, rows: int, rng: np.random.Generator, about: pa.Schema) -> pa.Table:
    study = numbers % max(1, rows // 4)
    p = rng.random((len(numbers), len(schema.FINDINGS)), np.float32)
    ends = pa.array(np.arange(len(numbers) + 1, dtype=np.int32) * p.shape[1])
    columns = {
        schema.IMAGE_ID: [f"{number:08d}.png" for number in numbers.tolist()],
        schema.SPLIT: ["test"] * len(numbers),
        schema.SOURCE_URI: [f"s3://archive/images/{number:08d}.png" for number in numbers.tolist()],
        schema.STUDY_ID: [f"1.2.840.113619.2.5.{number:010d}" for number in study.tolist()],
        schema.PATIENT_ID: [f"{number:08d}" for number in (study // 2).tolist()],
        schema.VIEW: np.where(numbers % 3 == 0, "LATERAL", "PA").tolist(),
        schema.PROBABILITIES: pa.ListArray.from_arrays(ends, pa.array(p.reshape(-1))),
        schema.DECISIONS: pa.ListArray.from_arrays(ends, pa.array((p >= 0.5).astype(np.int8).reshape(-1))),
    }
    arrays = [
        pa.array(columns[field.name]).cast(field.type)
        if field.name in columns
        else pa.nulls(len(numbers), field.type)
        for field in about
    ]
    return pa.Table.from_arrays(arrays, schema=about)


def measure(folder: Path, per: str) -> dict[str, float]:
    began = time.process_time()
    _, counts = export_csv(read_run(str(folder)), str(folder / "export"), per)  # pyright: ignore[reportArgumentType]
    taken = time.process_time() - began
    return {"rows": counts["rows"], "cpu_s": round(taken, 1), "peak_mib": round(peak_mib())}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if not place.exists():
        write(place, int(sys.argv[2]))
    else:
        print(json.dumps(measure(place, sys.argv[3])))
