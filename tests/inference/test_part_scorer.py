"""The actor that scores an archive's parts, called without Ray: what it writes for a part."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr import schema, storage
from cxr.data import embeddings
from cxr.families import checkpoint
from cxr.families.classify import ClassifyRecipe
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Member, Panel
from cxr.inference.part_scorer import PartScorer
from cxr.inference.plan import plan_scoring
from cxr.inference.read import PART, PART_ROWS, TIMES
from cxr.sources.options import ALL_IMAGES
from tests.made_shards import write_shards
from tests.saved_checkpoint import save_untrained


def _named(rows: pa.Table, part: str) -> pa.Table:
    for name, value in ((PART, part), (PART_ROWS, rows.num_rows), (TIMES, '{"storage": 0.5}')):
        rows = rows.append_column(name, pa.array([value] * len(rows)))
    return rows


def test_embeddings_of_good_images_are_written_beside_the_scores(tmp_path: Path) -> None:
    made, base = (
        write_shards(tmp_path / "shards", {"train": 6}),
        save_untrained(tmp_path / "c", ClassifyRecipe(size=32)),
    )
    plan = plan_scoring(made, {"": checkpoint.load(base)}, ALL_IMAGES)
    rows = plan.reader("off").rows(plan.parts[0].rows)
    errors = pa.array([None, "damaged", *[None] * 4], pa.string())
    rows = rows.set_column(rows.schema.get_field_index(schema.ERROR), schema.ERROR, errors)
    out, first, second = str(tmp_path / "out"), "scores/part-00000", "scores/part-00001"
    scorer = PartScorer(Panel.of([base]), out, plan, ScoreOptions(save_embeddings=True, batch_size=4))
    reply = scorer(_named(rows, first))
    times = json.loads(reply["seconds"][0])
    assert times["storage"] == 0.5
    assert times["networks"] > 0
    scorer(_named(rows.slice(1, 1), second))  # a part without a good image
    scores = storage.read_parquet(storage.join(out, "scores/part-00000.parquet"))
    about = {"checkpoint": base, "sha256": "", "archives": [made]}
    embeddings.finish(storage.join(out, embeddings.FOLDER), [first, second], about)
    stored = embeddings.load(out)
    ids = rows[schema.IMAGE_ID].to_pylist()
    assert stored.image_ids.to_pylist() == [ids[0], *ids[2:]]
    head = checkpoint.load(base).network.get_submodule("head")
    weight, bias = head.get_parameter("weight").detach().numpy(), head.get_parameter("bias").detach().numpy()
    expected = 1 / (1 + np.exp(-(stored.vectors.astype(np.float32) @ weight.T + bias)))
    probabilities = [p for p in scores[schema.PROBABILITIES].to_pylist() if p is not None]
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)


def test_scores_of_a_part_are_made_while_another_is_in_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, base = write_shards(tmp_path / "shards", {"train": 6}), tmp_path / "c"
    plan = plan_scoring(made, {"": checkpoint.load(save_untrained(base, ClassifyRecipe(size=32)))}, ALL_IMAGES)
    rows = plan.reader("off").rows(plan.parts[0].rows)
    network_again, predict, scored = Event(), ClassifyRecipe.predict, ClassifyRecipe.scored
    calls, alone = itertools.count(), Lock()

    def noted(self: ClassifyRecipe, network: Any, batch: Any) -> Any:
        assert alone.acquire(blocking=False), "two parts were in the network"
        if next(calls):
            network_again.set()
        try:
            return predict(self, network, batch)
        finally:
            alone.release()

    def waiting(self: ClassifyRecipe, *args: Any) -> pa.Table:
        assert network_again.wait(20), "no other part reached the network"
        return scored(self, *args)

    monkeypatch.setattr(ClassifyRecipe, "predict", noted)
    monkeypatch.setattr(ClassifyRecipe, "scored", waiting)
    scorer = PartScorer(Panel.of([str(base)]), str(tmp_path / "out"), plan, ScoreOptions(batch_size=6))
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(scorer, [_named(rows, f"scores/part-0000{number}") for number in range(2)]))
    assert [reply["images"] for reply in replies] == [[6], [6]]


def test_thresholds_change_decisions_and_no_other_column(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"train": 6})
    base = save_untrained(tmp_path / "c", ClassifyRecipe(size=32), schema.FINDINGS)
    plan = plan_scoring(made, {"": checkpoint.load(base)}, ALL_IMAGES)
    rows = _named(plan.reader("off").rows(plan.parts[0].rows), "scores/part-00000")

    def scored(out: str, thresholds: dict[str, float]) -> pa.Table:
        panel = Panel((Member("", base, thresholds=thresholds),))
        PartScorer(panel, out, plan, ScoreOptions(batch_size=4))(rows)
        return storage.read_parquet(storage.join(out, "scores/part-00000.parquet"))

    before = scored(str(tmp_path / "before"), {})
    p = np.array(before[schema.PROBABILITIES].to_pylist(), np.float32)
    thresholds = {schema.FINDINGS[2]: float(np.sort(p[:, 2])[3]), schema.FINDINGS[5]: 1.01}
    after = scored(str(tmp_path / "after"), thresholds)
    decisions, new = (np.array(table[schema.DECISIONS].to_pylist()) for table in (before, after))
    assert (new[:, 2] == (p[:, 2] >= thresholds[schema.FINDINGS[2]])).all()
    assert 0 < new[:, 2].sum() < 6
    assert not new[:, 5].any()
    others = [f for f in range(len(schema.FINDINGS)) if f not in (2, 5)]
    assert (new[:, others] == decisions[:, others]).all()
    assert after.drop_columns([schema.DECISIONS]).equals(before.drop_columns([schema.DECISIONS]))
