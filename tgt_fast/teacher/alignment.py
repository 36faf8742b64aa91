"""Vocabularies aligned by the text of their tokens, for models whose tokenizers differ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError

_ROLES: Final = (("bos", "cls"), ("eos", "sep"), ("pad",), ("unk",), ("mask",))
_SPACE: Final = {"byte": "\u0120", "metaspace": "\u2581"}  # how a tokenizer of that kind writes a token's leading space
_CONTINUES: Final = "##"


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The place of each token of one vocabulary in another.

    Attributes:
        ids: [V] int64, the other vocabulary's id of each token, -1 where it has none.
        spelled: for each token, the ids that stand for it: its counterpart's, or those of its text, or none.
        overlap: the share of ordinary (not special) tokens that have a counterpart, in [0, 1].
    """

    ids: Tensor
    overlap: float
    spelled: tuple[tuple[int, ...], ...]


def align_vocabularies(source: Any, target: Any, *, minimum_overlap: float = 0.25) -> TokenMap:
    """``target_id[text(token)]`` of each token of ``source``: the same text, however each tokenizer spells it.

    Byte-level BPE (a leading space is part of a token), SentencePiece (it is written as an underscore), WordPiece
    (what continues a word begins with ##) and plain words are told apart by their vocabularies. Looked for in turn:
    the same text at the same place (the beginning of a word, or within one); the same text at the other place; if
    the target knows no capital letters, both again in lower case. Special tokens correspond by role: beginning, end,
    padding, unknown, mask. A token may be the counterpart of several: they share its embedding.

    Args:
        source, target: tokenizers of Hugging Face's transformers, or anything with ``get_vocab()`` and the attributes
            ``all_special_ids``, ``bos_token_id``, ``cls_token_id`` and so on.
        minimum_overlap: in [0, 1].

    Returns:
        A :class:`TokenMap`. A token without a counterpart is -1; in a relaxed text it is read as the mean of the
        embeddings of the tokens that the target makes of its text. One of which it makes nothing, as of a lone space,
        gets no probability, and the reader has no place for it.

    Raises:
        ArgumentError: the overlap is below ``minimum_overlap``.
    """
    if not 0 <= minimum_overlap <= 1:
        raise ArgumentError(f"align_vocabularies: minimum_overlap must be in [0, 1], got {minimum_overlap!r}")
    mine, theirs = source.get_vocab(), target.get_vocab()
    special, other_special = set(source.all_special_ids), set(target.all_special_ids)
    read_mine, read_theirs = _reader(mine), _reader(theirs)
    found: dict[tuple[bool, str], int] = {}
    for token, place in sorted(theirs.items(), key=lambda item: item[1], reverse=True):
        begins, text = read_theirs(token)
        if place not in other_special:  # of two spellings of one text the lower id stays
            found[(begins, token if text is None else text)] = place
    lower = not any(text != text.lower() for _, text in found)
    ids = torch.full((1 + max(mine.values(), default=0),), -1, device="cpu")
    ordinary, hits = len(mine) - len(special), 0
    for token, place in mine.items():
        if place in special:
            continue
        begins, text = read_mine(token)
        text = token if text is None else text  # the same where it is spelled alike
        spellings = [text, text.lower()] if lower else [text]
        keys = ((at, spelled) for spelled in spellings for at in (begins, not begins))
        ids[place] = match = next((found[key] for key in keys if key in found), -1)
        hits += match >= 0
    for place, match in _by_role(source, target).items():
        ids[place] = match
    overlap = hits / max(1, ordinary)
    if overlap < minimum_overlap:
        raise ArgumentError(
            f"align_vocabularies: {hits} of {ordinary} tokens ({overlap:.1%}) have a counterpart in the "
            f"other vocabulary of {len(theirs)}, fewer than minimum_overlap={minimum_overlap:.1%}; use tokenizers that "
            "are closer, or explore without gradients, where texts are tokenized anew"
        )
    return TokenMap(ids, overlap, _spelled(mine, special, read_mine, ids, target))


def _spelled(
    vocabulary: dict[str, int], special: set[int], read: Any, ids: Tensor, target: Any
) -> tuple[tuple[int, ...], ...]:
    spelled: list[tuple[int, ...]] = [(match,) if match >= 0 else () for match in ids.tolist()]
    missing = {place: read(token)[1] for token, place in vocabulary.items() if ids[place] < 0 and place not in special}
    missing = {place: text for place, text in missing.items() if text is not None and text.strip()}
    if missing:
        made = target(list(missing.values()), add_special_tokens=False)["input_ids"]
        for place, tokens in zip(missing, made, strict=True):
            spelled[place] = tuple(tokens)
    return tuple(spelled)


def _reader(vocabulary: dict[str, int]) -> Any:
    """token -> (begins a word, its text), by the kind of tokenizer that such a vocabulary is of.

    The text is None where a token is a part of a character.
    """
    counts = {kind: sum(token.startswith(mark) for token in vocabulary) for kind, mark in _SPACE.items()}
    pieces = sum(token.startswith(_CONTINUES) and len(token) > len(_CONTINUES) for token in vocabulary)
    kind, most = max(counts.items(), key=lambda item: item[1])
    if pieces > most:
        return _read_piece
    if not most:
        return lambda token: (True, token)
    return _read_bytes if kind == "byte" else _read_metaspace


def _read_piece(token: str) -> tuple[bool, str]:
    within = token.startswith(_CONTINUES) and len(token) > len(_CONTINUES)
    return not within, token[len(_CONTINUES) :] if within else token


def _read_metaspace(token: str) -> tuple[bool, str]:
    return _split_space(token.replace(_SPACE["metaspace"], " "))


def _read_bytes(token: str) -> tuple[bool, str | None]:
    try:
        text = bytes(_bytes_of_characters()[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return False, None
    return _split_space(text)


def _split_space(text: str) -> tuple[bool, str]:
    return text.startswith(" "), text.removeprefix(" ")


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself if it is one, else the next from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def _by_role(source: Any, target: Any) -> dict[int, int]:
    pairs = {}
    for names in _ROLES:
        mine, theirs = ([getattr(t, f"{name}_token_id", None) for name in names] for t in (source, target))
        match = next((place for place in theirs if place is not None), None)
        if match is not None:
            pairs.update({place: match for place in mine if place is not None})
    return pairs
