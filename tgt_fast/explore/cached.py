"""A teacher's cache as a source of latents and labels of real examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from tgt_fast.errors import ArgumentError

if TYPE_CHECKING:
    from tgt_fast.cache import EnsembleCache, TeacherCache


def check_cache(op: str, cache: Any) -> TeacherCache | EnsembleCache | None:
    """
    Raises:
        ArgumentError: it is no cache.
    """
    if cache is None:
        return None
    from tgt_fast.cache import EnsembleCache, TeacherCache

    if not isinstance(cache, (TeacherCache, EnsembleCache)):
        raise ArgumentError(
            f"{op}: cache must be a tgt_fast.TeacherCache or tgt_fast.cache.EnsembleCache, got {type(cache).__name__}"
        )
    return cache


def needed_ids(op: str, ids: Tensor | None) -> Tensor:
    """
    Raises:
        ArgumentError: there are none.
    """
    if ids is None:
        raise ArgumentError(
            f"{op}: a cache goes by sample ids, and there are none: give batches (ids, x, y), or sample_ids="
        )
    return ids
