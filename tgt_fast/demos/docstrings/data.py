"""Which texts are of which class, and which of them the student may see with their labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgt_fast.demos.corpus import Corpus, Entry
from tgt_fast.demos.text.generator import PAD, SEP
from tgt_fast.errors import ArgumentError

FEWEST_MODULES = 6  # of a class, so that each split has some of its own
CATCH_ALLS = ("utils",)  # subpackages without a subject


@dataclass(frozen=True)
class Texts:
    """N texts, their classes, and their tokens as the student reads them."""

    text: tuple[str, ...]
    y: Tensor  # [N] int64
    ids: Tensor  # [N, L] int64, padded on the right

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: Tensor) -> Texts:
        return Texts(tuple(self.text[row] for row in rows.tolist()), self.y[rows], self.ids[rows])


def at_most(texts: Texts, count: int) -> Texts:
    """The first ``count`` texts of each class: as many of each where there are so many."""
    kept = [(texts.y == c).nonzero().flatten()[:count] for c in sorted(set(texts.y.tolist()))]
    return texts.take(torch.cat(kept))


def choose_classes(corpus: Corpus, count: int) -> list[str]:
    """The ``count`` public subpackages with most texts for training, the largest first.

    Left out are those of fewer than 6 modules, private ones, and those called utils.

    Raises:
        ArgumentError: there are not so many.
    """
    modules: dict[str, set[str]] = defaultdict(set)
    held: dict[str, set[str]] = defaultdict(set)
    for name, part in (("train", corpus.train), ("validation", corpus.validation), ("test", corpus.test)):
        for entry in part:
            modules[entry.label].add(entry.module)
            held[entry.label].add(name)
    counts = Counter(entry.label for entry in corpus.train)
    found = [
        label
        for label in sorted(counts, key=lambda label: (-counts[label], label))
        if len(modules[label]) >= FEWEST_MODULES and len(held[label]) == 3 and _has_subject(label)
    ]
    if len(found) < count:
        raise ArgumentError(f"the installed packages have {len(found)} subpackages to tell apart; {count} are needed")
    return found[:count]


def _has_subject(label: str) -> bool:
    last = label.rpartition(".")[2]
    return not last.startswith("_") and last not in CATCH_ALLS


def texts_of(entries: Sequence[Entry], classes: Sequence[str], tokenizer: Any, characters: int) -> Texts:
    """The entries of these classes."""
    place = {label: c for c, label in enumerate(classes)}
    chosen = [entry for entry in entries if entry.label in place]
    texts = tuple(entry.text[:characters] for entry in chosen)
    return Texts(texts, torch.tensor([place[entry.label] for entry in chosen]), token_rows(texts, tokenizer))


def token_rows(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """int64 [N, L]: each text's tokens, ended by ``[SEP]``, cut and padded to the tokenizer's length."""
    most = tokenizer.model_max_length
    rows = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=most - 1)["input_ids"]
    return torch.tensor([[*row, SEP] + [PAD] * (most - 1 - len(row)) for row in rows]).reshape(len(rows), most)


def class_counts(classes: int, labels: int, decay: float) -> list[int]:
    """Labelled examples a class: ``labels`` in all but for rounding, each ``decay`` times the one before, at least 3.

    >>> class_counts(20, 500, 0.85)
    [78, 66, 56, 48, 41, 35, 29, 25, 21, 18, 15, 13, 11, 9, 8, 7, 6, 5, 4, 4]
    """
    shares = [decay**c for c in range(classes)]
    return [max(3, round(labels * share / sum(shares))) for share in shares]


def long_tailed(texts: Texts, counts: Sequence[int], seed: int) -> Tensor:
    """Rows of the student's labelled examples: ``counts[c]`` random texts of class c, or all it has."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for c, count in enumerate(counts):
        of_class = (texts.y == c).nonzero().flatten()
        rows.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return torch.cat(rows)
