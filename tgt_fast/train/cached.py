"""Labels and latents of real examples out of a teacher's cache."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.explore.cached import check_cache, needed_ids
from tgt_fast.teacher import Latents, Teacher, TeacherEnsemble, tree
from tgt_fast.teacher.teacher import Opinion

if TYPE_CHECKING:
    from tgt_fast.cache import EnsembleCache, TeacherCache

_OP: Final = "TGTObjective"
_WATCHED: Final = 64  # examples that are looked at again


class Known:
    """What a cache knows of the real examples of an objective."""

    def __init__(self, cache: TeacherCache | EnsembleCache, teacher: Teacher) -> None:
        self.cache, self.teacher = cache, teacher
        self._seen: dict[tuple[int, tuple[Any, ...]], int] = {}
        self._check_teacher()

    @staticmethod
    def of(cache: Any, teacher: Teacher, before: Known | None) -> Known | None:
        """The one before, as long as cache and teacher are the same."""
        found = check_cache(_OP, cache)
        if found is None or (before is not None and before.cache is found and before.teacher is teacher):
            return before if found is not None else None
        return Known(found, teacher)

    def _check_teacher(self) -> None:
        from tgt_fast.cache import EnsembleCache, teacher_fingerprint

        cache, teacher = self.cache, self.teacher
        if isinstance(cache, EnsembleCache):
            if cache.ensemble is not teacher:
                raise ArgumentError(f"{_OP}: the cache is of another ensemble than the objective's teacher")
            return
        if isinstance(teacher, TeacherEnsemble) and teacher.combine == "per_teacher":
            raise ArgumentError(
                f'{_OP}: with combine="per_teacher" each teacher has a term of its own, and a TeacherCache holds one '
                "label: use tgt_fast.cache.EnsembleCache"
            )
        asked = cache.teacher
        if not isinstance(asked, Teacher) or asked is teacher:
            return
        mine = teacher_fingerprint(teacher, latents=cache.settings.latents).parts["weights"]
        if mine != cache.fingerprint.parts["weights"]:
            raise ArgumentError(f"{_OP}: the cache is of a teacher with other weights than the objective's")

    def __call__(
        self, x: Any, sample_ids: Tensor | None, *, encode: bool
    ) -> tuple[tuple[Opinion, ...], Latents | None]:
        """The opinions on a batch and, if asked and stored, its latents."""
        from tgt_fast.cache import EnsembleCache

        cache, ids = self.cache, needed_ids(_OP, sample_ids)
        self._watch(x, ids)
        if isinstance(cache, EnsembleCache):
            encode = encode and cache.generator.settings.latents
            return cache.opinions(x, ids), cache.encode(x, ids) if encode else None
        if encode and cache.settings.latents:
            labels, latents = cache.label_and_encode(x, ids)
            return (Opinion(cast(Tensor, labels), None),), latents
        return (Opinion(cast(Tensor, cache.label(x, ids)), None),), None

    def _watch(self, x: Any, ids: Tensor) -> None:
        """Refuse data that change from one epoch to the next, as far as some examples on a CPU show it."""
        leaves = tree.batched_leaves(x)
        if any(leaf.device.type != "cpu" for leaf in leaves):
            return
        shapes = tuple(leaf.shape[1:] for leaf in leaves)  # a text may be padded otherwise in another batch
        for row, one in enumerate(ids.tolist()):
            before = self._seen.get((one, shapes))
            if before is None and len(self._seen) >= _WATCHED:
                continue
            now = 0
            for leaf in leaves:
                now = zlib.crc32(leaf[row].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, now)
            if before is None:
                self._seen[one, shapes] = now
            elif before != now:
                raise ArgumentError(
                    f"{_OP}: sample {one} is other data than when it came first, but a cache gives it the same label: "
                    "give augmented or mixed data ids of their own, or leave cache= out"
                )
