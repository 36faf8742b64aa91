"""Cases of the op listwise: Plackett-Luce distillation with labels, forward and backward.

Bytes: the logits of both sides read once, the student's gradient written once. The rival is what users write in
PyTorch: sort, gather, a log-cumsum-exp from the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.bench import rivals
from tgt_fast.bench.case import Call, Case, Check, Result, Work
from tgt_fast.bench.check import arithmetic_bar, edge_rows, relative_error, result_bar

_CHECKED_ROWS: Final = 32
_SAME_LOSS, _SAME_GRADIENT = 0.05, 0.3


@dataclass(frozen=True)
class Spec:
    """The computation of a case."""

    rows: int
    classes: int
    dtype: torch.dtype


_CPU_FULL = (Spec(1024, 1000, torch.float32), Spec(1024, 1000, torch.bfloat16), Spec(64, 32000, torch.float32))
_CPU_QUICK = (Spec(64, 1000, torch.float32),)
_CUDA_FULL = (Spec(8192, 1000, torch.bfloat16), Spec(4096, 32000, torch.bfloat16))
_CUDA_QUICK = _CUDA_FULL[:1]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    on_cuda, on_cpu = (_CUDA_QUICK, _CPU_QUICK) if quick else (_CUDA_FULL, _CPU_FULL)
    return [case(spec, device) for spec in (on_cuda if device.type == "cuda" else on_cpu)]


def case(spec: Spec, device: torch.device) -> Case:
    matrix = spec.rows * spec.classes * spec.dtype.itemsize
    return Case(
        noun="listwise",
        op="labels",
        shape=f"{spec.rows} x {spec.classes}",
        dtype=spec.dtype,
        device=device,
        bytes_moved=3 * matrix,
        bytes_needed=24 * matrix + (1 << 29),
        unit_bytes=matrix,
        build=lambda: ListwiseWork(spec, device),
        rivals=(rivals.EAGER,),  # a sort leaves torch.compile nothing to fuse
        numbers={"rows": spec.rows, "classes": spec.classes},
    )


def plain_listwise(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The computation of a rival."""
    student, teacher = student.float(), teacher.float()
    order = teacher.scatter(1, target[:, None], math.inf).argsort(dim=-1, descending=True)
    ranked, weights = student.gather(1, order), teacher.softmax(-1).gather(1, order)
    suffix = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return (weights * (suffix - ranked)).sum(-1).mean()


class ListwiseWork(Work):
    """Logits of a student and a teacher, and labels."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        generator = torch.Generator(device).manual_seed(0)
        shape = (spec.rows, spec.classes)
        self.student = torch.empty(shape, dtype=spec.dtype, device=device).normal_(0.0, 2.0, generator=generator)
        self.student[1::16].mul_(4.0)
        self.teacher = torch.empty(shape, dtype=spec.dtype, device=device).normal_(0.0, 2.0, generator=generator)
        self.target = torch.randint(spec.classes, (spec.rows,), device=device, generator=generator)
        self.student.requires_grad_()
        self.operands = (self.student, self.teacher)
        self.result_bytes = self.student.numel() * self.student.element_size()

    def ours(self, backend: str) -> Call:
        return self._step(
            lambda: tgt.listwise_distillation_loss(self.student, self.teacher, self.target, backend=backend)
        )

    def rival(self, name: str) -> Call:
        return self._step(lambda: plain_listwise(self.student, self.teacher, self.target))

    def forget(self) -> None:
        self.student.grad = None

    def check(self, result: Result) -> Check:
        return self._compare(result, None)

    def compare(self, result: Result) -> Check:
        return self._compare(result, (_SAME_LOSS, _SAME_GRADIENT))

    def _compare(self, result: Result, bars: tuple[float, float] | None) -> Check:
        loss, grad = self._truth()
        largest = float(self.student.detach().abs().amax())
        floor_loss = 1e-2 / math.sqrt(self.spec.rows)
        floor_grad = 1e-2 * math.sqrt(grad.shape[0]) / self.spec.rows
        made = result["d_student"].index_select(0, self._edges)
        errors = {
            "loss": relative_error(result["loss"], loss, floor_loss),
            "d_student": relative_error(made, grad, floor_grad),
        }
        if bars is None:
            wide = self.spec.dtype == torch.float64
            bars = (arithmetic_bar(wide, largest), result_bar(self.spec.dtype, grad, floor_grad, largest))
        return Check(errors, dict(zip(errors, bars, strict=True)))

    def _step(self, loss_of: Callable[[], Tensor]) -> Call:
        def step() -> Result:
            self.forget()
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            assert self.student.grad is not None
            return {"loss": loss.detach(), "d_student": self.student.grad}

        return step

    @property
    def _edges(self) -> Tensor:
        return edge_rows(self.spec.rows, _CHECKED_ROWS).to(self.student.device)

    @functools.cache  # noqa: B019, as long as the work itself
    def _truth(self) -> tuple[Tensor, Tensor]:
        """The float64 loss over all rows, made in pieces, and the gradient at the edge rows."""
        rows, total = self.spec.rows, torch.zeros((), dtype=torch.float64, device=self.student.device)
        for row in range(0, rows, 64):
            piece = slice(row, row + 64)
            total += self._exact(self.student.detach()[piece].double(), piece) / rows
        leaf = self.student.detach().index_select(0, self._edges).double().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self._exact(leaf, self._edges) / rows, leaf)
        return total, grad

    def _exact(self, student: Tensor, at: slice | Tensor) -> Tensor:
        return tgt.listwise_distillation_loss(
            student, self.teacher[at], self.target[at], reduction="sum", backend="reference"
        )
