"""Teachers: a model of transformers, a Teacher, or a cache of what one has said."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast.cache import TeacherCache
from tgt_fast.errors import ArgumentError
from tgt_fast.integrations.terms import Said
from tgt_fast.integrations.transformers.heads import VocabularyHead
from tgt_fast.integrations.transformers.rows import inner
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.returned import logits_in


class Frozen:
    """A teacher of any of these kinds, frozen in place.

    Args:
        who: for messages.
        teacher: a module, a :class:`tgt_fast.Teacher`, or None where the cache knows all.
        cache: asked first.

    Raises:
        ArgumentError: neither of the two, or things of another kind.
    """

    def __init__(self, who: str, teacher: Any, cache: Any) -> None:
        if cache is not None and not isinstance(cache, TeacherCache):
            raise ArgumentError(f"{who}: cache must be a tgt_fast.TeacherCache, got {type(cache).__name__}")
        if teacher is None and cache is None:
            raise ArgumentError(f"{who}: give a teacher, or a cache of what one has said")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ArgumentError(
                f"{who}: teacher must be a model of transformers or a tgt_fast.Teacher, got {type(teacher).__name__}"
            )
        self.who, self.model = who, teacher
        self.cache: TeacherCache | None = cache
        self._head: VocabularyHead | None = None
        self._takes: frozenset[str] | None = None
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher.requires_grad_(False)
            teacher.eval()
            parameters = inspect.signature(inner(teacher).forward).parameters.values()
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                self._takes = frozenset(p.name for p in parameters)

    def to(self, device: torch.device) -> None:
        if self.model is not None and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)

    @torch.no_grad()
    def say(self, inputs: Mapping[str, Any], ids: Tensor | None, *, hidden: bool) -> Said:
        """Outputs for the inputs; with ``hidden`` as hidden states, where it can."""
        if self.cache is not None:
            return Said(self._cached(inputs, ids))
        assert self.model is not None
        if isinstance(self.model, Teacher):
            return Said(self.model.label(dict(inputs)))
        self.model.eval()  # it may hang in something that was put in train mode
        if not hidden:
            return Said(self._logits(inputs))
        if self._head is None:
            self._head = VocabularyHead(self.model, "teacher")
        given, head, found = self._given(inputs), self._head, []
        projection = head.learn(given)
        with head.instead(lambda states: found.append(head.matrix(states))):
            self.model(**given)
        return Said(None, *found[0], projection)

    def _given(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Of a batch what the teacher takes, without a cache of keys and values."""
        made = {name: part for name, part in inputs.items() if self._takes is None or name in self._takes}
        config = getattr(inner(self.model), "config", None)
        if getattr(config, "use_cache", False):
            made.setdefault("use_cache", False)
        return made

    def _logits(self, inputs: Mapping[str, Any]) -> Tensor:
        assert self.model is not None
        return logits_in(f"{self.who}: the teacher", self.model(**self._given(inputs)))

    def _cached(self, inputs: Mapping[str, Any], ids: Tensor | None) -> Tensor | TeacherTopK:
        if ids is None:
            raise ArgumentError(
                f"{self.who}: a cache keeps rows by sample id; name the column that holds ids, id_column=, and see to "
                "it that the collator keeps it"
            )
        assert self.cache is not None
        missing = None if self.model is None else self.cache.missing(ids)
        if missing is not None and bool(missing.any()):
            rows = missing.nonzero()[:, 0]
            few = {
                name: part[rows.to(part.device)] if isinstance(part, Tensor) and part.ndim else part
                for name, part in inputs.items()
            }
            said = self.model.label(few) if isinstance(self.model, Teacher) else self._logits(few)
            self.cache.add(ids.cpu()[rows], said.cpu())
        found: Tensor | TeacherTopK = self.cache.label(dict(inputs), ids)
        return found
