"""Calls of the CUDA kernels that choose how a row is laid on the chip, on an emulated device or on a real one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from real_gpu import Mover, tensors_moved_to
from torch import Tensor

from tgt_fast.kernels.native import cuda, cuda_distill
from tgt_fast.kernels.options import DistillOptions, Forward

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

    def __init__(self, within: Callable[[], AbstractContextManager[None]], mover: Mover | None) -> None:
        self.within = within  # the context in which the native backend runs on the device
        self._mover = mover

    @staticmethod
    def emulated(module: ModuleType) -> Kernels:
        return Kernels(lambda: tensors_on_an_emulated_gpu(module), None)

    @staticmethod
    def on(device: torch.device) -> Kernels:
        return Kernels(lambda: tensors_moved_to(device), Mover(device))

    def forward(
        self, plan: Plan, student: Tensor, teacher: Tensor, target: Tensor | None = None, *,
        weight: Tensor | None = None, normalizer: float | Tensor | None = None,
        wanted: tuple[bool, bool] = (True, True), inplace: bool = False, want_stats: bool = False, **options: Any,
    ) -> Forward:  # fmt: skip
        """One pass over the logits, laid out as planned."""
        options.setdefault("teacher_temperature", options.get("temperature", 1.0))
        arguments = (student, teacher, target, weight, normalizer, DistillOptions(**options))
        chosen: dict[str, Any] = {
            "wanted": wanted, "keep_rows": True, "inplace": inplace, "want_stats": want_stats, "plan": plan,
        }  # fmt: skip
        if self._mover is not None:
            return self._mover.of_student(planned)(*arguments, **chosen)  # type: ignore[no-any-return]
        with self.within():
            return planned(*arguments, **chosen)


def planned(student: Tensor, *arguments: Any, **chosen: Any) -> Forward:
    """The CUDA side's forward of device tensors, emulated or real."""
    engine = cuda.engine(student)
    assert engine is not None
    return cuda_distill.forward(engine, student, *arguments, **chosen)
