"""Pairs of texts: the summary of a documentation string asks, the rest of it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgt_fast.demos.corpus import Corpus, Entry
from tgt_fast.demos.corpus.clean import normalised
from tgt_fast.demos.text.generator import SEP
from tgt_fast.errors import ArgumentError

QUERY_CHARACTERS = 200
PASSAGE_CHARACTERS = 300
SHORTEST_PASSAGE = 60


@dataclass(frozen=True)
class Pairs:
    """N queries and the passage that answers each."""

    queries: tuple[str, ...]
    passages: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, rows: Tensor) -> Pairs:
        chosen = rows.tolist()
        return Pairs(tuple(self.queries[row] for row in chosen), tuple(self.passages[row] for row in chosen))


@dataclass(frozen=True)
class Vectors:
    """N texts, as the student reads them, and what the teacher thinks of them."""

    ids: Tensor  # [N, L] int64, padded on the right
    teacher: Tensor  # [N, 384] float32, of length 1

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> Vectors:
        return Vectors(self.ids[rows], self.teacher[rows])

    def and_then(self, other: Vectors) -> Vectors:
        return Vectors(torch.cat([self.ids, other.ids]), torch.cat([self.teacher, other.teacher]))


@dataclass(frozen=True)
class Labelled:
    """N queries and the passage that answers each."""

    queries: Vectors
    passages: Vectors

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, rows: Tensor) -> Labelled:
        return Labelled(self.queries.take(rows), self.passages.take(rows))


@dataclass(frozen=True)
class Splits:
    """Pairs of different modules."""

    train: Pairs
    validation: Pairs
    test: Pairs


def splits_of(corpus: Corpus) -> Splits:
    """The pairs of a corpus. A query or passage that stands twice would have two answers: only the first counts.

    Raises:
        ArgumentError: too few for the demo.
    """
    seen: set[str] = set()
    # The held-out pairs first: whatever they say is in no training pair.
    test, validation, train = (_pairs(part, seen) for part in (corpus.test, corpus.validation, corpus.train))
    if min(len(train), len(test), len(validation)) < 20:
        raise ArgumentError(f"the installed packages give {len(train)} pairs for training and {len(test)} for the test")
    return Splits(train, validation, test)


def _pairs(entries: Sequence[Entry], seen: set[str]) -> Pairs:
    found = []
    for entry in entries:
        pair = entry.summary[:QUERY_CHARACTERS], entry.rest[:PASSAGE_CHARACTERS]
        keys = {normalised(text) for text in pair}
        if len(pair[1]) >= SHORTEST_PASSAGE and not keys & seen:
            seen |= keys
            found.append(pair)
    return Pairs(tuple(q for q, _ in found), tuple(d for _, d in found))


def unlabelled_texts(corpus: Corpus) -> list[str]:
    """Texts that the generator learns from: summaries and passages of the training entries, each by itself."""
    passages = [entry.rest[:PASSAGE_CHARACTERS] for entry in corpus.train]
    return [*(entry.summary[:QUERY_CHARACTERS] for entry in corpus.train), *filter(None, passages)]


def token_rows(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """int64 [N, L]: each text's tokens, ended by ``[SEP]``, cut and padded with 0 to the tokenizer's length."""
    most = tokenizer.model_max_length
    rows = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=most - 1)["input_ids"]
    return torch.tensor([[*row, SEP] + [0] * (most - 1 - len(row)) for row in rows]).reshape(len(rows), most)


def chosen_pairs(pairs: Pairs, count: int, seed: int) -> Tensor:
    """Rows of the pairs that the student is given; of a seed, the fewer are among the more."""
    return torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
