"""Latents are stored exactly, say the same as their images, and are read only with the encoder that made them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxr import schema, storage
from cxr.data import shards
from cxr.data.batch import to_columns, to_tensors
from cxr.errors import UserError
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.imaging.geometry import ResizeTransform
from cxr.inference import latents
from cxr.inference.latents import Origin
from cxr.models.aecnn import AECNN
from cxr.schema import PixelFormat
from tests.made_shards import write_shards

SIZE = 64
RECIPE = AecnnRecipe(size=SIZE, patch=16, depth=1, width=8, backbone="resnet18", stem_stride=1)
ORIGIN = Origin("/archive", "folder", schema.FINDINGS)


def made(recipe: AecnnRecipe = RECIPE, seed: int = 0) -> Checkpoint:
    """A checkpoint with a random codec and classifier."""
    torch.manual_seed(seed)
    network = recipe.network(schema.FINDINGS).eval()
    for values in network.codec.parameters():
        torch.nn.init.normal_(values, std=0.05)
    return Checkpoint(f"/checkpoint-{seed}", recipe, network, schema.FINDINGS, {})


def images(size: int = SIZE, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {schema.PIXELS: torch.randint(0, 256, (count, size, size), generator=generator, dtype=torch.uint8)}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("compressor", ["residual", "published", "resize", "none"])
@torch.inference_mode()
def test_stored_latents_give_the_same_probabilities_and_pictures(compressor: str, bits: int) -> None:
    recipe = RECIPE.replace(compressor=compressor, latent_bits=bits)
    kept, batch = made(recipe), images(80)
    assert isinstance(kept.network, AECNN)
    stored = recipe.encode(kept.network, batch)
    assert stored.dtype == (torch.uint8 if bits == 8 else torch.uint16)
    assert stored.shape == (3, recipe.latent_format().size, recipe.latent_format().size)
    exact = kept.network.encode(
        torch.nn.functional.interpolate(batch[schema.PIXELS][:, None] / 255.0, SIZE, mode="area")
    )
    torch.testing.assert_close(stored.double() / (2**bits - 1), exact[:, 0].double(), atol=2e-7, rtol=0)
    latent_batch = {schema.PIXELS: stored}
    direct, later = recipe.predict(kept.network, batch), recipe.predict_latents(kept.network, latent_batch)
    torch.testing.assert_close(direct[schema.PROBABILITIES], later[schema.PROBABILITIES], atol=1e-5, rtol=0)
    drawn, redrawn = (
        draw["decoded"].int()
        for draw in (recipe.render(kept.network, batch), recipe.render_latents(kept.network, latent_batch))
    )
    assert (drawn - redrawn).abs().max() <= 1


def test_latents_too_small_for_an_archive_are_rejected() -> None:
    with pytest.raises(UserError, match="got 8 with size=64"):
        RECIPE.replace(compression=64).latent_format()
    with pytest.raises(UserError, match="'align' has no latents"):
        latent_encoder(AlignRecipe())


def test_the_fingerprint_is_the_encoders() -> None:
    one = made()
    same = latents.encoder_fingerprint(one)
    other_classifier = made()
    assert isinstance(other_classifier.network, AECNN)
    torch.nn.init.normal_(next(other_classifier.network.classifier.parameters()))
    torch.nn.init.normal_(next(other_classifier.network.codec.decoder.parameters()))
    assert latents.encoder_fingerprint(other_classifier) == same
    others = [made(seed=1), made(RECIPE.replace(latent_bits=16)), made(RECIPE.replace(compressor="published"))]
    plain = [made(RECIPE.replace(compressor="resize")), made(RECIPE.replace(size=16, patch=16, compressor="none"))]
    assert len({same, *map(latents.encoder_fingerprint, [*others, *plain])}) == 6


def rows_with_everything() -> pa.Table:
    pixels = PixelFormat(SIZE)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[8:40, 16:32] = True
    box = {"label": "Mass", "reader": None, "x_min": 1.0, "y_min": 2.0, "x_max": 3.0, "y_max": 4.0}
    given = {
        schema.IMAGE_ID: ["a", "b"],
        schema.SPLIT: ["train", "test"],
        schema.PIXELS: [bytes(pixels.row_bytes)] * 2,
        schema.RESIZE_TRANSFORM: [ResizeTransform(2.0, 3.0, -4.0, 5.0).as_dict(), None],
        schema.LABELS: [[1, 0, -1], [0, 0, 0]],
        schema.BOXES: [[box], None],
        schema.EXTRA: ['{"Age": 3}', None],
        schema.MASKS: [[{"label": schema.LUNGS, "bits": np.packbits(mask).tobytes()}], None],
    }
    wanted = schema.row_schema(pixels)
    return pa.table([pa.array(given.get(f.name, [None] * 2), f.type) for f in wanted], schema=wanted)


def test_rows_keep_all_columns_that_do_not_depend_on_the_size() -> None:
    rows, small = rows_with_everything(), PixelFormat(16, 16)
    values = np.arange(2 * 16 * 16, dtype=np.uint16).reshape(2, 16, 16) * 100
    found = latents.with_latents(rows, PixelFormat(SIZE), values, small)
    found = pq.read_table(pa.BufferReader(latents.parquet_bytes(found)))
    assert schema.pixel_format(found.schema) == small
    columns = to_columns(found, [schema.PIXELS, schema.MASKS], small)
    np.testing.assert_array_equal(columns[schema.PIXELS], values)
    mask = to_tensors(columns, small)[schema.MASKS][0].numpy().astype(bool)
    assert mask[2:10, 4:8].all()
    assert mask.sum() == 8 * 4
    same = [schema.IMAGE_ID, schema.SPLIT, schema.LABELS, schema.BOXES, schema.EXTRA]
    assert found.select(same).to_pylist() == rows.select(same).to_pylist()
    frame, none = found[schema.RESIZE_TRANSFORM].to_pylist()
    corner = ResizeTransform(2.0, 3.0, -4.0, 5.0).to_original(np.array([[SIZE / 4, SIZE]]))
    np.testing.assert_allclose(ResizeTransform.from_dict(frame).to_original(np.array([[4, 16]])), corner)
    assert none is None


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, pa.Table, Checkpoint]:
    """A latent archive of two images and a reject in one part, the part's scores, and the encoder."""
    folder, kept = str(tmp_path / "latents"), made()
    rows = rows_with_everything()
    encoded = latents.with_latents(
        rows, PixelFormat(SIZE), np.zeros((2, 16, 16)), latent_encoder(kept.recipe).latent_format()
    )
    latents.write_part(folder, "scores/part-00000", encoded)
    reject = {schema.IMAGE_ID: "c", schema.SPLIT: "train", schema.ERROR: "torn"}
    scores = pa.Table.from_pylist([*rows.select(schema.REJECTS.names).to_pylist(), reject], schema=schema.REJECTS)
    latents.finish(folder, [("scores/part-00000", scores)], kept, ORIGIN)
    return folder, scores, kept


