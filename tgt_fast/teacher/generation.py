"""Generation: tokens from an encoder's output, drawn so that a text depends on its own key alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast._optional import optional
from tgt_fast.errors import ArgumentError
from tgt_fast.ops import _checks
from tgt_fast.ops.tokens import sample_tokens
from tgt_fast.teacher import tree
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.latents import Latents

STRATEGIES: Final = ("sample", "greedy", "beam")
_OP: Final = "Generation"
_DROP: Final = 0.75  # texts that have ended are dropped when so many, or fewer, go on


@dataclass(frozen=True)
class Generation:
    """The way of a decoder from latents to tokens.

    Attributes:
        strategy: "sample" (each token drawn, by sample id), "greedy" (the likeliest) or "beam".
        temperature, top_k, top_p, min_p: of the draw, see :func:`tgt_fast.sample_tokens`.
        num_beams: >= 2, of a beam search.
        max_new_tokens: the most tokens of a text that a decoder makes; less where the texts may not be as long.
        min_new_tokens: before so many no text ends.
        options: further options of transformers' ``generate`` (beam search alone), such as
            ``{"no_repeat_ngram_size": 3}``.

    Raises:
        ArgumentError: an option outside its range, or one that the strategy does not read.
    """

    strategy: str = "sample"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    num_beams: int = 4
    max_new_tokens: int = 128
    min_new_tokens: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _checks.choice(_OP, "strategy", self.strategy, STRATEGIES)
        _checks.integer(_OP, "max_new_tokens", self.max_new_tokens, 1, 1 << 16)
        _checks.integer(_OP, "min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens + 1)
        _checks.integer(_OP, "num_beams", self.num_beams, 2, 1 << 16)
        _checks.number(_OP, "temperature", self.temperature, 0, 1e30)
        drawn = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
        unread = [name for name, default in drawn.items() if getattr(self, name) != default]
        if self.strategy != "sample" and unread:
            raise ArgumentError(f"{_OP}: strategy={self.strategy!r} draws nothing and does not read {unread}")
        if self.strategy != "beam" and self.options:
            raise ArgumentError(f"{_OP}: only a beam search takes further options, got {sorted(self.options)}")


@dataclass(frozen=True, eq=False)
class Decoder:
    """A sequence-to-sequence model's decoder, and the tokens that it may and must emit.

    ``first`` opens every text; ``banned`` are never made, but for ``end``, which ends a text.
    """

    model: nn.Module
    first: tuple[int, ...]
    end: tuple[int, ...]
    banned: tuple[int, ...]
    known: int  # the ids below it are the tokenizer's; a model may have more, as padding

    def generate(self, latents: Latents, how: Generation, most: int, key: Key, backend: str) -> list[list[int]]:
        """The ids of each text, without what opens and ends it."""
        most = min(most, how.max_new_tokens)
        made = (
            self._beam(latents, how, most)
            if how.strategy == "beam"
            else self._token_by_token(latents, how, most, key, backend)
        )
        return [self._until_end(row) for row in made.tolist()]

    def output_of(self, latents: Latents, tokens: Tensor, **options: Any) -> Any:
        """The model's output for decoder inputs ``tokens`` (int64 [B, T]), with the encoder's output replaced."""
        # The mask must come with it: nothing can be inferred from encoded states.
        return self.model(
            encoder_outputs=encoded(latents.z), attention_mask=latents.mask, decoder_input_ids=tokens, **options
        )

    @torch.no_grad()
    def _token_by_token(self, latents: Latents, how: Generation, most: int, key: Key, backend: str) -> Tensor:
        rows, device = latents.z.shape[0], latents.z.device
        ends = torch.tensor(self.end, device=device)
        made = ends[:1].expand(rows, most).contiguous()  # what is not written has ended
        going = torch.arange(rows, device=device)  # the texts that have not
        inputs = torch.tensor(self.first, device=device).expand(rows, -1)
        cache, early, later = None, None, None
        for place in range(most):
            output = self.output_of(latents, inputs, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1]
            if early is None or later is None:
                early, later = (self.barred(logits, may_end=may) for may in (False, True))
            logits = logits.masked_fill(later if place >= how.min_new_tokens else early, -torch.inf)
            token = _choose(logits, how, key, place, most, backend)
            if bool((token < 0).any()):
                raise ArgumentError("Seq2SeqTeacher: the generator's logits are not finite; are its latents?")
            made[going, place] = token
            ended = torch.isin(made[going, : place + 1], ends).any(1)
            left = int((~ended).sum())
            if left == 0:
                break
            if left <= _DROP * going.numel():  # a copy of the cache, repaid by the tokens that are not computed
                stay = (~ended).nonzero().flatten()
                cache.batch_select_indices(stay)
                latents, key, going, token = tree.take(latents, stay), key.take(stay), going[stay], token[stay]
            inputs = token[:, None]
        return made

    @torch.no_grad()
    def _beam(self, latents: Latents, how: Generation, most: int) -> Tensor:
        first = torch.tensor(self.first, device=latents.z.device).expand(latents.z.shape[0], -1)
        made: Tensor = self.model.generate(  # type: ignore[operator]
            encoder_outputs=encoded(latents.z), attention_mask=latents.mask, decoder_input_ids=first,
            do_sample=False, num_beams=how.num_beams, max_new_tokens=most,
            min_new_tokens=min(how.min_new_tokens, most), suppress_tokens=[*self.banned, *self._unknown(self.model)],
            **how.options,
        )  # fmt: skip
        return made[:, len(self.first) :]

    def barred(self, logits: Tensor, *, may_end: bool) -> Tensor:
        """The tokens that are not to be made, bool [V], for logits [..., V]."""
        barred = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        barred[self.known :] = True
        barred[torch.tensor(self.banned if may_end else (*self.banned, *self.end), device=logits.device)] = True
        return barred

    def _unknown(self, model: nn.Module) -> range:
        return range(self.known, int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]

    def _until_end(self, row: list[int]) -> list[int]:
        ended = next((place for place, token in enumerate(row) if token in self.end), len(row))
        return [token for token in row[:ended] if token not in self.banned]


def encoded(z: Tensor) -> Any:
    """The latents as what transformers' models take for an encoder's output."""
    outputs = optional("transformers.modeling_outputs", "hf", "Seq2SeqTeacher")
    return outputs.BaseModelOutput(last_hidden_state=z)


def _choose(logits: Tensor, how: Generation, key: Key, place: int, most: int, backend: str) -> Tensor:
    """The next token of each text, int64 [B]."""
    options: dict[str, Any] = {"temperature": 0.0}
    if how.strategy == "sample":
        options = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "min_p": how.min_p}
    # Every token of a text draws anew: a step of the sampler is as many of the noise as a text has tokens.
    step = key.step * most + place
    options |= {"seed": key.seed, "sample_ids": key.ids, "step": step, "replica": key.replica}
    return sample_tokens(logits, backend=backend, **options)
