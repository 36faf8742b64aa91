"""Copies of one example within a call: which replica of its sample id each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.kernels.options import MAX_REPLICA
from tgt_fast.ops import _checks

_OP = "LatentSampler"


def occurrences(ids: Tensor) -> Tensor | None:
    """The number of times each row's id has occurred in the rows before it, int64 [B] as the ids are.

    None where no id occurs twice, as far as that can be seen without waiting for a device: computed there, nothing is
    read back.
    """
    count = ids.shape[0]
    if count < 2:
        return None
    ordered, order = torch.sort(ids, stable=True)
    again = ordered[1:] == ordered[:-1]
    if _checks.on_plain_cpu(ids) and not bool(again.any()):
        return None
    place = torch.arange(count, device=ids.device)
    begun = torch.cat([place[:1], torch.where(again, 0, place[1:])]).cummax(0).values  # where an id's rows begin
    return torch.empty_like(place).scatter(0, order, place - begun)


def occurrences_over(batches: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same over the ids of several batches, one after the other; None for one without ids."""
    given = [ids for ids in batches if ids is not None]
    found = occurrences(torch.cat([ids.to(torch.int64) for ids in given])) if given else None
    if found is None:
        return [None] * len(batches)
    pieces = iter(torch.split(found, [ids.shape[0] for ids in given]))
    return [None if ids is None else next(pieces) for ids in batches]


def first_replicas(ids: Tensor | None, occurrence: Any, options: SamplerOptions) -> int | Tensor:
    """The first replica of each row, int64 [B], or 0 for all of them: k * replicas for copy k of an id.

    Args:
        ids: the checked ids that the caller gave; None: ids that are counted, and so are distinct.
        occurrence: k of each row, where the caller knows it.

    Raises:
        ArgumentError: an id that occurs twice with ``repeats="error"``; more copies than there are replicas; an
            ``occurrence`` without use.
        DTypeError, ShapeError: an ``occurrence`` that is no integer a row.
    """
    if occurrence is None:
        if ids is None or options.repeats == "same":
            return 0
        occurrence = occurrences(ids)
        if occurrence is None:
            return 0
        if options.repeats == "error":
            _refuse_copies(ids, occurrence)
            return 0
        unchecked = ids.shape[0] * options.most_replicas <= MAX_REPLICA  # so many copies can at most be
    else:
        occurrence = _checked(occurrence, ids, options)
        unchecked = not _checks.on_plain_cpu(occurrence)
    if not unchecked and occurrence.numel():
        least, most = (int(bound) for bound in occurrence.aminmax())
        if least < 0 or (most + 1) * options.most_replicas > MAX_REPLICA:
            raise ArgumentError(
                f"{_OP}: copies of a sample id are told apart by their replicas, 2**16 of them: with replicas="
                f"{options.most_replicas} occurrence must be in [0, {MAX_REPLICA // options.most_replicas}), got "
                f"{least if least < 0 else most}; make smaller batches"
            )
    return occurrence * options.most_replicas  # type: ignore[no-any-return]


def _refuse_copies(ids: Tensor, occurrence: Tensor) -> None:
    twice = ids[occurrence > 0].tolist()
    if twice:
        raise ArgumentError(
            f'{_OP}: sample id {twice[0]} occurs twice in one batch, which repeats="error" refuses; draw batches '
            'without replacement, or use repeats="distinct", which gives each copy noise of its own'
        )


def _checked(occurrence: Any, ids: Tensor | None, options: SamplerOptions) -> Tensor:
    if ids is None:
        raise ArgumentError(f"{_OP}: occurrence= tells copies of one sample id apart: pass sample_ids=, too")
    if options.repeats != "distinct":
        raise ArgumentError(
            f"{_OP}: occurrence= gives copies noise of their own, repeats={options.repeats!r} does not; leave one out"
        )
    whole = isinstance(occurrence, Tensor) and not (
        occurrence.is_floating_point() or occurrence.is_complex() or occurrence.dtype == torch.bool
    )
    if not whole:
        found = occurrence.dtype if isinstance(occurrence, Tensor) else type(occurrence).__name__
        raise DTypeError(f"{_OP}: occurrence must be a tensor of integers, got {found}")
    if occurrence.shape != ids.shape:
        raise ShapeError(f"{_OP}: occurrence {tuple(occurrence.shape)} must be {tuple(ids.shape)}, one an example")
    return occurrence.to(torch.int64)  # type: ignore[no-any-return]
