"""Work done by several real processes that know each other through gloo."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import forked
from torch import Tensor

needs_processes = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()), reason="no fork, or no torch.distributed"
)


@dataclass(frozen=True)
class Raised:
    """The error of a process, in the place of what it was to give."""

    text: str


def in_processes(world: int, folder: Path, work: Callable[[int], Any], seconds: float = 120) -> list[Any]:
    """The results of ``work(rank)`` in each; a :class:`Raised` where it raised, None of a process that was killed."""
    for name in ("torch._dynamo", "torch.distributed.checkpoint"):  # once, and not in each process that needs them
        importlib.import_module(name)
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store {len(list(folder.iterdir()))}"
    results = [folder / f"{rank}.pt" for rank in range(world)]

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        try:
            made = work(rank)
        except Exception as error:
            made = Raised(f"{type(error).__name__}: {error}")
        torch.save(made, results[rank])
        torch.distributed.destroy_process_group()

    for path in results:
        path.unlink(missing_ok=True)
    processes = [forked(run, rank) for rank in range(world)]
    for process in processes:
        process.join(seconds)
        process.kill()
    return [torch.load(path, weights_only=False) if path.exists() else None for path in results]


def all_made(found: list[Any]) -> list[Any]:
    """The same, where every process must have given something."""
    assert not [one for one in found if one is None or isinstance(one, Raised)], found
    return found


def part(rows: Any, rank: int, world: int) -> Any:
    """A process's rows, of which the first have one more where they do not divide; of a tensor or a container."""
    if isinstance(rows, Tensor):
        return rows.tensor_split(world)[rank]
    return type(rows)(part(one, rank, world) for one in rows)


class Collectives:
    """Inside, the collectives that this process calls through ``torch.distributed``, by name."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier",
             "broadcast_object_list", "reduce_scatter_tensor", "gather", "scatter", "reduce")  # fmt: skip

    def __init__(self) -> None:
        self.called: list[tuple[str, int]] = []  # with the numbers that each moves

    def __enter__(self) -> Collectives:
        self.before = {name: getattr(torch.distributed, name) for name in self.NAMES}
        for name, function in self.before.items():
            setattr(torch.distributed, name, self._counted(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.before.items():
            setattr(torch.distributed, name, function)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            tensors = [one for one in arguments if isinstance(one, Tensor)]
            self.called.append((name, tensors[0].numel() if tensors else 0))
            return function(*arguments, **keywords)

        return call
