"""Calls of the CUDA kernels that choose how a row is laid on the chip, on an emulated device or on a real one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from kernel_calls import forward
from real_gpu import tensors_moved_to
from torch import Tensor

from tgt_fast.kernels.calls import Outputs
from tgt_fast.kernels.native import cuda, distill
from tgt_fast.kernels.native.abi import fields, packer
from tgt_fast.kernels.options import DistillOptions

Plan = tuple[int, int, bool]

# (path, blocks a row, bulk copies) of csrc/cuda/api.h
PLANS: dict[str, Plan] = {
    "a warp": (1, 0, True),
    "a block": (2, 1, False),
    "a block, bulk copies": (2, 1, True),
    "2 blocks, bulk copies": (2, 2, True),
    "4 blocks": (2, 4, False),
    "4 blocks, bulk copies": (2, 4, True),
    "8 blocks, bulk copies": (2, 8, True),
    "streamed": (3, 0, True),
}


class Kernels:
    """The CUDA kernels, for tensors of the host."""

    def __init__(self, within: Callable[[], AbstractContextManager[None]]) -> None:
        self.within = within  # the context in which the native backend runs on the device

    @staticmethod
    def emulated(module: ModuleType) -> Kernels:
        return Kernels(lambda: tensors_on_an_emulated_gpu(module))

    @staticmethod
    def on(device: torch.device) -> Kernels:
        return Kernels(lambda: tensors_moved_to(device))

    def forward(
        self, plan: Plan, student: Tensor, teacher: Tensor, target: Tensor | None = None, *,
        weight: Tensor | None = None, normalizer: float | Tensor | None = None,
        wanted: tuple[bool, bool] = (True, True), inplace: bool = False, want_stats: bool = False, **options: Any,
    ) -> Outputs:  # fmt: skip
        """One pass over the logits, laid out as planned."""
        options.setdefault("teacher_temperature", options.get("temperature", 1.0))
        with self.within():
            return forward(
                distill.forward, student, teacher, target, weight, normalizer, DistillOptions(**options),
                wanted=wanted, inplace=inplace, want_stats=want_stats, plan=plan,
            )  # fmt: skip


def planned(student: Tensor, *arguments: Any, **chosen: Any) -> Outputs:
    """The CUDA side's forward of device tensors, emulated or real."""
    assert cuda.engine(student) is not None
    return forward(distill.forward, student, *arguments, **chosen)


def rows_without_data(core: Any, rows: int) -> bytes:
    """A call of so many rows, whose pointers are null: for a launch that fails."""
    given = {"rows": rows, "classes": 1, "divisor": -1.0, "options.reduction": 2, "options.temperature": 1.0}
    given |= {"options.teacher_temperature": 1.0, "options.soft_weight": 1.0}
    return packer(core, "DistillCall")(*(given.get(name, 0) for name, _ in fields("DistillCall") if name))
