"""Consumers of a text, labeler and student: its tokens in their vocabulary, or a relaxed text in their embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.select import BACKENDS
from tgt_fast.ops import _checks
from tgt_fast.ops._heads import with_adapters
from tgt_fast.ops.tokens import soft_embedding
from tgt_fast.teacher.alignment import align_vocabularies
from tgt_fast.teacher.key import Key
from tgt_fast.teacher.token_space import TokenSpace

_OP: Final = "Seq2SeqTeacher"


@dataclass(frozen=True)
class Relaxation:
    """The way from a distribution over tokens to an embedding, see :func:`tgt_fast.soft_embedding`.

    Raises:
        ArgumentError: an option outside its range.
    """

    tau: float = 1.0
    gumbel: bool = False
    hard: bool = False
    minimum_overlap: float = 0.25
    backend: str = "auto"

    def __post_init__(self) -> None:
        _checks.number(_OP, "tau", self.tau, 0, 1e30, open_low=True)
        _checks.number(_OP, "minimum_overlap", self.minimum_overlap, 0, 1)
        _checks.choice(_OP, "backend", self.backend, ("auto", *BACKENDS))
        for name in ("gumbel", "hard"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{_OP}: {name} must be True or False, got {getattr(self, name)!r}")


class TextClassifier(nn.Module):
    """``logits = model(**inputs).logits``: a classifier of transformers, called with a dict and giving logits alone.

    >>> import torch, tgt_fast as tgt
    >>> from transformers import DistilBertConfig, DistilBertForSequenceClassification
    >>> config = DistilBertConfig(vocab_size=100, dim=16, n_heads=2, n_layers=1, hidden_dim=32, num_labels=3)
    >>> student = tgt.teacher.TextClassifier(DistilBertForSequenceClassification(config))
    >>> student({"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5)}).shape
    torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """inputs: ``input_ids`` or ``inputs_embeds``, and ``attention_mask`` -> logits [B, C]."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings


class Consumer:
    """A model that reads the generator's texts: the labeler or the student.

    Args:
        name: "labeler" or "student", under which a batch may hold tokens of its own.
        space: its tokens.
        generator: the generator's.
        embedding: its table of input embeddings, a module with a ``weight``; None where no gradient is asked for.
    """

    def __init__(
        self, name: str, space: TokenSpace, generator: TokenSpace, embedding: nn.Module | None, relaxation: Relaxation
    ) -> None:
        self.name, self.space, self.generator = name, space, generator
        self.embedding, self.relaxation = embedding, relaxation
        # The student's table is in training: it is read here, and is no part of the teacher.
        self.teacher_modules = () if embedding is None or name == "student" else (embedding,)
        self.same = space.same_as(generator)
        weight, most = getattr(embedding, "weight", None), max(space.vocabulary.values(), default=-1)
        if isinstance(weight, Tensor) and weight.shape[0] <= most:
            raise ArgumentError(
                f"{_OP}: the {name} embeds {weight.shape[0]} tokens, its tokenizer makes ids up to {most}: "
                f"give {name}_tokenizer="
            )
        self._spelling: tuple[Tensor, Tensor, Tensor] | None = None  # made when first needed
        self._ids, self._mask = f"{name}_input_ids", f"{name}_attention_mask"

    def tokens_beside(self, texts: list[str]) -> dict[str, Tensor]:
        """Its tokens of these texts, to be kept in a batch beside the generator's; nothing where they are the same."""
        if self.same:
            return {}
        made = self.space.tokenize(texts)
        return {self._ids: made["input_ids"], self._mask: made["attention_mask"]}

    def __call__(self, x: Any) -> dict[str, Tensor]:
        """A batch of the teacher's data -> ``input_ids`` or ``inputs_embeds``, and ``attention_mask``."""
        if "token_logits" in x:
            return self._embedded(x)
        if self._ids in x:
            return {"input_ids": x[self._ids], "attention_mask": x[self._mask]}
        if self.same:
            return {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
        device = x["input_ids"].device
        return {name: ids.to(device) for name, ids in self.space.tokenize(self.generator.texts(x)).items()}

    def _embedded(self, x: dict[str, Any]) -> dict[str, Tensor]:
        """Its prefix, the soft embeddings of the ordinary tokens, its suffix: in the order and at the places where
        they would stand were they tokens."""
        logits, content = x["token_logits"], x["content"]  # [B, L, V], bool [B, L]
        table, readable = self._table(logits.shape[-1], logits.device)
        # Never all of them: a special token is not part of a text.
        soft = self._soft(logits.masked_fill(~readable, -torch.inf), table, x.get("key"))  # [B, L, D]
        prefix, suffix = self.space.prefix, self.space.suffix
        own = [*prefix, *suffix, self.space.pad]
        weight = self._weight()
        fixed = weight[torch.tensor(own, device=weight.device)].to(soft.dtype).expand(soft.shape[0], -1, -1)
        rows = torch.cat([soft, fixed], 1) * float(getattr(self.embedding, "embed_scale", None) or 1.0)
        where, mask = _places(content & readable[x["source"]], len(prefix), len(suffix), self.space.room)
        embeds = rows.gather(1, where[..., None].expand(-1, -1, rows.shape[-1]))
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def _soft(self, logits: Tensor, table: Tensor, key: Key | None) -> Tensor:
        how = self.relaxation
        keyed: dict[str, Any] = {}
        if key is not None and how.gumbel:
            keyed = {"seed": key.seed, "sample_ids": key.ids, "step": key.step, "replica": key.replica}
        return soft_embedding(
            logits, table, tau=how.tau, gumbel=how.gumbel, hard=how.hard, backend=how.backend, **keyed
        )

    def _table(self, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Its embedding of each of the generator's tokens, [V, D], and which of them it can read, bool [V]."""
        weight = self._weight()
        if self._spelling is None:
            self._spelling = self._spelled(classes)
        ids, starts, readable = self._spelling = _on(self._spelling, device)
        if self.same and weight.shape[0] == classes:
            return weight, readable
        return F.embedding_bag(ids, weight, starts, mode="mean"), readable

    def _spelled(self, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ids that stand for the generator's tokens, one after the other; where each one's begin; whether it has
        any, and is not special."""
        known = self.generator.vocabulary.values()
        spelled: dict[int, tuple[int, ...]]
        if self.same:
            spelled = {token: (token,) for token in known}
        else:
            how = self.relaxation
            tokenizers = self.generator.tokenizer, self.space.tokenizer
            spelled = dict(enumerate(align_vocabularies(*tokenizers, minimum_overlap=how.minimum_overlap).spelled))
        bags = [spelled.get(token, ()) for token in range(classes)]
        lengths = torch.tensor([len(bag) for bag in bags], device="cpu")
        readable = lengths > 0
        readable[[token for token in self.generator.special if token < classes]] = False
        ids = torch.tensor([token for bag in bags for token in bag], device="cpu")
        return ids, lengths.cumsum(0) - lengths, readable

    def _weight(self) -> Tensor:
        weight = getattr(self.embedding, "weight", None)
        if self.embedding is None or not isinstance(weight, Tensor):
            raise ArgumentError(
                f"{_OP}: a gradient reaches the {self.name} through its table of input embeddings: give "
                f"{self.name}_embedding=, a module with a weight, or a {self.name} with get_input_embeddings()"
            )
        weight = with_adapters(self.embedding, weight)
        # In eval mode nobody trains the table, and its gradient would cost a matrix product.
        return weight if self.embedding.training else weight.detach()


def _on(tensors: tuple[Tensor, Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (tensor.to(device) for tensor in tensors)
    return first, second, third


def _places(content: Tensor, prefix: int, suffix: int, room: int) -> tuple[Tensor, Tensor]:
    """For each place of the consumer's text the row that it takes of [soft rows (L), prefix, suffix, padding].

    content: bool [B, L], the soft rows that stand for ordinary tokens; of these the first ``room``.

    Returns:
        int64 [B, T] and the attention mask, int64 [B, T], with T = prefix + min(L, room) + suffix.
    """
    rows, length = content.shape
    device = content.device
    order = content.long().cumsum(1) - 1  # [B, L], of the ordinary tokens
    kept = content & (order < room)
    count = kept.sum(1, keepdim=True)
    total = prefix + min(length, room) + suffix
    place = torch.arange(total, device=device).expand(rows, -1)
    where = torch.full(
        (rows, total + 1), length + prefix + suffix, device=device
    )  # the last column takes what is left out
    target = torch.where(kept, order + prefix, total)
    where.scatter_(1, target, torch.arange(length, device=device).expand(rows, -1))
    where = where[:, :total]
    where = torch.where(place < prefix, length + place, where)
    behind = place - prefix - count
    where = torch.where((behind >= 0) & (behind < suffix), length + prefix + behind, where)
    mask = (behind < suffix).long()
    mask[:, 0] = 1  # of a text of nothing at all its padding, as in TokenSpace.batch
    return where, mask
