"""Byte-pair encoding, made on the spot: every text has tokens, and tokens give back every text."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

# A token stays within a word, a number, signs, or the end of a line with the next one's indentation.
_PIECES = re.compile(r" ?[^\W\d_]+|_+[^\W\d_]*| ?\d+| ?[^\s\w]+|\n+ *|\s+")
_BYTES = 256
Pair = tuple[int, int]


class Tokenizer:
    """Tokens 0 to 255 are the bytes; each merge adds one, of two tokens before it.

    >>> tokenizer = train_tokenizer(["low lower lowest"] * 3, 260)
    >>> tokenizer.decode(tokenizer.encode("a low flower")), len(tokenizer)
    ('a low flower', 260)
    """

    def __init__(self, merges: Sequence[Pair]) -> None:
        self.merges = tuple(merges)
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self.bytes_of = [bytes([byte]) for byte in range(_BYTES)]
        for left, right in self.merges:
            self.bytes_of.append(self.bytes_of[left] + self.bytes_of[right])
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.bytes_of)

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for piece in _PIECES.findall(text):
            tokens = self._known.get(piece)
            if tokens is None:
                tokens = self._known[piece] = self._merged(list(piece.encode()))
            found += tokens
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.bytes_of[token] for token in tokens).decode("utf-8", errors="replace")

    def _merged(self, tokens: list[int]) -> list[int]:
        """The earliest merge that applies, again and again: the order in which they were learnt."""
        while len(tokens) > 1:
            pair = min(pairwise(tokens), key=lambda pair: self._rank.get(pair, len(self)))
            if pair not in self._rank:
                break
            tokens = _with(tokens, pair, _BYTES + self._rank[pair])
        return tokens


def _with(tokens: list[int], pair: Pair, made: int) -> list[int]:
    """``tokens`` with every occurrence of ``pair``, from the left, as one token."""
    found: list[int] = []
    place = 0
    while place < len(tokens):
        if tokens[place : place + 2] == list(pair):
            found.append(made)
            place += 2
        else:
            found.append(tokens[place])
            place += 1
    return found


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Merge the most frequent pair until there are ``size`` tokens, or no pair occurs twice.

    Of pairs as frequent, the one of smaller tokens comes first, so that the same texts make the same tokens.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_PIECES.findall(text))
    words = [list(piece.encode()) for piece in counts]
    times = list(counts.values())
    pairs: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)  # words that hold the pair, or once did
    for number, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[number]
            holders[pair].add(number)
    # Entries whose count has changed meanwhile are skipped when they come up: each change pushes a new one.
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and _BYTES + len(merges) < size:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            continue
        if -count < 2:
            break
        made = _BYTES + len(merges)
        merges.append(best)
        changed: set[Pair] = set()
        for number in holders.pop(best):
            old, new = words[number], _with(words[number], best, made)
            for pair in pairwise(old):
                pairs[pair] -= times[number]
                changed.add(pair)
            for pair in pairwise(new):
                pairs[pair] += times[number]
                holders[pair].add(number)
                changed.add(pair)
            words[number] = new
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return Tokenizer(merges)
