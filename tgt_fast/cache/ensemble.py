"""A cache for each teacher of an ensemble, and what they say together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final

from torch import Tensor

from tgt_fast._opening import as_path
from tgt_fast.cache.cache import TeacherCache
from tgt_fast.cache.query import SampleIds
from tgt_fast.errors import ArgumentError
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.teacher import Latents, TeacherEnsemble
from tgt_fast.teacher.teacher import Opinion

_OP: Final = "EnsembleCache"


class EnsembleCache:
    """``cache.label(x, ids) == ensemble.label(x)``, with what each teacher says of a sample computed once.

    Each teacher has a :class:`tgt_fast.TeacherCache` in a folder of its name, so that another weight, combination or
    route, or one teacher more, costs nothing that is there already. All teachers are asked of all samples.

    Args:
        folder: in which the caches are.
        ensemble: whose they are.
        settings: of each :class:`tgt_fast.TeacherCache`. With ``k=None``, the default here, logits are stored, and
            :meth:`label` mixes them; records cannot be mixed, :meth:`each` gives them for a soft term each.

    >>> import tempfile, torch, tgt_fast as tgt
    >>> from torch import nn
    >>> a, b = (tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3)) for _ in "ab")
    >>> both, x = tgt.TeacherEnsemble({"a": a, "b": b}), torch.randn(4, 8)
    >>> with tempfile.TemporaryDirectory() as folder, tgt.cache.EnsembleCache(folder, both) as cache:
    ...     torch.equal(cache.label(x, range(4)), both.label(x))
    True
    """

    def __init__(
        self, folder: str | os.PathLike[str], ensemble: TeacherEnsemble, *, k: int | None = None, **settings: Any
    ) -> None:
        if not isinstance(ensemble, TeacherEnsemble):
            raise ArgumentError(f"{_OP}: ensemble must be a tgt_fast.TeacherEnsemble, got {type(ensemble).__name__}")
        path = as_path(_OP, "a folder", folder)
        self.ensemble = ensemble
        self.caches: dict[str, TeacherCache] = {}
        for name, teacher in ensemble.members.items():
            if not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
                raise ArgumentError(f"{_OP}: the name {name!r} cannot be that of a folder")
            self.caches[name] = TeacherCache(path / name, teacher, k=k, **settings)

    def label(self, x: Any, sample_ids: SampleIds) -> Tensor:
        """The ensemble's labels, logits [B, ..., C]; ``x`` is asked of the teachers that have not seen an id.

        Raises:
            ArgumentError: the caches hold records.
        """
        return self.ensemble.combined(self._logits(x, sample_ids), x)

    def _logits(self, x: Any, sample_ids: SampleIds) -> dict[str, Tensor]:
        answers: dict[str, Tensor] = {}
        for name, made in self.each(x, sample_ids).items():
            if isinstance(made, TeacherTopK):
                raise ArgumentError(f"{_OP}: records cannot be mixed: make the cache with k=None, or take each()")
            answers[name] = made
        return answers

    def each(self, x: Any, sample_ids: SampleIds) -> dict[str, Tensor | TeacherTopK]:
        """Answers of each teacher, by name, in its own classes."""
        data = self.ensemble.data_of(x)
        return {name: cache.label(data, sample_ids) for name, cache in self.caches.items()}

    def opinions(self, x: Any, sample_ids: SampleIds) -> tuple[Opinion, ...]:
        """The distributions that soft terms are taken of, as :meth:`tgt_fast.TeacherEnsemble.opinions` gives them.

        Raises:
            ArgumentError: the caches hold records.
        """
        return self.ensemble.opinions_of(self._logits(x, sample_ids), x)

    @property
    def generator(self) -> TeacherCache:
        """The cache of the teacher that encodes and decodes."""
        names = (name for name, teacher in self.ensemble.members.items() if teacher is self.ensemble.generator)
        return self.caches[next(names)]

    def encode(self, x: Any, sample_ids: SampleIds) -> Latents:
        """``ensemble.encode(x)``, with ``latents=True``."""
        return self.generator.encode(self.ensemble.data_of(x), sample_ids)

    def flush(self) -> None:
        """Write the rows that wait in memory."""
        for cache in self.caches.values():
            cache.flush()

    def fill(self, loader: Iterable[Any], *, columns: Sequence[Any] | None = None, **options: Any) -> int:
        """:meth:`tgt_fast.TeacherCache.fill` of each; how many rows were computed in all."""
        return sum(cache.fill(loader, columns=columns, **options) for cache in self.caches.values())

    def close(self) -> None:
        """Write what waits, and let go of the files."""
        for cache in self.caches.values():
            cache.close()

    def __enter__(self) -> EnsembleCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
