"""Cases of the op noun linear: the soft-label loss from hidden states and heads, forward and backward.

The floor is arithmetic: ``numbers["flops"]``, 2 N C (3 Hs + Ht) where a student and its head are trained. Bytes: heads
and hidden states read once, gradients written once. Loss and gradients are checked at full size: the loss against a
float64 sum over all rows, made in pieces, gradients on the first and last rows of hidden states and of heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.bench import linear_rivals, rivals
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
    student_hidden: int
    teacher_hidden: int
    classes: int
    dtype: torch.dtype
    divergence: str = "forward_kl"
    frozen: bool = False  # gradients to both sides' hidden states through frozen heads, as exploration wants them
    k: int = 0  # > 0: the teacher is a record of so many classes (linear_record.py)
    compiled: bool = True
    peak: bool = False

    @property
    def op(self) -> str:
        record = f", record of {self.k}" if self.k else ""
        return f"{self.divergence} + CE" + (", frozen heads" if self.frozen else "") + record

    @property
    def flops(self) -> int:
        student, teacher = (
            2 * self.rows * self.classes * width for width in (self.student_hidden, self.teacher_hidden)
        )
        if self.k:
            return 3 * student
        return 2 * student + 2 * teacher if self.frozen else 3 * student + teacher


_F32, _BF16 = torch.float32, torch.bfloat16
_CPU_FULL = (
    Spec(2048, 256, 256, 32000, _F32, peak=True),
    Spec(2048, 256, 256, 32000, _F32, "jsd", compiled=False),
    Spec(2048, 256, 256, 32000, _F32, frozen=True, compiled=False),
    Spec(1024, 256, 256, 32000, _BF16, compiled=False),
    Spec(2048, 256, 256, 32000, _F32, k=64, compiled=False),
    Spec(256, 64, 64, 1000, _F32, compiled=False),
)
_CPU_QUICK = (
    Spec(64, 32, 48, 4000, _F32),
    Spec(64, 32, 48, 4000, _BF16, "jsd"),
    Spec(64, 32, 48, 1000, _F32, frozen=True),
    Spec(64, 32, 48, 4000, _F32, k=16),
)
_CUDA_FULL = (
    Spec(8192, 4096, 4096, 128256, _BF16),
    Spec(8192, 2048, 4096, 32000, _BF16),
    Spec(8192, 2048, 4096, 151936, _BF16, compiled=False),
    Spec(8192, 4096, 4096, 128256, _BF16, "jsd", compiled=False),
    Spec(8192, 4096, 4096, 128256, _BF16, frozen=True, compiled=False),
    Spec(8192, 4096, 4096, 128256, _BF16, k=64, compiled=False),
)
_CUDA_QUICK = (Spec(2048, 2048, 2048, 32000, _BF16), Spec(2048, 2048, 2048, 32000, _BF16, frozen=True, compiled=False))


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    on_cuda, on_cpu = (_CUDA_QUICK, _CPU_QUICK) if quick else (_CUDA_FULL, _CPU_FULL)
    return [case(spec, device) for spec in (on_cuda if device.type == "cuda" else on_cpu)]


def case(spec: Spec, device: torch.device) -> Case:
    logits = spec.rows * spec.classes * spec.dtype.itemsize
    students, teachers = ((spec.rows + spec.classes) * width for width in (spec.student_hidden, spec.teacher_hidden))
    written = spec.rows * (spec.student_hidden + spec.teacher_hidden) if spec.frozen else students
    moved = (students + (0 if spec.k else teachers) + written) * spec.dtype.itemsize + spec.rows * spec.k * 12
    return Case(
        noun="linear",
        op=spec.op,
        shape=f"{spec.rows} x ({spec.student_hidden}, {spec.teacher_hidden}) x {spec.classes}",
        dtype=spec.dtype,
        device=device,
        bytes_moved=moved,
        # A device that runs out says so and loses one row; a CPU's process is killed, so its estimate is eager's.
        bytes_needed=2 * moved + (4 << 30 if device.type == "cuda" else 10 * logits + (1 << 29)),
        unit_bytes=logits,
        build=lambda: (RecordWork if spec.k else LinearWork)(spec, device),
        rivals=linear_rivals.ALL,
        numbers={
            "rows": spec.rows, "student_hidden": spec.student_hidden, "teacher_hidden": spec.teacher_hidden,
            "classes": spec.classes, "divergence": spec.divergence, "frozen": spec.frozen, "k": spec.k,
            "flops": spec.flops,
        },
        compiled=spec.compiled,
        peak=spec.peak,
        kernels="topk" if spec.k else "",
    )  # fmt: skip


def our_loss(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, target: Tensor, *, spec: Spec, backend: str
) -> Tensor:
    """The work that is timed."""
    return tgt.linear_distillation_loss(
        hidden, weight, teacher, teacher_weight, target, divergence=spec.divergence, temperature=TEMPERATURE,
        hard_weight=1.0, backend=backend,
    )  # fmt: skip


class LinearWork(Work):
    """Hidden states and heads whose logits have a standard deviation of 2, of 8 in every sixteenth row."""

    temperature = TEMPERATURE
    scale = 1.0  # of both sides' logits

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, width: int, size: float) -> Tensor:
            made = torch.empty(rows, width, dtype=spec.dtype, device=device)
            return made.normal_(0.0, size, generator=generator)

        def side(width: int) -> tuple[Tensor, Tensor]:
            hidden = normal(spec.rows, width, 2.0)
            hidden[1::16].mul_(4.0)
            return hidden, normal(spec.classes, width, 1.0 / math.sqrt(width))

        self.hidden, self.weight = side(spec.student_hidden)
        self.teacher, self.teacher_weight = side(spec.teacher_hidden)
        wanted = ("hidden", "teacher") if spec.frozen else ("hidden", "weight")
        self.leaves = {f"d_{name}": getattr(self, name).requires_grad_() for name in wanted}
        self.target = torch.randint(0, spec.classes, (spec.rows,), generator=generator, device=device)
        self.operands = (self.hidden, self.weight, self.teacher, self.teacher_weight)
        self.result_bytes = sum(t.numel() * t.element_size() for t in self.leaves.values())

    def ours(self, backend: str) -> Call:
        return self._step(functools.partial(our_loss, spec=self.spec, backend=backend))

    def rival(self, name: str) -> Call:
        if self.spec.frozen and name not in (rivals.EAGER, rivals.COMPILE, linear_rivals.CHUNKED):
            raise UnfitError("has no gradient to the teacher's hidden states")
        loss = linear_rivals.loss_of(name, self.spec.divergence, self.temperature, self.scale)
        return self._step(rivals.compiled(loss) if name == rivals.COMPILE else loss)

    def forget(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def check(self, result: Result) -> Check:
        loss, grads, largest = self._truth
        errors = {"loss": relative_error(result["loss"], loss, self._floor_loss)}
        bars = {"loss": arithmetic_bar(self.spec.dtype == torch.float64, largest)}
        for name, truth in grads.items():
            floor = self._floor_gradient(truth)
            errors[name] = relative_error(self._edges(result[name]), truth, floor)
            bars[name] = result_bar(self.spec.dtype, truth, floor, largest)
        return Check(errors, bars)

    def compare(self, result: Result) -> Check:
        loss, grads, _ = self._truth
        errors = {"loss": relative_error(result["loss"], loss, self._floor_loss)}
        bars = {"loss": _SAME_LOSS}
        for name, truth in grads.items():
            errors[name] = relative_error(self._edges(result[name]), truth, self._floor_gradient(truth))
            bars[name] = _SAME_GRADIENT
        return Check(errors, bars)

    def _step(self, loss_of: Callable[..., Tensor]) -> Call:
        def step() -> Result:
            self.forget()
            loss = loss_of(*self.operands, self.target)
            loss.backward()  # type: ignore[no-untyped-call]
            result = {"loss": loss.detach()}
            for name, leaf in self.leaves.items():
                if leaf.grad is not None:
                    result[name] = leaf.grad
            return result

        return step

    def _edges(self, matrix: Tensor) -> Tensor:
        return matrix.index_select(0, edge_rows(matrix.shape[0], _CHECKED_ROWS).to(matrix.device))

    @property
    def _floor_loss(self) -> float:
        return 1e-2 * self.temperature**2 / math.sqrt(self.spec.rows)

    def _floor_gradient(self, truth: Tensor) -> float:
        return 1e-2 * self.temperature * self.scale * math.sqrt(truth.shape[0]) / self.spec.rows

    def _teacher_of(self, at: slice, teacher: Tensor, teacher_weight: Tensor) -> Any:
        """The teacher of some rows, for the truth."""
        return (self.scale * (teacher[at] @ teacher_weight.T)).requires_grad_(self.spec.frozen)

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, dict[str, Tensor], float]:
        """The float64 loss over all rows, the gradients at the edges, and the largest argument of exp."""
        spec, device = self.spec, self.hidden.device
        heads: list[Any] = [self.hidden, self.weight, self.teacher, self.teacher_weight]
        hidden, weight, teacher, teacher_weight = (x.detach().double() for x in heads)
        classes = edge_rows(spec.classes, _CHECKED_ROWS).to(device)
        loss, largest = torch.zeros((), dtype=torch.float64, device=device), 0.0
        d_hidden, d_teacher = torch.zeros_like(hidden), torch.zeros_like(teacher)
        d_weight = torch.zeros(len(classes), spec.student_hidden, dtype=torch.float64, device=device)
        step = max(1, _PIECE // spec.classes)
        for row in range(0, spec.rows, step):
            at = slice(row, row + step)
            student = (self.scale * (hidden[at] @ weight.T)).requires_grad_()
            other = self._teacher_of(at, teacher, teacher_weight)
            with torch.enable_grad():
                part = tgt.distillation_loss(
                    student, other, self.target[at], divergence=spec.divergence, temperature=self.temperature,
                    hard_weight=1.0, reduction="sum", backend="reference",
                ) / spec.rows  # fmt: skip
                grads = torch.autograd.grad(part, [student, other] if spec.frozen else [student])
            loss += part.detach()
            largest = max(largest, float(student.detach().abs().amax()))
            if isinstance(other, Tensor):
                largest = max(largest, float(other.detach().abs().amax()) / self.temperature)
            d_hidden[at] = self.scale * (grads[0] @ weight)
            d_weight += self.scale * (grads[0][:, classes].T @ hidden[at])
            if spec.frozen:
                d_teacher[at] = self.scale * (grads[1] @ teacher_weight)
        made = {"d_hidden": self._edges(d_hidden), "d_weight": d_weight, "d_teacher": self._edges(d_teacher)}
        return loss, {name: made[name] for name in self.leaves}, largest


class RecordWork(LinearWork):
    """The same, and of the teacher its record alone."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.topk = self._topk_teacher()
        self.operands = (self.hidden, self.weight)

    def ours(self, backend: str) -> Call:
        return self._step(
            lambda hidden, weight, target: tgt.linear_distillation_loss(
                hidden, weight, teacher_logits=self.topk, target=target, divergence=self.spec.divergence,
                temperature=TEMPERATURE, hard_weight=1.0, backend=backend,
            )
        )  # fmt: skip

    def rival(self, name: str) -> Call:
        loss = linear_rivals.loss_of_record(name, self.spec.divergence, TEMPERATURE)
        loss = rivals.compiled(loss) if name == rivals.COMPILE else loss
        record = (self.topk.ids, self.topk.log_probs, self.topk.tail_log_prob)
        return self._step(lambda hidden, weight, target: loss(hidden, weight, *record, target))

    def _topk_teacher(self) -> tgt.TeacherTopK:
        step = max(1, _PIECE // self.spec.classes)
        with torch.no_grad():
            head = self.teacher_weight.float().T
            pieces = [
                tgt.topk_teacher(self.teacher[row : row + step].float() @ head, self.spec.k, TEMPERATURE)
                for row in range(0, self.spec.rows, step)
            ]
        ids, log_probs, rest = (
            torch.cat([getattr(piece, name) for piece in pieces]) for name in ("ids", "log_probs", "tail_log_prob")
        )
        return tgt.TeacherTopK(ids, log_probs, rest, TEMPERATURE, self.spec.classes)

    def _teacher_of(self, at: slice, teacher: Tensor, teacher_weight: Tensor) -> Any:
        return self.topk[at]
