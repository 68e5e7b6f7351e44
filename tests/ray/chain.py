"""The whole chain in one process, for tests that make it fail: python -m tests.ray.chain ARCHIVE OUT."""

from __future__ import annotations

import sys

from cxr import storage
from cxr.data.ingest import ingest
from cxr.families.align import AlignRecipe
from cxr.inference.score import score
from cxr.runtime import cluster
from cxr.schema import PixelFormat
from cxr.training.fit import fit

IMAGES, EPOCHS = 120, 4
RECIPE = AlignRecipe(size=32, epochs=EPOCHS, batch_size=8, backbone="conv3", lungs=False)


def main(archive: str, out: str) -> None:
    """Ingest ARCHIVE into OUT/shards, train on it in OUT, score it into OUT/scored; prints each step."""
    cluster.connect(cpus=2)
    print("begins: ingest", flush=True)
    shards = ingest(archive, storage.join(out, "shards"), pixels=PixelFormat(32)).shards
    print("begins: fit", flush=True)
    fitted = fit(RECIPE, shards, out, resume=storage.exists(storage.join(out, "train")))
    print("begins: score", flush=True)
    print(score(archive, fitted.checkpoint, storage.join(out, "scored")), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
