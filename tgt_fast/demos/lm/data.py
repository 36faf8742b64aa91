"""Windows of tokens: what the teacher sees, what a student sees, what both are judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tgt_fast.demos.lm.bpe import Tokenizer, train_tokenizer
from tgt_fast.demos.lm.corpus import Corpus, Module
from tgt_fast.demos.lm.settings import Settings


@dataclass(frozen=True)
class Windows:
    """N stretches of text, each L tokens and the one behind them."""

    tokens: Tensor  # [N, L + 1] int64

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def x(self) -> Tensor:
        """[N, L]"""
        return self.tokens[:, :-1]

    @property
    def y(self) -> Tensor:
        """[N, L] the next token of each."""
        return self.tokens[:, 1:]

    def take(self, rows: Tensor) -> Windows:
        return Windows(self.tokens[rows])


@dataclass(frozen=True)
class Text:
    """The parts of the text, and how many bytes each token stands for."""

    train: Windows
    validation: Windows
    test: Windows
    bytes_of: Tensor  # [tokens] int64


def make_text(corpus: Corpus, settings: Settings) -> Text:
    """Learn the tokens from training text alone, and cut every part into windows."""
    tokenizer = train_tokenizer(_beginning(corpus.train, settings.tokenizer_bytes), settings.tokens)
    limit = settings.module_bytes

    def cut(texts: Iterable[str], most: int | None = None) -> Windows:
        return windows(tokenizer, texts, settings.length, most)

    return Text(
        train=cut(_beginning(corpus.train, settings.train_bytes)),
        validation=cut((module.text[:limit] for module in corpus.validation), settings.validation),
        test=cut((module.text[:limit] for module in corpus.test), settings.test),
        bytes_of=torch.tensor([len(token) for token in tokenizer.bytes_of]),
    )


def windows(tokenizer: Tokenizer, texts: Iterable[str], length: int, most: int | None = None) -> Windows:
    """Windows side by side, none over the end of a text, evenly spread over all where there are more than ``most``."""
    found = []
    for text in texts:
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
        if len(tokens) > length:
            found.append(tokens.unfold(0, length + 1, length))
    everything = torch.cat(found) if found else torch.empty(0, length + 1, dtype=torch.int64)
    if most is not None and len(everything) > most:
        everything = everything[torch.arange(most) * len(everything) // most]
    return Windows(everything.contiguous())


def _beginning(modules: Iterable[Module], limit: int) -> Iterator[str]:
    """The first so many characters, at most; no module gives more than a tenth of them."""
    left = limit
    for module in modules:
        if left <= 0:
            return
        text = module.text[: min(left, limit // 10)]
        left -= len(text)
        yield text


def few_windows(text: Text, settings: Settings, seed: int) -> Windows:
    """The text of a student with few data: windows from anywhere in the training text."""
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    return text.train.take(order[: settings.few])


class Batches:
    """(ids, x, y) of ``count`` batches, epoch after epoch in another order; a window's id is its place.

    Each epoch shows every window once, but for a remainder that makes no whole batch.
    """

    def __init__(self, windows: Windows, size: int, count: int, seed: int) -> None:
        self.windows, self.size, self.count, self.seed = windows, min(size, len(windows)), count, seed

    @property
    def per_epoch(self) -> int:
        return len(self.windows) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.empty(0, dtype=torch.int64)
        for number in range(self.count):
            place = number % self.per_epoch
            if place == 0:
                order = torch.randperm(len(self.windows), generator=generator)
            ids = order[place * self.size : (place + 1) * self.size]
            batch = self.windows.take(ids)
            yield ids, batch.x, batch.y
