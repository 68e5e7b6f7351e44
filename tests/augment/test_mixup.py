"""Mixup: pairs of images and their labels, with the same share; unknown labels stay unknown."""

from __future__ import annotations

import torch

from cxr import schema
from cxr.augment.mixup import mixup


def test_images_and_labels_are_mixed_with_the_same_partner_and_share() -> None:
    """Images are one-hot vectors, so that a mixed image shows its two parts and their shares."""
    count = 16
    labels = (torch.arange(count)[:, None] % torch.tensor([2, 3]) == 0).to(torch.int8)
    torch.manual_seed(0)
    x, mixed = mixup(torch.eye(count).view(count, 1, 1, count), labels, alpha=1.0)
    shares = x[:, 0, 0]
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    assert ((shares > 0).sum(1) <= 2).all()
    assert len({round(float(row.max()), 4) for row in shares}) > 4, "each image has its own share"
    torch.testing.assert_close(mixed, shares @ labels.float())


def test_a_label_is_unknown_if_it_is_unknown_in_either_image() -> None:
    count = 64
    labels = torch.randint(-1, 2, (count, 5), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    torch.manual_seed(0)
    x, mixed = mixup(torch.eye(count).view(count, 1, 1, count), labels, alpha=0.4)
    parts = x[:, 0, 0] > 0
    known = torch.stack([(labels[part] != schema.UNKNOWN).all(0) for part in parts])
    assert torch.equal(mixed != schema.UNKNOWN, known)
    assert (mixed[known] >= 0).all()
    assert (mixed[known] <= 1).all()


def test_the_given_batch_is_left_unchanged_and_one_image_is_mixed_with_itself() -> None:
    x, labels = torch.rand(1, 1, 4, 4), torch.tensor([[1, 0, -1]], dtype=torch.int8)
    before = x.clone()
    mixed_x, mixed = mixup(x, labels, alpha=0.2)
    assert torch.equal(x, before)
    torch.testing.assert_close(mixed_x, x)
    assert mixed.tolist() == [[1, 0, -1]]


def test_a_small_alpha_leaves_most_images_nearly_as_they_are() -> None:
    torch.manual_seed(0)
    shares = mixup(torch.eye(512).view(512, 1, 1, 512), torch.zeros(512, 1), alpha=0.1)[0][:, 0, 0]
    assert (shares.amax(1) > 0.99).float().mean() > 0.5
