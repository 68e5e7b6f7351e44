"""Still-image codecs: decoded images, and files of a given size."""

from __future__ import annotations

import numpy as np
import pytest

from cxr.benchmarks.studies import codecs
from cxr.benchmarks.studies.codecs import CLOSE, JPEG, LOSSY, StillCodec
from tests.made_shards import chest_like

SIZE = 96


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([chest_like(rng, SIZE) for _ in range(3)])


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_better_quality_gives_larger_files_and_smaller_errors(codec: StillCodec, pictures: np.ndarray) -> None:
    lengths, errors = [], []
    for share in (0.1, 0.4, 0.7):
        data = codec.encode(pictures[0], round(codec.lowest + share * (codec.highest - codec.lowest)))
        decoded = codec.decode(data)
        assert (decoded.dtype, decoded.shape) == (np.uint8, (SIZE, SIZE))
        lengths.append(len(data))
        errors.append(np.square(decoded.astype(float) - pictures[0]).mean())
    assert lengths == sorted(lengths)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 100


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_file_sizes_are_as_close_to_the_target_as_possible(codec: StillCodec, pictures: np.ndarray) -> None:
    wanted = 1200.0
    coded = codecs.coded_near(codec, pictures, wanted)
    lengths = [len(codec.encode(picture, coded.quality)) for picture in pictures]
    assert coded.bytes_per_image == pytest.approx(np.mean(lengths))
    np.testing.assert_array_equal(coded.decoded[1], codec.decode(codec.encode(pictures[1], coded.quality)))
    missed = abs(coded.bytes_per_image - wanted)
    if codec.whole:
        for other in (coded.quality - 1, coded.quality + 1):
            assert missed <= abs(np.mean([len(codec.encode(picture, other)) for picture in pictures]) - wanted)
    else:
        assert missed <= 2 * CLOSE * wanted


@pytest.mark.parametrize(("wanted", "quality"), [(10, JPEG.lowest), (1e6, JPEG.highest)])
def test_unreachable_sizes_give_the_lowest_or_highest_quality(
    wanted: float, quality: float, pictures: np.ndarray
) -> None:
    assert codecs.quality_near(JPEG, pictures, wanted) == quality


def test_png_is_smaller_than_raw_and_larger_than_lossy(pictures: np.ndarray) -> None:
    assert len(JPEG.encode(pictures[0], 50)) < codecs.png_bytes(pictures) < SIZE * SIZE
