"""A student whose gradients are averaged over processes, by DistributedDataParallel or by FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from tgt_fast._processes import place
from tgt_fast.errors import ArgumentError
from tgt_fast.ops.counts import WORLD

try:
    from torch.nn.parallel import DistributedDataParallel

    Replicated: Any = DistributedDataParallel
except ImportError:  # a PyTorch without torch.distributed
    Replicated = ()


def _sharded_kind() -> Any:
    """The class of FSDP2's modules. Not imported, which takes seconds: where it is not loaded there is none."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def unwrapped(module: Any) -> Any:
    """The model itself, inside what ``torch.compile`` and DistributedDataParallel wrap round it."""
    while True:
        if isinstance(module, Replicated):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", ()):
            module = module._orig_mod
        else:
            return module


class Parallel:
    """The processes that average a student's gradients: ``count`` of them, of which this is number ``rank``."""

    def __init__(self, student: nn.Module) -> None:
        modules, kind = list(student.modules()), _sharded_kind()
        self._replicated = [module for module in modules if isinstance(module, Replicated)]
        self._sharded: list[Any] = [module for module in modules if isinstance(module, kind)]
        self.group: Any = None
        self.rank, self.count = 0, 1
        if self._replicated:
            self.group = self._replicated[0].process_group
        elif self._sharded:
            self.group = _group_of(student)
        if self.group is not None:
            self.rank = torch.distributed.get_rank(self.group)
            self.count = torch.distributed.get_world_size(self.group)

    @property
    def sharded(self) -> bool:
        return bool(self._sharded)

    @contextmanager
    def averaging(self, wanted: bool) -> Iterator[None]:
        """Inside, a backward pass averages over processes, or leaves that to a later one of the same step."""
        if wanted:
            yield
            return
        with ExitStack() as stack:
            for module in self._replicated:
                stack.enter_context(module.no_sync())
            for module in self._sharded:
                module.set_requires_gradient_sync(False, recurse=False)
            try:
                yield
            finally:
                for module in self._sharded:
                    module.set_requires_gradient_sync(True, recurse=False)

    def settle(self) -> None:
        """Parameters that a forward pass without a backward left gathered are shards again."""
        for module in self._sharded:
            module.reshard()

    @contextmanager
    def counting(self, objective: Any) -> Iterator[None]:
        """Inside, an objective that can count over processes, and was not told over which, does so over these."""
        own = getattr(objective, "count_group", None)
        told = own is not None or getattr(getattr(objective, "loss", None), "count_group", None) is not None
        if self.count == 1 or told or not hasattr(objective, "count_group"):
            yield
            return
        objective.count_group = WORLD if self.count == torch.distributed.get_world_size() else self.group
        try:
            yield
        finally:
            objective.count_group = own


def _group_of(student: nn.Module) -> Any:
    meshes = {parameter.device_mesh for parameter in student.parameters() if hasattr(parameter, "device_mesh")}
    world = torch.distributed.get_world_size()
    if not meshes or all(mesh.size() == world for mesh in meshes):
        return torch.distributed.group.WORLD
    if len(meshes) == 1 and (mesh := meshes.pop()).ndim == 1:
        return mesh.get_group()
    raise ArgumentError(
        f"fit: the student is sharded over {sorted(str(mesh) for mesh in meshes)}, of {world} processes; fit takes one "
        "mesh, of one dimension or of all processes"
    )


def only_bar() -> bool:
    """True if this process is the one of its run that shows a bar."""
    return place()[0] == 0
