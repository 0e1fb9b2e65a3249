"""The digits, and the order in which every arm sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import TRAINING_IMAGES, DemoOptions


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), float32 in [0, 1], and their labels (N,), 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor


def load(options: DemoOptions) -> Digits:
    """scikit-learn's handwritten digits, split by the seed with every digit in proportion.

    Source: https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html
    """
    # Not at the top: the ranks get the digits from their parent, and start without scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, validation = train_test_split(
        torch.arange(len(digits.target)),
        train_size=TRAINING_IMAGES,
        stratify=digits.target,
        random_state=options.seed,
    )
    train = train[: options.train_images]
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    return Digits(images[train], labels[train], images[validation], labels[validation])


def batches(options: DemoOptions) -> Iterator[Tensor]:
    """Indices (global_batch,) of one step's training images, without end; the same in every arm."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        order = torch.randperm(options.train_images, generator=generator)
        # The last, incomplete batch is dropped: with it, ranks would differ in their batch size.
        whole = order[: options.steps_per_epoch * options.global_batch]
        yield from whole.view(-1, options.global_batch)
