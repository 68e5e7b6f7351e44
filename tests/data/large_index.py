"""Folds and sampling of shards with millions of images, from their index: seconds and peak memory.

    python -m tests.data.large_index FOLDER ROWS

writes the index of shards without pixels to FOLDER, unless it is there; otherwise it prints {"rows": …, "folds_s": …,
"sampling_s": …, "peak_gib": …, "stored_mb": …}, and stores in FOLDER what workers need. From the next time on, it
measures what a worker does, which reads that file in place of the index.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data import shards
from cxr.data.sampling import Fold, Sampling, load_selections, rows_of, showing, store_selections
from cxr.data.shard_index import write_index
from cxr.sources.manifest import labels_column
from tests.peak_memory import peak_mib

_FILE_ROWS = 1000
SELECTIONS = "selections.npz"


def write(folder: Path, rows: int) -> None:
    """Shards without pixels: ChestX-ray14's findings, four images of each patient, one file in ten in val."""
    rng = np.random.default_rng(0)
    parts: dict[str, list[dict[str, object]]] = {"train": [], "val": []}

    def files() -> Iterator[tuple[str, pa.Table]]:
        for number in range(rows // _FILE_ROWS):
            split = "val" if number % 10 == 9 else "train"
            path = f"{split}/part-{len(parts[split]):05d}.parquet"
            parts[split].append({"path": path, "rows": _FILE_ROWS})
            images = range(number * _FILE_ROWS, (number + 1) * _FILE_ROWS)
            columns = {
                schema.IMAGE_ID: pa.array([f"{image:08d}_000.png" for image in images]),
                schema.PATIENT_ID: pa.array([f"{image // 4:07d}" for image in images]),
                schema.SPLIT: pa.array([split] * _FILE_ROWS),
                schema.LABELS: labels_column((rng.random((_FILE_ROWS, len(schema.FINDINGS))) < 0.04).astype(np.int8)),
            }
            yield path, pa.table(columns)

    write_index(str(folder), files())
    about = {"kind": shards.KIND, "version": 1, "source": "made", "archive": "", "findings": [*schema.FINDINGS]}
    about |= {"pixels": {"size": 256, "bits": 8}, "row_group_rows": 128, "rejects": 0, "parts": parts}
    storage.write_json(str(folder / shards.ARCHIVE_FILE), about)


def measure(folder: Path) -> dict[str, float]:
    info, began = shards.read_info(str(folder)), time.perf_counter()
    fold, stored = Fold(0, 5), folder / SELECTIONS
    if stored.exists():
        load_selections(info, str(stored))
    train, val = rows_of(info, "train", fold), rows_of(info, "val", fold)
    folded = time.perf_counter()
    positive_N = showing(info, "train", ["Mass"], fold)
    sampling = Sampling("Mass", (0.5,))
    shown = sampling.draw(positive_N, sampling.images(int(positive_N.sum()), 64), 0, np.random.default_rng(0))
    sampled = time.perf_counter()
    if not stored.exists():
        store_selections(info, str(stored))
    assert len(train) + len(val) == sum(info.rows(split) for split in info.parts)
    assert abs(positive_N[shown].mean() - 0.5) < 0.01
    return {
        "rows": len(train) + len(val),
        "folds_s": round(folded - began, 1),
        "sampling_s": round(sampled - folded, 1),
        "peak_gib": round(peak_mib() / 1024, 2),
        "stored_mb": round(stored.stat().st_size / 1e6, 2),
    }


def measured(folder: Path, rows: int) -> list[dict[str, float]]:
    """Write the index, and measure in processes of their own: the driver's and a worker's."""
    write(folder, rows)
    command = [sys.executable, "-m", "tests.data.large_index", str(folder), str(rows)]
    runs = [subprocess.run(command, capture_output=True, check=True, text=True) for _ in range(2)]
    return [json.loads(run.stdout) for run in runs]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if not (place / shards.ARCHIVE_FILE).exists():
        write(place, int(sys.argv[2]))
    else:
        print(json.dumps(measure(place)))
