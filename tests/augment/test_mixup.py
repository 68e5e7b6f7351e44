"""Mixup: images and their labels, with the same share; unknown labels stay unknown."""

from __future__ import annotations

import torch
from torch import Tensor

from cxr import schema
from cxr.augment.mixup import mixup

COUNT = 64


def one_hot(first: int, count: int = COUNT) -> Tensor:
    """Images with a single bright pixel each, so that a mixed image shows its two parts and their shares."""
    return torch.eye(2 * count)[first : first + count].view(count, 1, 1, 2 * count)


def labels(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


def test_images_and_labels_are_mixed_with_the_same_share() -> None:
    given = labels(2 * COUNT, 3).clamp(min=0)
    torch.manual_seed(0)
    x, mixed = mixup(one_hot(0), given[:COUNT], one_hot(COUNT), given[COUNT:], alpha=1.0)
    shares = x[:, 0, 0]
    torch.testing.assert_close(shares.sum(1), torch.ones(COUNT))
    assert len({round(float(row.max()), 4) for row in shares}) > 40, "each image has its own share"
    torch.testing.assert_close(mixed, shares @ given.float())


def test_a_label_is_unknown_if_it_is_unknown_in_either_image() -> None:
    own, others = labels(2 * COUNT, 5).chunk(2)
    _, mixed = mixup(one_hot(0), own, one_hot(COUNT), others, alpha=0.4)
    known = (own != schema.UNKNOWN) & (others != schema.UNKNOWN)
    assert known.any()
    assert torch.equal(mixed != schema.UNKNOWN, known)
    assert (mixed[known] >= 0).all()
    assert (mixed[known] <= 1).all()


def test_the_given_batch_is_left_unchanged() -> None:
    x, given = one_hot(0), labels(COUNT, 3)
    before = x.clone(), given.clone()
    mixup(x, given, one_hot(COUNT), given, alpha=0.2)
    assert torch.equal(x, before[0])
    assert torch.equal(given, before[1])


def test_a_small_alpha_leaves_most_images_nearly_as_they_are() -> None:
    torch.manual_seed(0)
    count = 512
    x, _ = mixup(one_hot(0, count), torch.zeros(count, 1), one_hot(count, count), torch.zeros(count, 1), alpha=0.1)
    assert (x[:, 0, 0].amax(1) > 0.99).float().mean() > 0.5
