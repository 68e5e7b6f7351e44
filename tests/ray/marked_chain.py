"""Ingest, streamed training and scoring of an archive, as JSON: python -m tests.ray.marked_chain ARCHIVE OUT."""

from __future__ import annotations

import dataclasses
import json
import sys

from cxr import storage
from cxr.data.ingest import ingest
from cxr.families.align import AlignRecipe
from cxr.inference.options import ScoreOptions
from cxr.inference.score import score
from cxr.runtime import cluster
from cxr.schema import PixelFormat
from cxr.training.fit import fit

RECIPE = AlignRecipe(size=32, epochs=1, batch_size=4, backbone="conv3", lungs=False)


def main(archive: str, out: str) -> None:
    cluster.connect(cpus=2)
    ingested = ingest(archive, storage.join(out, "shards"), pixels=PixelFormat(32), max_rejects=0.2)
    fitted = fit(RECIPE, archive, out)
    scored = score(archive, fitted.checkpoint, out, ScoreOptions(max_rejects=0.2))
    print(
        json.dumps(
            {
                name: dataclasses.asdict(value)
                for name, value in (("ingested", ingested), ("fitted", fitted), ("scored", scored))
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
