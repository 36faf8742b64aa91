"""Letters and digits of many typefaces: what the teacher sees, what the student sees, what both are tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgt_fast.demos.digits.data import Images
from tgt_fast.demos.glyphs.fonts import Family, by_word, installed
from tgt_fast.demos.glyphs.render import CHARACTERS, pictures
from tgt_fast.errors import ArgumentError

CLASSES = len(CHARACTERS)
POOL_SHARE = 7 / 11  # of the families: 70 of 110
FIT_SHARE = 2 / 3  # of the pool's, where settings are chosen
HEAD_COUNT = 30  # labelled examples of the most frequent class; the last has one


@dataclass(frozen=True)
class Typefaces:
    """The pictures of some families."""

    images: Images  # x: [N, 1, 28, 28] float32 in [0, 1]
    family: Tensor  # [N] int64, its place in ``names``
    names: tuple[str, ...]

    def of(self, names: Sequence[str]) -> Typefaces:
        """Those of some of the families alone."""
        kept = sorted(names)
        places = torch.tensor([kept.index(name) if name in names else -1 for name in self.names])
        moved = places[self.family]
        rows = (moved >= 0).nonzero().flatten()
        return Typefaces(self.images.take(rows), moved[rows], tuple(kept))


@dataclass(frozen=True)
class Split:
    """Families for the teacher and the student's labels, and others to test on."""

    pool: Typefaces
    test: Typefaces
    left_out: tuple[str, ...]  # families no face of which has every character


def load_glyphs(families: Sequence[Family] | None = None) -> Split:
    """Every face of the installed font packages, drawn; test images are of families that the pool has none of.

    Raises:
        ArgumentError: fewer than two groups of families that have every character.
    """
    families = installed() if families is None else families
    drawn = {family.name: [made for made in map(pictures, family.faces) if made is not None] for family in families}
    names = tuple(sorted(name for name, faces in drawn.items() if faces))
    pixels = [torch.from_numpy(face) for name in names for face in drawn[name]]
    if not pixels:
        raise ArgumentError(f"none of {len(drawn)} font families has every letter and digit")
    x = torch.cat(pixels).float().div_(255)[:, None]
    counts = torch.tensor([len(drawn[name]) * CLASSES for name in names])
    images = Images(x, torch.arange(CLASSES).repeat(len(pixels)))
    pool, test = split(Typefaces(images, torch.arange(len(names)).repeat_interleave(counts), names), POOL_SHARE, "test")
    return Split(pool, test, tuple(sorted(set(drawn) - set(names))))


def validation_split(pool: Typefaces) -> tuple[Typefaces, Typefaces]:
    """(fit, validation): families of the pool. Settings are chosen on them, test images unseen."""
    return split(pool, FIT_SHARE, "validation")


def split(everything: Typefaces, share: float, salt: str) -> tuple[Typefaces, Typefaces]:
    """About a ``share`` of the families, and the others; relatives, whose names begin alike, stay together.

    The order is that of a hash of the name, so that another family moves few of those there are.

    Raises:
        ArgumentError: all families are relatives.
    """
    groups = by_word(everything.names, lambda word: hashlib.sha256(f"{salt} {word}".encode()).hexdigest())
    if len(groups) < 2:
        raise ArgumentError(f"families that are not relatives are needed; got {', '.join(everything.names)}")
    first: list[str] = []
    others: list[str] = []
    for place, group in enumerate(groups):
        full = len(first) + len(group) / 2 > share * len(everything.names)
        (others if first and (full or place == len(groups) - 1) else first).extend(group)
    return everything.of(first), everything.of(others)


def class_counts(factor: float = 1.0, most: int = 1 << 30) -> list[int]:
    """Labelled examples a class: ``factor`` * (30 falling geometrically to 1), at least 1 and at most ``most``.

    >>> counts = class_counts()
    >>> counts[:4], counts[-4:], sum(counts)
    ([30, 27, 25, 22], [1, 1, 1, 1], 312)
    """
    shares = [HEAD_COUNT ** (1 - c / (CLASSES - 1)) for c in range(CLASSES)]
    return [min(most, max(1, round(factor * share))) for share in shares]


class BalancedBatches:
    """As :class:`tgt_fast.demos.digits.data.Batches`, but each example is of a class drawn uniformly."""

    def __init__(self, images: Images, size: int, count: int, seed: int) -> None:
        self.images, self.size, self.count = images, size, count
        self.drawing = Balanced(images, seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(self.count):
            rows = self.drawing(self.size)
            yield rows, self.images.x[rows], self.images.y[rows]


class Balanced:
    """Rows of images, each of a class drawn uniformly of those there are, and of it uniformly."""

    def __init__(self, images: Images, seed: int) -> None:
        self.order = images.y.argsort(stable=True)
        self.counts = images.y.bincount()
        self.starts = self.counts.cumsum(0) - self.counts
        self.classes = self.counts.nonzero().flatten()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, size: int) -> Tensor:
        chosen = self.classes[torch.randint(len(self.classes), (size,), generator=self.generator)]
        within = (torch.rand(size, generator=self.generator, dtype=torch.float64) * self.counts[chosen]).long()
        return self.order[self.starts[chosen] + within]
