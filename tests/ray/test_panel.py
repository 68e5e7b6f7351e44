"""A panel on Ray: each image once, resumed, with embeddings and pictures per member, and messages that name it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cxr import schema, storage
from cxr.cli.commands.score import Options, main
from cxr.data import embeddings
from cxr.errors import UserError
from cxr.evaluation.run import read_run, read_scores
from cxr.families.align import AlignRecipe
from cxr.families.classify import ClassifyRecipe
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Panel
from cxr.inference.predictor import load
from cxr.inference.score import score
from cxr.sources.options import ReadOptions
from tests.ray.archives import BAD, write_archive
from tests.saved_checkpoint import save_untrained

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
OPTIONS = ScoreOptions(
    reading=ReadOptions(source="folder"), workers=1, save_images=True, save_embeddings=True, max_rejects=0.9
)


@pytest.mark.slow
def test_a_panel_is_resumed_and_equals_predictions_of_its_members(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out = write_archive(tmp_path / "archive", good=20), str(tmp_path / "out")
    align = save_untrained(tmp_path / "align", AlignRecipe(size=32, backbone="conv3", lungs=False))
    findings = save_untrained(tmp_path / "classify", ClassifyRecipe(size=48, equalize="clahe"), ("Edema", "Mass"))
    (tmp_path / "panel.yaml").write_text("members: {align: align, findings: {checkpoint: classify, batch_size: 3}}")
    options = Options(archive=(archive,), panel=str(tmp_path / "panel.yaml"), out=out, score=OPTIONS)
    result = main(options)
    assert "findings: family classify" in capsys.readouterr().out
    assert [(one["name"], one["checkpoint"]) for one in result["members"]] == [
        ("align", align),
        ("findings", findings),
    ]
    assert [bool(one["embeddings"]) for one in result["members"]] == [False, True]
    assert (result["images"], result["rejects"]) == (20 + BAD, BAD)
    assert len([*Path(out, "align", "aligned").iterdir()]) == 20

    (file,) = Path(out, "scores").glob("*.parquet")
    before = file.read_bytes()
    assert main(options)["images"] == 20 + BAD
    assert file.read_bytes() == before

    for name, uri in {"align": align, "findings": findings}.items():
        alone = load(uri).predict(archive, reading=OPTIONS.reading).sort_by(schema.IMAGE_ID)
        run = read_run(out, name)
        assert run.checkpoint_sha256 == json.loads(Path(uri, "checkpoint.json").read_text())["sha256"]
        table = pa.concat_tables(
            part.replace_schema_metadata() for part in read_scores(run, [*alone.column_names])
        ).sort_by(schema.IMAGE_ID)
        assert set(table.column_names) == set(alone.column_names)
        for column in (schema.IMAGE_ID, schema.ERROR, schema.RESIZE_TRANSFORM):
            assert table[column].to_pylist() == alone[column].to_pylist()
        column = schema.THETA if name == "align" else schema.PROBABILITIES
        values, expected = (pc.drop_null(each[column]).to_pylist() for each in (table, alone))
        np.testing.assert_allclose(values, expected, atol=1e-5)
    assert len(embeddings.load(f"{out}/findings").image_ids) == 20

    changed = save_untrained(tmp_path / "other", ClassifyRecipe(size=48, equalize="clahe"), ("Edema",))
    with pytest.raises(UserError, match="members: findings: checkpoint changed: SHA-256 was"):
        score(archive, Panel.of([f"align={align}", f"findings={changed}"]), out, OPTIONS)
    scores_only = replace(OPTIONS, save_embeddings=False)
    with pytest.raises(UserError, match=r"panel was \['align', 'findings'\], is now \['align'\]"):
        score(archive, Panel.of([f"align={align}"]), out, scores_only)
    with pytest.raises(UserError, match=r"panel was .* is now None"):
        score(archive, align, out, scores_only)
    assert file.read_bytes() == before


def test_no_member_with_embeddings_is_an_error_and_members_are_checked_before_ray(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", good=2)
    align = save_untrained(tmp_path / "align", AlignRecipe(size=32, backbone="conv3", lungs=False))
    with pytest.raises(UserError, match="'align' has no embeddings"):
        score(archive, Panel.of([align, f"again={align}"]), str(tmp_path / "out"), OPTIONS)
    with pytest.raises(UserError, match=r"/gone contains no checkpoint\.json"):
        main(Options(archive=(archive,), checkpoint=(align, str(tmp_path / "gone")), out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="expected --panel or --checkpoint, got both"):
        main(Options(archive=(archive,), checkpoint=(align,), panel="panel.yaml"))
    assert not storage.exists(str(tmp_path / "out" / "ledger.json"))
