"""Calls of the CUDA kernels that choose how a row is laid on the chip, on an emulated device or on a real one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from numerics import logits, targets
from real_gpu import Mover, tensors_moved_to
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels.native import cuda, cuda_distill
from tgt_fast.kernels.options import DIVERGENCES, DistillOptions, Forward

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


def every_kernel_once(device: torch.device) -> list[Tensor]:
    """Small calls that reach every kernel, for tools that look at each of its accesses."""
    out: list[Tensor | None] = []
    for plan in PLANS.values():
        for dtype, other in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
            # rows start at multiples of 16 bytes, as bulk copies want them, and end in part of a vector
            student, teacher = (
                logits(3, 608, seed, dtype=each).to(device)[:, :603] for seed, each in enumerate((dtype, other))
            )
            target = targets(3, 603, 2).to(device)
            student[1, 5] = teacher[1, 5] = -math.inf
            for divergence in DIVERGENCES:
                options = DistillOptions(divergence=divergence, hard_weight=1.0, label_smoothing=0.1)
                made = planned(
                    student, teacher, target, None, None, options, wanted=(True, True), want_stats=True, plan=plan
                )  # fmt: skip
                out += [made.loss, made.d_student, made.d_teacher, *([] if made.stats is None else [made.stats])]
                placed = planned(
                    student.clone(), teacher, target, None, None, options, wanted=(True, True), inplace=True, plan=plan
                )  # fmt: skip
                out += [placed.loss, placed.d_student]
    for dtype in (torch.float16, torch.float64):
        student = logits(3, 603, 0, dtype=dtype).to(device).requires_grad_()
        weight = torch.tensor([1.0, 0.0, 2.0], device=device)
        for inplace in (False, True):
            loss = tgt.distillation_loss(
                student * 1, logits(3, 603, 1).to(device), sample_weight=weight, inplace=inplace, backend="native"
            )
            out += [loss, *torch.autograd.grad(3 * loss, student)]
    for size in (5, 2000, 20_000, 40_000):  # a warp, a block, clusters of 2 and of 4 a sample
        z = torch.zeros(2, size, device=device)
        moved = tgt.perturb_latents(z, 1.0, seed=3, backend="native")
        ball = tgt.perturb_latents(z, 1.0, seed=3, sphere_radius=2.0, truncation=1.5, backend="native")
        out += [moved, ball]
        out.append(
            tgt.ascend_latents(z, moved, step_size=1.0, sigma=0.1, anchor=z, radius=0.5, seed=3, backend="native")
        )
    out += _of_records(device)
    for dtype in (torch.bfloat16, torch.float64):  # in float and in double; the second draws among equal logits
        x = logits(3, 4099, 0, dtype=dtype).to(device).round(decimals=1 if dtype == torch.float64 else 3)
        for kept in ({}, {"top_k": 50, "top_p": 0.95, "min_p": 0.01}, {"temperature": 0}):
            out.append(tgt.sample_tokens(x, **kept, seed=3, backend="native"))  # type: ignore[arg-type]
    return [tensor for tensor in out if tensor is not None]


def _of_records(device: torch.device) -> list[Tensor]:
    """Rows on the chip, of one block and of clusters, and rows that are streamed, in float and in double."""
    out: list[Tensor] = []
    for dtype, size in ((torch.float32, 603), (torch.bfloat16, 150_000), (torch.float64, 603)):
        student = logits(2, size, 0, dtype=dtype).to(device).requires_grad_()
        teacher = logits(2, size, 1, dtype=dtype).to(device)
        target = targets(2, size, 2).to(device)
        for tail in ("bucket", "renormalize", "uniform"):
            record = tgt.topk_teacher(teacher, 7, 2.0, tail=tail)
            for inplace in (False, True):
                loss = tgt.distillation_loss(
                    student * 1, record, target, temperature=2.0, hard_weight=0.5, inplace=inplace, backend="native"
                )
                out += [loss.detach(), *torch.autograd.grad(3 * loss, student)]
    return out
