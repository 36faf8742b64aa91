"""Cases of the op topk: the soft-label loss against a top-k record, forward and backward.

Bytes: the student's logits read once, their gradient written once, and the record. The rivals compute the dense
divergence from the teacher's logits, which is what users do without a record, and are checked against that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.bench import rivals
from tgt_fast.bench.case import Call, Case, Check, Result, UnfitError, Work
from tgt_fast.bench.check import arithmetic_bar, edge_rows, relative_error, result_bar

TEMPERATURE: Final = 2.0
_CHECKED_ROWS: Final = 64
_SAME_LOSS, _SAME_GRADIENT = 0.05, 0.3


@dataclass(frozen=True)
class Spec:
    """The computation of a case."""

    rows: int
    classes: int
    k: int
    dtype: torch.dtype
    divergence: str = "forward_kl"
    tail: str = "bucket"


_CPU_FULL = (
    Spec(1024, 32000, 64, torch.float32),
    Spec(1024, 32000, 64, torch.bfloat16),
    Spec(1024, 32000, 64, torch.float32, "jsd", "uniform"),
)
_CPU_QUICK = (Spec(64, 4000, 64, torch.float32),)
_CUDA_FULL = tuple(Spec(8192, classes, 64, torch.bfloat16) for classes in (32000, 128256, 151936))
_CUDA_QUICK = (Spec(8192, 32000, 64, torch.bfloat16),)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    on_cuda, on_cpu = (_CUDA_QUICK, _CPU_QUICK) if quick else (_CUDA_FULL, _CPU_FULL)
    return [case(spec, device) for spec in (on_cuda if device.type == "cuda" else on_cpu)]


def case(spec: Spec, device: torch.device) -> Case:
    matrix = spec.rows * spec.classes * spec.dtype.itemsize
    return Case(
        noun="topk",
        op=f"{spec.divergence}, {spec.tail}",
        shape=f"{spec.rows} x {spec.classes}, k {spec.k}",
        dtype=spec.dtype,
        device=device,
        bytes_moved=2 * matrix + spec.rows * (spec.k * 12 + 4),
        bytes_needed=10 * matrix + (1 << 29),
        unit_bytes=matrix,
        build=lambda: TopKWork(spec, device),
        rivals=(rivals.EAGER, rivals.COMPILE),
        numbers={"rows": spec.rows, "classes": spec.classes, "k": spec.k, "divergence": spec.divergence},
    )


def dense_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The computation of a rival."""
    q, p = (x.float().div(TEMPERATURE).log_softmax(-1) for x in (student, teacher))
    return TEMPERATURE**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


class TopKWork(Work):
    """Logits of a student, and the record of a teacher that resembles it."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        generator = torch.Generator(device).manual_seed(0)
        shape = (spec.rows, spec.classes)
        self.student = torch.empty(shape, dtype=spec.dtype, device=device).normal_(0.0, 2.0, generator=generator)
        self.student[1::16].mul_(4.0)
        self.teacher = torch.empty(shape, dtype=spec.dtype, device=device).normal_(0.0, 2.0, generator=generator)
        self.student.requires_grad_()
        self.record = tgt.topk_teacher(self.teacher, spec.k, TEMPERATURE, tail=spec.tail)
        self.operands = (self.student,)
        self.result_bytes = self.student.numel() * self.student.element_size()

    def ours(self, backend: str) -> Call:
        return self._step(lambda: self._loss(self.student, self.record, backend, "mean"))

    def rival(self, name: str) -> Call:
        if self.spec.divergence != "forward_kl":
            raise UnfitError("is measured on forward_kl alone")
        loss = rivals.compiled(dense_kl) if name == rivals.COMPILE else dense_kl
        return self._step(lambda: loss(self.student, self.teacher))

    def forget(self) -> None:
        self.student.grad = None

    def check(self, result: Result) -> Check:
        return self._compare(result, self._truth(self.record), None)

    def compare(self, result: Result) -> Check:
        return self._compare(result, self._truth(self.teacher), (_SAME_LOSS, _SAME_GRADIENT))

    def _compare(self, result: Result, truth: tuple[Tensor, Tensor], bars: tuple[float, float] | None) -> Check:
        loss, grad = truth
        largest = float(self.student.detach().abs().amax()) / TEMPERATURE
        floor_loss = 1e-2 * TEMPERATURE**2 / math.sqrt(self.spec.rows)
        floor_grad = 1e-2 * TEMPERATURE * math.sqrt(grad.shape[0]) / self.spec.rows
        made = result["d_student"].index_select(0, self._edges)
        errors = {
            "loss": relative_error(result["loss"], loss, floor_loss),
            "d_student": relative_error(made, grad, floor_grad),
        }
        if bars is None:
            wide = self.spec.dtype == torch.float64
            bars = (arithmetic_bar(wide, largest), result_bar(self.spec.dtype, grad, floor_grad, largest))
        return Check(errors, dict(zip(errors, bars, strict=True)))

    def _loss(self, student: Tensor, teacher: tgt.TeacherTopK | Tensor, backend: str, reduction: str) -> Tensor:
        return tgt.distillation_loss(
            student, teacher, divergence=self.spec.divergence, temperature=TEMPERATURE, reduction=reduction,
            backend=backend,
        )  # fmt: skip

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
    def _truth(self, teacher: tgt.TeacherTopK | Tensor) -> tuple[Tensor, Tensor]:
        """The float64 loss over all rows, made in pieces, and the gradient at the edge rows."""
        total = torch.zeros((), dtype=torch.float64, device=self.student.device)
        rows = self.spec.rows
        with torch.no_grad():
            for row in range(0, rows, 64):
                piece = slice(row, row + 64)
                total += self._loss(self.student[piece].double(), teacher[piece], "reference", "sum") / rows
        leaf = self.student.detach().index_select(0, self._edges).double().requires_grad_()
        with torch.enable_grad():
            part = self._loss(leaf, teacher[self._edges], "reference", "sum") / rows
            (grad,) = torch.autograd.grad(part, leaf)
        return total, grad