def test_an_archive_describes_its_contents(written: tuple[str, pa.Table, Checkpoint]) -> None:
    folder, _, kept = written
    info = shards.read_info(folder, latents=True)
    assert (info.pixels, info.findings, info.source, info.rejects) == (PixelFormat(16), schema.FINDINGS, "folder", 1)
    assert {split: info.rows(split) for split in info.parts} == {"train": 1, "test": 1}
    for group in (*shards.row_groups(info, "train"), *shards.row_groups(info, "test")):
        assert storage.read_parquet(group.uri, row_groups=[group.index]).num_rows == group.rows
    assert storage.read_parquet(f"{folder}/{shards.REJECTS_FILE}")[schema.ERROR].to_pylist() == ["torn"]
    assert info.latents is not None
    assert info.latents["checkpoint"] == kept.uri


def test_only_the_encoders_checkpoint_may_read_it(written: tuple[str, pa.Table, Checkpoint]) -> None:
    info = shards.read_info(written[0], latents=True)
    latents.check_encoder(info, made())
    with pytest.raises(UserError, match=r"checkpoint-1 has another encoder.*Use /checkpoint-0, which made"):
        latents.check_encoder(info, made(seed=1))
    aligner = AlignRecipe(size=SIZE, lungs=False)
    with pytest.raises(UserError, match="of family 'align': latents can be scored only with"):
        latents.check_encoder(info, replace(made(), recipe=aligner, network=aligner.network(())))


def test_jobs_that_need_images_reject_latents(written: tuple[str, pa.Table, Checkpoint]) -> None:
    with pytest.raises(UserError, match=r"expected X-rays in .*, got latents.*were made, /archive"):
        shards.read_info(written[0])


def test_a_lost_part_is_reported(written: tuple[str, pa.Table, Checkpoint]) -> None:
    folder, scores, kept = written
    Path(folder, "test", "part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"test/part-00000.parquet is missing: restore it, or score"):
        latents.finish(folder, [("scores/part-00000", scores)], kept, ORIGIN)


def test_plain_shards_contain_no_latents(tmp_path: Path) -> None:
    assert shards.read_info(write_shards(tmp_path, {"train": 2})).latents is None
