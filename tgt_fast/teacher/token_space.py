"""A tokenizer as the teacher uses it: plain token ids, the special tokens put round them, and batches padded right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError

_PROBES = ("a", "the", "the cat")
_UNLIMITED = 1 << 20  # tokenizers without a limit of their own report an absurd one


class TokenSpace:
    """The tokens of one model.

    A text is ``prefix + tokens + suffix``, the special tokens being those that the tokenizer itself adds.

    Args:
        tokenizer: of Hugging Face's transformers, or one that can be called like it.
        max_length: the most tokens of a text, special ones included; less where the tokenizer says so.
        who: whose tokenizer, for messages.

    Raises:
        ArgumentError: a tokenizer that gives no tokens, or too small a ``max_length``.
    """

    def __init__(self, tokenizer: Any, max_length: int, who: str) -> None:
        self.tokenizer, self.who = tokenizer, who
        self.prefix, self.suffix = _template(tokenizer, who)
        pad = tokenizer.pad_token_id
        self.pad: int = int(pad) if pad is not None else (*self.suffix, *self.prefix, 0)[0]
        self.special = frozenset({*map(int, tokenizer.all_special_ids), *self.prefix, *self.suffix, self.pad})
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_length = max_length if limit is None or limit > _UNLIMITED else min(max_length, int(limit))
        self.room = self.max_length - len(self.prefix) - len(self.suffix)  # for tokens that are not special
        if self.room < 1:
            raise ArgumentError(
                f"{who}: max_length={self.max_length} leaves no room beside "
                f"{len(self.prefix) + len(self.suffix)} special tokens"
            )

    def same_as(self, other: TokenSpace) -> bool:
        """True if ids of the one are ids of the other, special tokens included."""
        mine, theirs = (self.prefix, self.suffix), (other.prefix, other.suffix)
        return self.tokenizer is other.tokenizer or (mine == theirs and self.vocabulary == other.vocabulary)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """B texts -> ``{"input_ids", "attention_mask"}``, int64 [B, L] on the CPU, padded on the right."""
        if isinstance(texts, str) or not len(texts):
            raise ArgumentError(f"{self.who}: texts must be a sequence of one string at least, got {texts!r}")
        made = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=self.room)
        return self.batch(made["input_ids"])

    def batch(self, contents: Iterable[Sequence[int]]) -> dict[str, Tensor]:
        """The same from ids without special tokens, cut to the room there is.

        An empty text without any special token would leave a model nothing to look at: it becomes one padding token
        that counts as real.
        """
        rows = [[*self.prefix, *content[: self.room], *self.suffix] or [self.pad] for content in contents]
        longest = max(map(len, rows))
        ids = [row + [self.pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids, device="cpu"), "attention_mask": torch.tensor(mask, device="cpu")}

    def contents(self, x: dict[str, Tensor]) -> list[list[int]]:
        """The ids of each text that are real and not special."""
        rows = zip(x["input_ids"].tolist(), x["attention_mask"].tolist(), strict=True)
        return [
            [token for token, real in zip(ids, mask, strict=True) if real and token not in self.special]
            for ids, mask in rows
        ]

    def texts(self, x: dict[str, Tensor]) -> list[str]:
        """The texts of a batch."""
        contents = self.contents(x)
        decode = self.tokenizer.batch_decode
        texts: list[str] = decode(contents, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts

    def special_tensor(self, device: torch.device) -> Tensor:
        return torch.tensor(sorted(self.special), device=device)


def _template(tokenizer: Any, who: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens that the tokenizer puts before and after a text."""
    for probe in _PROBES:
        bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
    raise ArgumentError(f"{who}: the tokenizer {type(tokenizer).__name__} makes no tokens of {_PROBES!r}")
