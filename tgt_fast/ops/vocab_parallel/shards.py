"""Which classes each process has, and how the numbers of rows are brought together."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tgt_fast._processes import exchanged
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.ops import _checks
from tgt_fast.ops.counts import counting_group


class Shards(NamedTuple):
    """A process's consecutive classes among those of all, and the process groups over which rows are merged."""

    groups: tuple[str, ...]  # by name; all of them, one after the other
    start: int  # the first class here
    width: int  # how many there are here
    classes: int  # how many there are in all
    widest: int  # of any process

    def largest(self, numbers: Tensor) -> Tensor:
        """Element by element over all processes, the same bits in each."""
        return reduced(numbers, "max", self.groups)

    def total(self, numbers: Tensor) -> Tensor:
        """Element by element over all processes, the same bits in each."""
        return reduced(numbers, "sum", self.groups)


def reduced(numbers: Tensor, operation: str, groups: tuple[str, ...]) -> Tensor:
    """An all-reduce over each of the groups, as an op that a compiler sees."""
    return finished(started(numbers, operation, groups), operation, groups)


def started(numbers: Tensor, operation: str, groups: tuple[str, ...]) -> Tensor:
    """The first of these on its way, while other work is done; what is returned must not be read before the end."""
    if not groups:
        return numbers
    begun: Tensor = torch.ops._c10d_functional.all_reduce(numbers.contiguous(), operation, groups[0])
    return begun


def finished(begun: Tensor, operation: str, groups: tuple[str, ...]) -> Tensor:
    """The result of all, on a CPU once it is there; a device's stream waits for it."""
    ops = torch.ops._c10d_functional
    for group in groups[1:]:
        begun = ops.all_reduce(ops.wait_tensor(begun), operation, group)
    return ops.wait_tensor(begun) if groups else begun  # type: ignore[no-any-return]


def local_target(target: Tensor, options: Any, shards: Shards) -> Tensor:
    """Global labels as this process's: of the classes elsewhere none; what is no class at all is none here either.

    In the plain form: -100 drops a row, -1 its hard term. [N] int64
    """
    here = target - shards.start
    inside = (here >= 0) & (here < shards.width)
    made = torch.where(inside, here, -1)
    known = (target == options.unlabeled_index) | ((target >= 0) & (target < shards.classes))
    # The two indices may be any numbers, those of classes too.
    made = torch.where(target == options.unlabeled_index, -1, torch.where(known, made, shards.width))
    return torch.where(target == options.ignore_index, -100, made)


def shards_of(op: str, group: Any, offsets: Any, width: int) -> Shards | None:
    """The place of this process's ``width`` classes among those of the group; None where it has them all.

    Raises:
        ArgumentError, ShapeError: no process group, one that this process is not in, or offsets that do not fit.
    """
    given = None if offsets is None else _checked_offsets(op, offsets)
    if group is None:
        if given is not None:
            raise ArgumentError(f"{op}: vocab_offsets say which classes a process of vocab_group has; pass it too")
        return None
    group = counting_group(op, group, "vocab_group")
    world = 1 if group is None else torch.distributed.get_world_size(group)
    rank = 0 if group is None else torch.distributed.get_rank(group)
    if world < 1 or rank < 0:
        raise ArgumentError(f"{op}: this process is not in vocab_group")
    if given is not None:
        if len(given) != world + 1:
            raise ShapeError(f"{op}: vocab_offsets must hold {world + 1} numbers for {world} processes, got {given}")
        if given[rank + 1] - given[rank] != width:
            raise ShapeError(
                f"{op}: by vocab_offsets process {rank} has {given[rank + 1] - given[rank]} classes, "
                f"but its tensors have {width}"
            )
    if group is None:
        return None
    if given is None:
        given = _exchanged_offsets(group, width)
    widest = max(b - a for a, b in itertools.pairwise(given))
    return Shards((group.group_name,), given[rank], width, given[-1], widest)


def _checked_offsets(op: str, offsets: Any) -> tuple[int, ...]:
    values = offsets.tolist() if isinstance(offsets, Tensor) and offsets.dim() == 1 else offsets
    if not isinstance(values, (list, tuple)):
        raise ArgumentError(f"{op}: vocab_offsets must be a sequence of integers, got {offsets!r:.200}")
    made = tuple(_checks.integer(op, "vocab_offsets", value, 0, 2**63) for value in values)
    if not made or made[0] != 0 or any(b < a for a, b in itertools.pairwise(made)):
        raise ArgumentError(f"{op}: vocab_offsets must begin with 0 and not fall, got {made}")
    return made


# A compiler calls it once, and takes what it returns for a constant: ``torch.compiler.assume_constant_result``, which
# would import the compiler to say so.
shards_of._dynamo_marked_constant = True  # type: ignore[attr-defined]

# Widths that were exchanged, by the process group they are of.
_WIDTHS: Final[weakref.WeakKeyDictionary[Any, dict[int, tuple[int, ...]]]] = weakref.WeakKeyDictionary()


def _exchanged_offsets(group: Any, width: int) -> tuple[int, ...]:
    """The offsets of all, from the widths of all, which the processes of a group tell each other once."""
    kept = _WIDTHS.setdefault(group, {})
    if width not in kept:
        offsets = [0]
        for one in exchanged(width, group):
            offsets.append(offsets[-1] + one)
        kept[width] = tuple(offsets)
    return kept[width]
