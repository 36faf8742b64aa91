"""The encoder and the decoder of a teacher of texts, round a sequence-to-sequence model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from tgt_fast.errors import ArgumentError
from tgt_fast.teacher import tree
from tgt_fast.teacher.consumer import Consumer
from tgt_fast.teacher.generation import Decoder, Generation
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.latents import Latents
from tgt_fast.teacher.token_space import TokenSpace

TextData: TypeAlias = dict[str, Any]  # see Seq2SeqTeacher
_OP = "Seq2SeqTeacher"


class TextGenerator:
    """Tokens -> latents -> tokens, or relaxed tokens.

    Args:
        model: the encoder-decoder.
        space: its tokens.
        sides: labeler and student, whose tokens are kept beside the generator's where they differ.
        generation: how tokens are chosen.
    """

    def __init__(
        self, model: nn.Module, space: TokenSpace, sides: tuple[Consumer, Consumer], generation: Generation
    ) -> None:
        self.model, self.space, self.sides, self.generation = model, space, sides, generation
        self.relaxation = sides[0].relaxation
        self._decoder = _decoder(model, space)

    def encode(self, x: TextData) -> Latents:
        if "input_ids" not in x or "attention_mask" not in x:
            raise ArgumentError(f"{_OP}: data need input_ids and attention_mask, see tokenize(); got {sorted(x)}")
        ids, mask = x["input_ids"], x["attention_mask"]
        if mask.device.type == "cpu" and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ArgumentError(f"{_OP}: texts must be padded on the right, where noise does not count positions")
        encoder = self.model.get_encoder()  # type: ignore[operator]
        return Latents(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask, ids)

    def decode(self, latents: Latents, *, relaxed: bool, key: Key) -> TextData:
        return self._relaxed(latents, key) if relaxed else self._generated(latents, key)

    def _generated(self, latents: Latents, key: Key) -> TextData:
        """Tokens from the decoder, and what the others see of their text."""
        contents = self._decoder.generate(latents, self.generation, self.space.room + 1, key, self.relaxation.backend)
        made: TextData = {**self.space.batch(contents)}
        if not all(side.same for side in self.sides):
            made |= self.tokens_beside(self.space.texts(made))
        return {name: value.to(latents.z.device) for name, value in made.items()}

    def texts(self, x: TextData) -> list[str]:
        return self.space.texts(_hard(x))

    def changes(self, before: TextData, after: TextData) -> dict[str, float]:
        pairs = [self.space.contents(_hard(x)) for x in (before, after)]
        if len(pairs[0]) != len(pairs[1]):
            raise ArgumentError(f"{_OP}: {len(pairs[0])} texts before and {len(pairs[1])} after cannot be compared")
        texts = sum(a != b for a, b in zip(*pairs, strict=True))
        places = [max(len(a), len(b)) for a, b in zip(*pairs, strict=True)]
        alike = sum(x == y for a, b in zip(*pairs, strict=True) for x, y in zip(a, b, strict=False))
        return {"texts": texts / len(places), "tokens": (sum(places) - alike) / max(1, sum(places))}

    def tokens_beside(self, texts: list[str]) -> TextData:
        """The tokens of labeler and student, where they are others than the generator's."""
        labeler, student = (side.tokens_beside(texts) for side in self.sides)
        return {**labeler, **student}

    def _relaxed(self, latents: Latents, key: Key) -> TextData:
        """The decoder's logits at all positions from one call, fed the tokens that z was encoded from."""
        if latents.source is None or latents.mask is None:
            raise ArgumentError(f"{_OP}: a relaxed text needs latents that know their tokens, as encode() gives them")
        fed = self.model.prepare_decoder_input_ids_from_labels(labels=latents.source)  # type: ignore[operator]
        logits = self._decoder.output_of(latents, fed, use_cache=False).logits
        content = latents.mask.bool() & ~torch.isin(latents.source, self.space.special_tensor(fed.device))
        made: TextData = {"token_logits": logits, "content": content, "source": latents.source}
        if self.relaxation.gumbel:
            made["key"] = key
        return made

    def join(self, pieces: Sequence[TextData]) -> TextData:
        """Batches one after the other, padded on the right to the longest."""
        if len(pieces) == 1:
            return pieces[0]
        if "token_logits" in pieces[0]:
            return tree.concat([p | {"key": p["key"].by_row()} if "key" in p else p for p in pieces])
        longest = {name: max(piece[name].shape[1] for piece in pieces) for name in pieces[0]}
        return tree.concat(
            [
                {
                    name: F.pad(value, (0, longest[name] - value.shape[1]), value=self._padding(name))
                    for name, value in piece.items()
                }
                for piece in pieces
            ]
        )

    def _padding(self, name: str) -> int:
        if name.endswith("_mask"):
            return 0
        own = {f"{side.name}_input_ids": side.space.pad for side in self.sides}
        return own.get(name, self.space.pad)


def _hard(x: TextData) -> TextData:
    if "input_ids" not in x:
        raise ArgumentError(f"{_OP}: a relaxed text has no one string; decode its latents without relaxed=True")
    return x


def _decoder(model: nn.Module, space: TokenSpace) -> Decoder:
    """Tokens that the model's decoder begins with, ends with and never makes."""
    settings = [getattr(model, name, None) for name in ("generation_config", "config")]

    def setting(name: str, default: Any) -> Any:
        found = (getattr(s, name, None) for s in settings)
        return next((value for value in found if value is not None), default)

    start = setting("decoder_start_token_id", None)
    if start is None:
        raise ArgumentError(f"{_OP}: the generator's config names no decoder_start_token_id; is it an encoder-decoder?")
    end = setting("eos_token_id", space.tokenizer.eos_token_id)
    ends = tuple(end) if isinstance(end, (list, tuple)) else (end,)
    if None in ends or not ends:
        raise ArgumentError(f"{_OP}: neither the generator nor its tokenizer names an eos_token_id, so no text ends")
    known = 1 + max(space.vocabulary.values())
    banned = sorted(token for token in (space.special | {int(start)}) - set(ends) if token < known)
    return Decoder(model, (int(start), *space.prefix), ends, tuple(banned), known)
