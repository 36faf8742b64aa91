"""What submodules of student and labeler return, seen by hooks while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tgt_fast.errors import ArgumentError
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.parts import modules_of
from tgt_fast.train.parallel import unwrapped

Side = str | nn.Module
Taken = Callable[[int | None], dict[Side, Tensor]]  # the rows that there must be -> features; None: forget them


@contextmanager
def watched(of: str, sides: Iterable[Side], roots: list[nn.Module]) -> Iterator[Taken]:
    """Inside, what the submodules return is kept; each question for it begins anew.

    Args:
        of: the student, or the labeler.
        roots: the modules whose submodules the names name.

    Raises:
        ArgumentError: there is no such submodule; when asked: it did not run, or more often than once a row.
    """
    seen: dict[Side, list[Tensor]] = {side: [] for side in sides}

    def keep(side: Side) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, made: Any) -> None:
            leaves = [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor) and x.is_floating_point()]
            if leaves:
                seen[side].append(leaves[0])

        return hook

    def taken(rows: int | None) -> dict[Side, Tensor]:
        found = {}
        for side, pieces in seen.items():
            if rows is None:
                pieces.clear()
                continue
            count = sum(piece.shape[0] for piece in pieces if piece.dim())
            if not pieces or count != rows:
                how = f"returned {count} rows in {len(pieces)} calls" if pieces else "returned no features"
                raise ArgumentError(
                    f"TGTObjective: {_shown(side)} of the {of} {how} for a batch of {rows}; name a submodule that runs "
                    "once a pass (inside torch.compile hooks see none: compile the parts around it)"
                )
            found[side] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            pieces.clear()
        return found

    handles = [_submodule(of, side, roots).register_forward_hook(keep(side)) for side in seen]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def roots_of_student(student: Any) -> list[nn.Module]:
    model = unwrapped(student)
    return [model] if isinstance(model, nn.Module) else modules_of(model)


def roots_of_labeler(teacher: Teacher) -> list[nn.Module]:
    return [module for labeler in teacher.labelers for module in modules_of(labeler)]


def _submodule(of: str, side: Side, roots: list[nn.Module]) -> nn.Module:
    if isinstance(side, nn.Module):
        return side
    for root in roots:
        try:
            return root.get_submodule(side)
        except AttributeError:
            continue
    raise ArgumentError(f"TGTObjective: the {of} has no submodule {side!r}")


def _shown(side: Side) -> str:
    return repr(side) if isinstance(side, str) else type(side).__name__
