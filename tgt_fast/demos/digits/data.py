"""scikit-learn's 8x8 digits: what the teacher sees, what the student sees, what both are tested on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10
PIXELS = 64
SIDE = 8
POOL_PER_CLASS = 90  # 900 images for the teacher; the other 897 are the test set
HEAD_COUNT = 40  # labelled examples of the most frequent class; class 9 has one
SPLIT_SEED = 20  # one split for every run, so that no test image of one seed is another's training image
VALIDATION_SEED = 7


@dataclass(frozen=True)
class Images:
    """N images and their labels."""

    x: Tensor  # [N, 64] float32 in [0, 1]
    y: Tensor  # [N] int64

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def take(self, rows: Tensor) -> Images:
        return Images(self.x[rows], self.y[rows])


def load_digits() -> tuple[Images, Images]:
    """(pool, test): 900 images, 90 a class, and the 897 others."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    everything = Images(
        torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.int64)
    )
    return split_by_class(everything, POOL_PER_CLASS, SPLIT_SEED)


def validation_split(pool: Images) -> tuple[Images, Images]:
    """(fit, validation): two thirds and one third of the pool. Settings are chosen on it, test images unseen."""
    return split_by_class(pool, 2 * POOL_PER_CLASS // 3, VALIDATION_SEED)


def split_by_class(images: Images, per_class: int, seed: int) -> tuple[Images, Images]:
    """``per_class`` random images of each class, and the rest."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    rows = [order[images.y[order] == c] for c in range(CLASSES)]
    first = torch.cat([r[:per_class] for r in rows])
    second = torch.cat([r[per_class:] for r in rows])
    return images.take(first), images.take(second)


def class_counts(factor: float = 1.0, most: int = POOL_PER_CLASS) -> list[int]:
    """Labelled examples a class: ``factor`` * (40 falling geometrically to 1), at least 1 and at most ``most``.

    >>> class_counts(), sum(class_counts())
    ([40, 27, 18, 12, 8, 5, 3, 2, 2, 1], 118)
    """
    shares = [HEAD_COUNT ** (1 - c / (CLASSES - 1)) for c in range(CLASSES)]
    return [min(most, max(1, round(factor * share))) for share in shares]


def long_tailed(pool: Images, counts: list[int], seed: int) -> Images:
    """The student's labelled examples: ``counts[c]`` random images of class c.

    For one seed the selection of a smaller count is contained in that of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for c, count in enumerate(counts):
        of_class = (pool.y == c).nonzero().flatten()
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return pool.take(torch.cat(rows))


class Batches:
    """Batches ``(ids, x, y)`` of ``size`` examples, drawn at random; an epoch is ``count`` of them.

    A batch holds each example at most once or, where it is larger than the data, as equally often as can be. A copy
    gets an id of its own, because the noise of exploration is a function of the id.
    """

    def __init__(self, images: Images, size: int, count: int, seed: int) -> None:
        self.images, self.size, self.count = images, size, count
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        total = len(self.images)
        copies = -(-self.size // total)
        for _ in range(self.count):
            shuffled = [torch.randperm(total, generator=self.generator) for _ in range(copies)]
            rows = torch.cat(shuffled)[: self.size]
            ids = torch.cat([order + copy * total for copy, order in enumerate(shuffled)])[: self.size]
            yield ids, self.images.x[rows], self.images.y[rows]
