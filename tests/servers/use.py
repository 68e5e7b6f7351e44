"""Run every storage operation once, each in a few requests."""

from __future__ import annotations

import io
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cxr import storage


def use_everything(uri: str = "s3://xrays/run") -> None:
    """List, read, write and delete, ourselves and as Ray does it in another process."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"row": range(20_000)}), sink, row_group_size=10_000)
    storage.check_writable(uri)
    storage.write_bytes(f"{uri}/a/rows.parquet", sink.getvalue())
    assert [(entry.path, entry.size) for entry in storage.list_files(uri)] == [
        ("a/rows.parquet", len(sink.getvalue()))
    ]
    assert storage.read_bytes(f"{uri}/a/rows.parquet") == sink.getvalue()
    assert storage.read_parquet(f"{uri}/a/rows.parquet", row_groups=[1])["row"].to_pylist() == [
        *range(10_000, 20_000)
    ]
    assert storage.read_parquet_footer(f"{uri}/a/rows.parquet").num_rows == 20_000
    path, files = storage.ray_storage(uri)
    files = pickle.loads(pickle.dumps(files))
    with files.open_output_stream(f"{path}/epoch/weights.pt") as stream:
        stream.write(b"weights")
    assert files.open_input_stream(f"{path}/epoch/weights.pt").read() == b"weights"
    infos = files.get_file_info(fs.FileSelector(path, recursive=True))
    assert {info.base_name for info in infos} == {"a", "rows.parquet", "epoch", "weights.pt"}
    files.copy_file(f"{path}/epoch/weights.pt", f"{path}/best.pt")
    files.move(f"{path}/best.pt", f"{path}/last.pt")
    assert files.get_file_info(f"{path}/last.pt").size == len(b"weights")
    files.delete_dir(f"{path}/epoch")
    storage.delete(uri)
    assert not storage.exists(uri)
