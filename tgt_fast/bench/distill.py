"""Cases of the op noun distill: the soft-label loss on logits, forward and backward.

Bytes: each logit read once and each gradient written once. Loss and gradients are checked at full size: the
loss against a float64 sum over all rows, made in pieces, the gradients on the first rows and the last.
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
from tgt_fast.bench import distill_rivals, rivals
from tgt_fast.bench.case import Call, Case, Check, Result, UnfitError, Work
from tgt_fast.bench.check import arithmetic_bar, edge_rows, relative_error, result_bar

TEMPERATURE: Final = 2.0
_CHECKED_ROWS: Final = 64
_PIECE: Final = 1 << 22  # numbers of float64 that the truth looks at at once
# Rounding to bf16 on the way costs rivals percents; another divergence or reduction is off by far more.
_SAME_LOSS, _SAME_GRADIENT = 0.05, 0.3


@dataclass(frozen=True)
class Spec:
    """The computation of a case."""

    rows: int
    classes: int
    dtype: torch.dtype
    divergence: str = "forward_kl"  # "none": the hard term alone
    teacher_gradient: bool = False
    compiled: bool = True  # torch.compile takes seconds to compile a case
    peak: bool = False

    @property
    def soft(self) -> bool:
        return self.divergence != "none"

    @property
    def op(self) -> str:
        name = f"{self.divergence} + CE" if self.soft else "CE alone"
        return name + (", teacher gradient" if self.teacher_gradient else "")


_CPU_FULL = (
    Spec(1024, 32000, torch.float32, peak=True),
    Spec(1024, 32000, torch.bfloat16),
    Spec(1024, 32000, torch.float32, "reverse_kl"),
    Spec(1024, 32000, torch.float32, "jsd"),
    Spec(1024, 32000, torch.float32, "tvd"),
    Spec(1024, 1000, torch.float32),
    Spec(128, 10, torch.float32),
)
_CPU_QUICK = (
    Spec(64, 4000, torch.float32),
    Spec(64, 4000, torch.bfloat16, "jsd"),
    Spec(64, 1000, torch.float32, teacher_gradient=True),
    Spec(128, 10, torch.float32, "tvd"),
)
_BF16 = torch.bfloat16
_CUDA_FULL = (
    *(Spec(8192, classes, _BF16) for classes in (32000, 128256, 151936)),
    *(Spec(8192, c, _BF16, teacher_gradient=True, compiled=c == 128256) for c in (32000, 128256, 151936)),
    *(
        Spec(8192, classes, _BF16, divergence, compiled=classes == 128256)
        for divergence in ("reverse_kl", "jsd", "tvd")
        for classes in (32000, 128256, 151936)
    ),
    Spec(8192, 128256, _BF16, "none", compiled=False),
    Spec(8192, 32000, torch.float32, compiled=False),
    Spec(4096, 1000, _BF16),
    Spec(256, 10, _BF16),
)
_CUDA_QUICK = (
    Spec(8192, 32000, _BF16),
    Spec(8192, 32000, _BF16, "jsd", compiled=False),
    Spec(4096, 1000, _BF16, compiled=False),
)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    on_cuda, on_cpu = (_CUDA_QUICK, _CPU_QUICK) if quick else (_CUDA_FULL, _CPU_FULL)
    return [case(spec, device) for spec in (on_cuda if device.type == "cuda" else on_cpu)]


def case(spec: Spec, device: torch.device) -> Case:
    matrix = spec.rows * spec.classes * spec.dtype.itemsize
    matrices = (3 + spec.teacher_gradient) if spec.soft else 2
    numbers: dict[str, int | str | bool] = {
        "rows": spec.rows,
        "classes": spec.classes,
        "divergence": spec.divergence,
        "teacher_gradient": spec.teacher_gradient,
    }
    return Case(
        noun="distill",
        op=spec.op,
        shape=f"{spec.rows} x {spec.classes}",
        dtype=spec.dtype,
        device=device,
        bytes_moved=matrices * matrix,
        # A device that runs out says so and loses one row; a CPU's process is killed, so its estimate is eager's.
        bytes_needed=(5 if device.type == "cuda" else 10) * matrix + (2 << 30 if device.type == "cuda" else 1 << 29),
        unit_bytes=matrix,
        build=lambda: DistillWork(spec, device),
        rivals=rivals.ALL,
        numbers=numbers,
        compiled=spec.compiled,
        peak=spec.peak,
    )


def our_loss(student: Tensor, teacher: Tensor, target: Tensor, spec: Spec, backend: str) -> Tensor:
    """The work that is timed."""
    return _loss(student, teacher, target, spec, backend, "mean")


def _loss(student: Tensor, teacher: Tensor, target: Tensor, spec: Spec, backend: str, reduction: str) -> Tensor:
    return tgt.distillation_loss(
        student, teacher, target, divergence=spec.divergence if spec.soft else "forward_kl", temperature=TEMPERATURE,
        soft_weight=float(spec.soft), hard_weight=1.0, reduction=reduction, backend=backend,
    )  # fmt: skip


class DistillWork(Work):
    """Logits, some rows of them peaked, since flat rows alone hide errors of large probabilities."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        generator = torch.Generator(device).manual_seed(0)

        def logits() -> Tensor:  # in place: no temporary of this size comes before the peak that is measured
            made = torch.empty(spec.rows, spec.classes, dtype=spec.dtype, device=device)
            made.normal_(0.0, 2.0, generator=generator)
            made[1::16].mul_(4.0)
            return made

        self.student = logits().requires_grad_()
        self.teacher = logits().requires_grad_(spec.teacher_gradient)
        self.target = torch.randint(0, spec.classes, (spec.rows,), generator=generator, device=device)
        self.operands = (self.student, self.teacher)
        self.result_bytes = sum(t.numel() * t.element_size() for t in self.operands if t.requires_grad)

    def ours(self, backend: str) -> Call:
        return self._step(functools.partial(our_loss, spec=self.spec, backend=backend))

    def rival(self, name: str) -> Call:
        loss = distill_rivals.loss_of(name, self.spec.divergence, TEMPERATURE)
        if self.spec.teacher_gradient and name not in (rivals.EAGER, rivals.COMPILE):
            raise UnfitError("has no gradient to the teacher's logits")
        return self._step(rivals.compiled(loss) if name == rivals.COMPILE else loss)

    def forget(self) -> None:
        self.student.grad = self.teacher.grad = None

    def check(self, result: Result) -> Check:
        spec = self.spec
        loss, grads, largest = self._truth
        wide = spec.dtype == torch.float64
        errors = {"loss": relative_error(result["loss"], loss, self._floor_loss)}
        bars = {"loss": arithmetic_bar(wide, largest)}
        for name, truth in grads.items():
            floor = self._floor_gradient(truth)
            errors[name] = relative_error(self._edges(result[name]), truth, floor)
            bars[name] = result_bar(spec.dtype, truth, floor, largest)
        return Check(errors, bars)

    def compare(self, result: Result) -> Check:
        loss, grads, _ = self._truth
        errors = {"loss": relative_error(result["loss"], loss, self._floor_loss)}
        bars = {"loss": _SAME_LOSS}
        for name, truth in grads.items():
            errors[name] = relative_error(self._edges(result[name]), truth, self._floor_gradient(truth))
            bars[name] = _SAME_GRADIENT
        return Check(errors, bars)

    def _step(self, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        def step() -> Result:
            self.forget()
            loss = loss_of(self.student, self.teacher, self.target)
            loss.backward()  # type: ignore[no-untyped-call]
            result = {"loss": loss.detach()}
            for name, leaf in (("d_student", self.student), ("d_teacher", self.teacher)):
                if leaf.grad is not None:
                    result[name] = leaf.grad
            return result

        return step

    @property
    def _edge_rows(self) -> Tensor:
        return edge_rows(self.spec.rows, _CHECKED_ROWS).to(self.student.device)

    def _edges(self, matrix: Tensor) -> Tensor:
        return matrix.index_select(0, self._edge_rows)

    @property
    def _floor_loss(self) -> float:
        # 1e-2 T^2 a row; rows err independently, and the mean divides.
        return 1e-2 * self._temperature**2 / math.sqrt(self.spec.rows)

    def _floor_gradient(self, truth: Tensor) -> float:
        return 1e-2 * self._temperature * math.sqrt(truth.shape[0]) / self.spec.rows

    @property
    def _temperature(self) -> float:
        return TEMPERATURE if self.spec.soft else 1.0

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, dict[str, Tensor], float]:
        """The float64 loss over all rows, the gradients at the edge rows, and the largest argument of exp there."""
        spec = self.spec

        def total(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
            return _loss(student, teacher, target, spec, "reference", "sum") / spec.rows

        student, teacher = self.student.detach(), self.teacher.detach()
        step = max(1, _PIECE // spec.classes)
        with torch.no_grad():
            loss = torch.zeros((), dtype=torch.float64, device=student.device)
            largest = 0.0
            for row in range(0, spec.rows, step):
                piece = slice(row, row + step)
                ours, theirs = student[piece].double(), teacher[piece].double()
                loss += total(ours, theirs, self.target[piece])
                largest = max(largest, float(ours.abs().amax()), float(theirs.abs().amax()) / TEMPERATURE)
        leaves = {"d_student": self._edges(student).double().requires_grad_()}
        other = self._edges(teacher).double().requires_grad_(spec.teacher_gradient)
        if spec.teacher_gradient:
            leaves["d_teacher"] = other
        with torch.enable_grad():
            part = total(leaves["d_student"], other, self._edges(self.target))
            grads = torch.autograd.grad(part, list(leaves.values()))
        return loss, dict(zip(leaves, grads, strict=True)), largest
