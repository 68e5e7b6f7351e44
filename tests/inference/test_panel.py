"""Panels: names of members, and scores of all families in one pass, which equal those of separate passes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from pydicom.uid import JPEG2000Lossless

from cxr import schema, storage
from cxr.data import decode
from cxr.data.run_ledger import Increment
from cxr.errors import UserError
from cxr.evaluation.run import read_run, read_runs, read_scores
from cxr.families import checkpoint, image_crop
from cxr.families.classify import ClassifyRecipe
from cxr.families.ensemble import join
from cxr.imaging.decode import inspect
from cxr.inference import part_scorer
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Member, Panel
from cxr.inference.part_scorer import PartScorer
from cxr.inference.plan import Plan, plan_scoring
from cxr.inference.read import PART, PART_ROWS, TIMES
from cxr.sources.options import ReadOptions
from tests.families.test_image_crop import chest
from tests.families.test_recipes import SMALL
from tests.lung_rule import save_finder
from tests.made_shards import write_shards
from tests.odd_files import dataset, dicom
from tests.saved_checkpoint import save_untrained
from tests.written_runs import write_ledger

OPTIONS = ScoreOptions(reading=ReadOptions(source="folder", gate="off"), batch_size=3)


def write_images(folder: Path) -> str:
    """X-rays of several shapes and types, and files that cannot be used."""
    folder.mkdir()
    for number, (height, width) in enumerate([(120, 120), (90, 160), (160, 100), (64, 64), (33, 47)]):
        cv2.imwrite(str(folder / f"{number}.png"), chest(height, width, np.uint16 if number % 2 else np.uint8)[0])
    # These two are decoded at a lower resolution for small networks.
    cv2.imwrite(str(folder / "5.jpg"), chest(200, 280)[0])
    windowed = dataset(chest(300, 240, np.uint16)[0], WindowCenter=30000, WindowWidth=50000)
    (folder / "6.dcm").write_bytes(dicom(windowed, JPEG2000Lossless))
    assert all(inspect((folder / name).read_bytes()).max_halvings for name in ("5.jpg", "6.dcm"))
    whole = (folder / "0.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"no image")
    cv2.imwrite(str(folder / "blank.png"), np.zeros((50, 50), np.uint8))
    return str(folder)


def save_all_families(folder: Path) -> dict[str, str]:
    """Checkpoints of all families, whose images have different sizes, crops and enhancements."""
    finder = save_finder(folder / "finder")
    copy = str(shutil.copytree(finder, folder / "copy"))
    recipes = {
        "align": SMALL["align"],
        "aecnn": SMALL["aecnn"].replace(lung_crop=finder),
        "attend": SMALL["attend"].replace(lung_crop=copy, equalize="clahe"),
        "classify": SMALL["classify"].replace(size=48, lung_crop=finder, lung_margin=0.2),
        "detect": SMALL["detect"].replace(size=64),
        "localize": SMALL["localize"].replace(denoise="median", equalize="clahe"),
        "lungs": SMALL["lungs"].replace(size=48),
        "pneumothorax": SMALL["pneumothorax"],
    }
    assert set(recipes) == set(SMALL)
    return {name: save_untrained(folder / name, recipe) for name, recipe in recipes.items()}


def planned(archive: str, panel: Panel, options: ScoreOptions = OPTIONS) -> Plan:
    models = {member.name: checkpoint.load(member.checkpoint) for member in panel.members}
    return plan_scoring(archive, models, options.reading)


def run(archive: str, panel: Panel, out: Path, options: ScoreOptions = OPTIONS) -> pa.Table:
    """The scores that `PartScorer` writes for an archive, without Ray."""
    plan = planned(archive, panel, options)
    scorer = PartScorer(panel, str(out), plan, options)
    for part in plan.parts:
        rows = plan.reader(options.reading.gate).rows(part.rows)
        named = rows.append_column(PART, pa.array([part.name] * len(rows)))
        named = named.append_column(PART_ROWS, pa.array([len(rows)] * len(rows)))
        scorer(named.append_column(TIMES, pa.array(["{}"] * len(rows))))
    return pa.concat_tables(storage.read_parquet(storage.join(str(out), part.path)) for part in plan.parts)


@pytest.mark.slow
def test_a_panel_of_all_families_equals_separate_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, checkpoints = write_images(tmp_path / "archive"), save_all_families(tmp_path)
    panel = Panel(tuple(Member(name, uri) for name, uri in checkpoints.items()))
    plan = planned(archive, panel)
    assert len(plan.formats) == 7  # align and pneumothorax share theirs
    counts: Counter[str] = Counter()
    decode_image, lungs = decode.decode_image, image_crop._square
    with monkeypatch.context() as counted:
        counted.setattr(decode, "decode_image", lambda *a: counts.update(["decoded"]) or decode_image(*a))
        counted.setattr(image_crop, "_square", lambda *a: counts.update(["cropped"]) or lungs(*a))
        together = run(archive, panel, tmp_path / "together")
    assert counts["decoded"] == 9  # all but the empty file and the text, whose first bytes rule them out
    assert counts["cropped"] == 2 * 7  # two margins
    assert sum(together[schema.ERROR].is_null().to_pylist()) == 7
    records = json.loads(together.schema.metadata[schema.MEMBERS_KEY])
    assert [(record["name"], record["checkpoint"]) for record in records] == [*checkpoints.items()]
    seen = [name for name in schema.SCORES.names if name == schema.member_column("x", name)]
    for name, uri in checkpoints.items():
        alone = run(archive, Panel.of([uri]), tmp_path / f"alone-{name}")
        columns = [schema.member_column(name, column) for column in alone.column_names]
        assert together.select(columns).rename_columns(alone.column_names).schema == alone.schema
        for own, column in zip(columns, alone.column_names, strict=True):  # repr: exact, and NaN equals NaN
            assert repr(together[own].to_pylist()) == repr(alone[column].to_pylist()), own
        seen += [column for column in columns if column not in seen]
    assert sorted(seen) == sorted(together.column_names)


@pytest.mark.slow
def test_an_ensemble_can_be_a_member(tmp_path: Path) -> None:
    archive, recipe = write_images(tmp_path / "archive"), ClassifyRecipe(size=32, backbone="resnet18")
    findings, known = ("Mass", "Nodule"), [{schema.LABELS: [number % 2, 1 - number % 2]} for number in range(8)]
    made = write_shards(
        tmp_path / "shards", {"val": 8}, size=32, findings=findings, known=lambda _, number: known[number]
    )
    uris = []
    for seed in range(2):
        torch.manual_seed(seed)
        network, folder = recipe.network(findings), tmp_path / f"network-{seed}"
        checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=findings, metrics={})
        uris.append(str(folder))
    ensemble = str(tmp_path / "ensemble")
    join([checkpoint.load(uri) for uri in uris], made, ensemble, torch.device("cpu"))
    together = run(archive, Panel.of([f"both={ensemble}", f"one={uris[0]}"]), tmp_path / "together")
    assert [r["family"] for r in json.loads(together.schema.metadata[schema.MEMBERS_KEY])] == ["classify", "classify"]
    alone = [run(archive, Panel.of([uri]), tmp_path / f"alone-{n}") for n, uri in enumerate(uris)]
    of_both, first, second = (
        np.array([row for row in column.to_pylist() if row is not None])
        for column in (
            together[f"both/{schema.PROBABILITIES}"],
            *(table[schema.PROBABILITIES] for table in alone),
        )
    )
    np.testing.assert_allclose(of_both, (first + second) / 2, atol=1e-6)
    assert abs(first - second).max() > 1e-3
    assert together[f"one/{schema.PROBABILITIES}"].to_pylist() == alone[0][schema.PROBABILITIES].to_pylist()


def test_formats_are_shared_by_members_with_the_same_images(tmp_path: Path) -> None:
    archive, checkpoints = write_images(tmp_path / "archive"), save_all_families(tmp_path)
    panel = Panel.of([checkpoints["align"], checkpoints["lungs"], f"again={checkpoints['align']}"])
    plan = planned(archive, panel)
    assert plan.format_of == (0, 1, 0)
    rows = plan.reader("off").rows(plan.parts[0].rows)
    assert [name for name in rows.column_names if name.startswith("pixels")] == ["pixels", "pixels/1"]


def test_the_gate_judges_once_as_for_the_largest_member_that_sees_whole_images(tmp_path: Path) -> None:
    archive = write_images(tmp_path / "archive")
    small, large = (save_untrained(tmp_path / name, SMALL["align"].replace(size=int(name))) for name in ("32", "48"))
    enhanced = save_untrained(tmp_path / "enhanced", SMALL["lungs"].replace(size=64, equalize="clahe"))
    checked = replace(OPTIONS, reading=ReadOptions(source="folder", gate="exclude"))
    together = run(archive, Panel.of([small, enhanced, large]), tmp_path / "together", checked)
    alone = run(archive, Panel.of([large]), tmp_path / "alone", checked)
    columns = [schema.ERROR, schema.GATE, schema.GATE_SCORE]
    assert together.select(columns).to_pylist() == alone.select(columns).to_pylist()
    assert alone[schema.GATE_SCORE].null_count == 4


def test_shards_must_fit_every_member_and_the_message_names_it(tmp_path: Path) -> None:
    archive = write_shards(tmp_path / "shards", {"train": 4})
    fits = save_untrained(tmp_path / "fits", ClassifyRecipe(size=32))
    too_large = save_untrained(tmp_path / "large", ClassifyRecipe(size=512))
    with pytest.raises(UserError, match="member large: expected stored images of at least size=512"):
        planned(archive, Panel.of([fits, too_large]), ScoreOptions())
    assert planned(archive, Panel.of([fits, f"b={fits}"]), ScoreOptions()).format_of == (0, 0)


def test_networks_that_do_not_fit_together_are_reported_when_the_first_part_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_images(tmp_path / "archive")
    panel = Panel.of([save_untrained(tmp_path / name, SMALL[name]) for name in ("align", "lungs")])
    first, loaded = part_scorer.Scorer, []

    def limited(*args: Any, **options: Any) -> Any:
        if loaded:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loaded.append(args)
        return first(*args, **options)

    monkeypatch.setattr(part_scorer, "Scorer", limited)
    PartScorer(panel, str(tmp_path / "out"), planned(archive, panel), OPTIONS)
    loaded.clear()
    with pytest.raises(
        UserError, match=r"the networks of align and lungs to fit together .* too little memory for lungs"
    ):
        run(archive, panel, tmp_path / "out")


def test_default_names_are_the_last_folders_and_unique() -> None:
    uris = ["/a/align", "s3://b/classify/checkpoint", "/c/classify", "x=/d/e", "/f/scores", "/g/v1.2 new"]
    panel = Panel.of(uris)
    assert panel.names == ["align", "classify", "classify-2", "x", "scores-2", "v1-2-new"]
    assert panel.members[3].checkpoint == "/d/e"
    assert Panel.of(["/a/align"]) == Panel((Member("", "/a/align"),))
    assert Panel.of(["x=/a/align"]).names == ["x"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "expected different names of members, got 'a' 2 times"),
        (["a b"], "letters, digits, - and _, got 'a b'"),
        (["a", ""], "letters, digits, - and _, got ''"),
        (["scores"], "cannot be the name of a member, because OUT has a folder scores"),
        ([], "at least one checkpoint"),
    ],
)
def test_wrong_names_are_rejected(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Panel(tuple(Member(name, "/a") for name in names))


def test_read_scores_gives_each_member_the_columns_of_its_own_run(tmp_path: Path) -> None:
    archive = write_images(tmp_path / "archive")
    uris = [save_untrained(tmp_path / name, SMALL[name], (name, "x")) for name in ("classify", "localize", "lungs")]
    panel, out = Panel.of(uris), tmp_path / "out"
    table = run(archive, panel, out)
    of_members = {
        name: {"checkpoint_sha256": name, "recipe": {"family": name}} for name in ("classify", "localize", "lungs")
    }
    settings = {"archive": archive, "panel": panel.names, "members": of_members}
    write_ledger(out, settings, Increment(0, len(list(out.glob("scores/*"))), len(table), new=len(table), changed=0))
    runs = read_runs(str(out))
    assert [(run.member, run.family, run.checkpoint_sha256) for run in runs] == [
        (name, name, name) for name in of_members
    ]
    for name in ("classify", "localize"):
        one = read_run(str(out), name)
        (part,) = read_scores(one, [schema.IMAGE_ID, schema.CROP_STATUS, schema.PROBABILITIES])
        assert set(part.column_names) == {schema.IMAGE_ID, schema.CROP_STATUS, schema.PROBABILITIES}
        assert part[schema.PROBABILITIES].equals(table[f"{name}/{schema.PROBABILITIES}"])
        assert json.loads(part.schema.metadata[schema.FINDINGS_KEY]) == [name, "x"]
    with pytest.raises(UserError, match="has no column probabilities, which runs of family lungs should have"):
        read_scores(read_run(str(out), "lungs"), [schema.IMAGE_ID, schema.PROBABILITIES])
    with pytest.raises(UserError, match="several checkpoints: name one with --member: classify, localize, lungs"):
        read_run(str(out))
    with pytest.raises(UserError, match="expected --member to be one of classify, localize, lungs, got other"):
        read_run(str(out), "other")


def test_panel_files_name_members_and_their_options(tmp_path: Path) -> None:
    (tmp_path / "panel.yaml").write_text(
        "members:\n"
        "  align: ../models/align\n"
        "  findings: {checkpoint: s3://bucket/classify, batch_size: 8, precision: float32}\n"
        "  lungs: {checkpoint: /models/lungs, thresholds: local/thresholds.json}\n"
    )
    assert Panel.read(str(tmp_path / "panel.yaml")).members == (
        Member("align", f"{tmp_path.parent}/models/align"),
        Member("findings", "s3://bucket/classify", 8, "float32"),
        Member("lungs", "/models/lungs", thresholds_file=f"{tmp_path}/local/thresholds.json"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members: {a: /a", "expected a YAML file, got an error"),
        ("members: {a: /a, a: /b}", "'a' occurs twice"),
        ("members: {1: /a}", "member 1: expected a name, got int: put it in quotes"),
        ("members: [/a]", "expected members to be a mapping of names to checkpoints, got list"),
        ("[/a]", "expected the key members and no other, got list"),
        ("{members: {a: /a}, size: 3}", "got the keys members, size"),
        ("members: {}", "at least one checkpoint"),
        ("members: {a/b: /a}", "letters, digits, - and _, got 'a/b'"),
        ("members: {a: {checkpoint: /a, size: 3}}", "member a: expected the URI .* got the keys checkpoint, size"),
        ("members: {a: {batch_size: 3}}", "member a: expected the URI .* got the keys batch_size"),
        ("members: {a: null}", "member a: expected the URI .* got NoneType"),
        ("members: {a: {checkpoint: 3}}", "member a: expected checkpoint to be a URI, got 3"),
        (
            "members: {a: {checkpoint: /a, batch_size: 0}}",
            "member a: expected batch_size to be a whole number of 1 or more, got 0",
        ),
        ("members: {a: {checkpoint: /a, batch_size: true}}", "member a: expected batch_size .* got True"),
        (
            "members: {a: {checkpoint: /a, precision: half}}",
            "precision to be one of auto, float32, bfloat16, got 'half'",
        ),
    ],
)
def test_wrong_panel_files_are_rejected_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "panel.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        Panel.read(str(tmp_path / "panel.yaml"))


def test_a_missing_panel_file_is_reported() -> None:
    with pytest.raises(
        UserError, match=r"/no/panel\.yaml, which does not exist: name the panel's YAML file with --panel"
    ):
        Panel.read("/no/panel.yaml")
