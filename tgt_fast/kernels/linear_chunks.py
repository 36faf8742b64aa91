"""The distillation loss from hidden states, a chunk of rows at a time: no N x C logits, whatever N.

A chunk's logits are made by PyTorch's matrix product, its row losses and the gradients of its logits by the distill
kernel of a backend (in place, where the logits are not needed any more), the gradients of hidden states and heads by
products again. What the kernel takes for a teacher's chunk is what the teacher's side gives: logits, or a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels import memory
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import Direct, DistillCall, Outputs
from tgt_fast.kernels.linear_call import result_dtype, row_weights, same_as_own, topk_of, vocabulary_of
from tgt_fast.kernels.linear_heads import Head, LogitsTeacher, RemappedTeacher, TopKTeacher
from tgt_fast.kernels.options import (
    DIFFERENTIABLE,
    DistillOptions,
    LinearForward,
    LinearOptions,
    LinearTensors,
    TopK,
)
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.kernels.record_stats import record_stats
from tgt_fast.kernels.vocabulary import Vocabulary

CPU_BUDGET: Final = 64 << 20  # bytes
DEVICE_BUDGET: Final = 2 << 30

# The next chunk's product beside this chunk's row kernel, on a second stream. Not yet run on a GPU, so it is off.
OVERLAP = False


def overlaps(device: torch.device) -> bool:
    return OVERLAP and device.type == "cuda"


def forward(
    kernel: Direct,
    tensors: LinearTensors,
    divisor: float | Tensor | None,
    heads: LinearOptions,
    options: DistillOptions,
    *,
    wanted: tuple[bool, ...] = (False,) * DIFFERENTIABLE,  # gradients to the first of the tensors
    want_stats: bool = False,
    upstream: Tensor | None = None,  # 0-d, or [N]; None: 1
    widest: int | None = None,  # classes, of any of the processes that must make the same chunks; None: those here
    together: Callable[[list[Tensor]], None] | None = None,  # given each chunk's gradients of hidden states
    adjust: Adjustments | None = None,
) -> LinearForward:
    """Row losses, their reduction and the wanted gradients."""
    vocabulary = vocabulary_of(tensors, heads)
    target, weight = vocabulary.without_missing(tensors.target, options.ignore_index), tensors.sample_weight
    weights = row_weights(tensors, target, vocabulary.classes, divisor, options)
    if options.reduction == "mean" and divisor is None:  # that of all rows, not of a chunk's
        divisor = float(tensors.student_hidden.shape[0]) if weights is None else weights.sum()
    counted = None if weights is None else weights != 0
    # How large the gradients of adjusted logits may be is not known beforehand.
    chunked = ChunkedLoss(tensors, vocabulary, counted, heads, wanted, casts=adjust is None)
    if upstream is not None:
        upstream = upstream.detach().to(chunked.dtype).expand(tensors.student_hidden.shape[0])[:, None]
    if chunked.casts_grad:
        coefficient = weights
        if coefficient is None:
            coefficient = torch.ones((), device=chunked.device).expand(tensors.student_hidden.shape[0])
        coefficient = coefficient if divisor is None else coefficient / divisor
        chunked.set_row_scale(coefficient if upstream is None else coefficient * upstream[:, 0], options)
    parts: list[Outputs] = []
    for chunk in chunked.chunks(widest):
        call = DistillCall(
            options, chunk.student, chunk.teacher, None if target is None else target[chunk.at],
            None if weight is None else weight[chunk.at], divisor, *chunked.wanted_logits, want_stats=want_stats,
            inplace=chunked.inplace, adjust=None if adjust is None else adjust.of_rows(chunk.at),
        )  # fmt: skip
        stats = None
        if want_stats and isinstance(chunk.teacher, TopK):  # before the logits are overwritten in place
            stats = record_stats(chunk.student, chunk.teacher, *call[3:6], options, chunked.dtype)
            call = call._replace(want_stats=False)
        made = kernel.forward(call)
        for grad in (made.d_student, made.d_teacher):
            if grad is not None and upstream is not None:
                grad.mul_(upstream[chunk.at])
        chunked.accumulate_grad(chunk, made.d_student, made.d_teacher)
        if together is not None:
            together(chunked.hidden_grads(chunk.at))
        parts.append(Outputs(made.loss, made.stats if stats is None else stats))
    losses = [part.loss for part in parts]
    loss = torch.cat(losses) if options.reduction == "none" else torch.stack(losses).sum(dtype=torch.float64)
    stats = torch.cat([part.stats for part in parts if part.stats is not None], dim=1) if want_stats else None
    return LinearForward(loss.to(chunked.dtype), chunked.grads(), stats)


def backward(
    kernel: Direct,
    tensors: LinearTensors,
    divisor: float | Tensor | None,
    d_loss: Tensor,  # 0-d, or [N]
    heads: LinearOptions,
    options: DistillOptions,
    *,
    wanted: tuple[bool, ...],
    adjust: Adjustments | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients anew, with the upstream gradient applied to those of the logits, before any rounding."""
    return forward(kernel, tensors, divisor, heads, options, wanted=wanted, upstream=d_loss, adjust=adjust).grads


class _Chunk(NamedTuple):
    at: slice
    slot: int
    student: Tensor  # [rows, C] our own memory
    teacher: Tensor | TopK  # [rows, C], or the rows of a record
    missing: Tensor | None  # [C] or [rows, C] bool, the classes that do not exist


class ChunkedLoss:
    """Both sides of a call, its chunks, and the gradients it gathers."""

    def __init__(
        self, t: LinearTensors, vocabulary: Vocabulary, counted: Tensor | None, heads: LinearOptions,
        wanted: tuple[bool, ...], casts: bool = True,
    ) -> None:  # fmt: skip
        self.device = t.student_hidden.device
        self.dtype = result_dtype(t)
        self._traced = type(t.student_hidden) not in PLAIN  # a tracer must see where memory comes from
        self._count = t.student_hidden.shape[0]
        self._classes, self._missing = vocabulary.classes, vocabulary.missing
        default = CPU_BUDGET if self.device.type == "cpu" else DEVICE_BUDGET
        self._budget = default if heads.memory_budget is None else heads.memory_budget
        self._class_ids, self._own_class = t.class_ids, t.own_class
        self._student = Head(
            t.student_hidden, t.student_weight, t.student_bias, heads.student_scale, heads.student_softcap,
            vocabulary.classes, counted, self.dtype, wanted[:3], self._empty, self._budget,
        )  # fmt: skip
        self._teacher: Head | LogitsTeacher | RemappedTeacher | TopKTeacher
        topk = topk_of(t, heads)
        if topk is not None:
            self._teacher = TopKTeacher(topk, None if heads.topk_classes is None else vocabulary)
        elif t.teacher_weight is None:
            self._teacher = LogitsTeacher(t.teacher, vocabulary.teacher_classes, wanted[3])
        else:
            self._teacher = Head(
                t.teacher, t.teacher_weight, t.teacher_bias, heads.teacher_scale, heads.teacher_softcap,
                vocabulary.teacher_classes, counted, self.dtype, wanted[3:], self._empty, self._budget,
            )  # fmt: skip
        for side in (self._student, self._teacher):
            if isinstance(side, Head):
                side.casts_grad = side.casts_grad and casts
        self._own_teacher = t.teacher_weight is not None or vocabulary.source is not None
        source, back, unused = vocabulary.source, vocabulary.back, vocabulary.unused
        if topk is None and source is not None and back is not None and unused is not None:
            assert not isinstance(self._teacher, TopKTeacher)
            self._teacher = RemappedTeacher(self._teacher, source, back, unused)
        self.wanted_logits = (self._student.wanted, self._teacher.wanted)
        # A softcap's derivative is made from the logits, so the gradient goes elsewhere.
        self.inplace = self._student.wanted and self._student.softcap is None

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu" and not self._traced:
            return memory.workspace(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def chunks(self, widest: int | None = None) -> Iterator[_Chunk]:
        """The chunks in order, of equal length but for the last; a chunk's memory is the next one's."""
        width = self.dtype.itemsize
        classes = self._classes if widest is None else widest
        beside = width * classes * self._teacher.wanted  # the kernel's gradient of the teacher's logits
        beside += classes * (self._class_ids is not None)
        a_row = self._student.bytes_a_row(width, widest) + self._teacher.bytes_a_row(width, widest) + beside
        slots = 2 if overlaps(self.device) else 1
        most = max(1, self._budget // (a_row * slots))
        pieces = max(1, -(-self._count // most))  # also of no rows at all
        rows = max(1, -(-self._count // pieces))
        slots = min(slots, pieces)
        self._student.allocate(rows, slots, self._empty)
        self._teacher.allocate(rows, slots, self._empty)
        ats = [slice(start, min(start + rows, self._count)) for start in range(0, max(1, self._count), rows)]
        if slots == 1:
            for at in ats:
                yield self._chunk(at, 0)
        else:
            yield from self._overlapped(ats)

    def _chunk(self, at: slice, slot: int) -> _Chunk:
        student, teacher = self._student.logits(at, slot), self._teacher.logits(at, slot)
        missing = self._missing
        if self._class_ids is not None and self._own_class is not None:
            copies = same_as_own(self._class_ids, self._own_class[at])
            missing = copies if missing is None else copies | missing
        if missing is not None:
            student.masked_fill_(missing, -math.inf)
            if isinstance(teacher, Tensor):  # a record has left out such classes by itself
                fill = teacher.masked_fill_ if self._own_teacher else teacher.masked_fill
                teacher = fill(missing, -math.inf)
        return _Chunk(at, slot, student, teacher, missing)

    def _overlapped(self, ats: list[slice]) -> Iterator[_Chunk]:
        """The next chunk is made on a second stream while its reader works on this one.

        Fork and join by events alone, which a graph capture records too. Since the call's own stream waits for the
        second one at the end, memory that the call frees is not used again before the second stream is done with it.
        """
        main, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        made, read = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))  # type: ignore[no-untyped-call]

        def make(number: int) -> _Chunk:
            slot = number % 2
            if number >= 2:
                side.wait_event(read[slot])
            with torch.cuda.stream(side):
                chunk = self._chunk(ats[number], slot)
            made[slot].record(side)
            return chunk

        side.wait_stream(main)
        try:
            coming = make(0)
            for number in range(len(ats)):
                chunk = coming
                if number + 1 < len(ats):
                    coming = make(number + 1)
                main.wait_event(made[chunk.slot])
                for part in (chunk.teacher,) if isinstance(chunk.teacher, Tensor) else chunk.teacher[:3]:
                    if part is not None:
                        part.record_stream(main)  # it may be memory of the second stream
                yield chunk
                read[chunk.slot].record(main)
        finally:
            main.wait_stream(side)

    @property
    def casts_grad(self) -> bool:
        return self._student.casts_grad or self._teacher.casts_grad

    def set_row_scale(self, coefficient: Tensor, options: DistillOptions) -> None:
        """Each row's weight in the result, before the first chunk: with it, how large its gradients can be."""
        ts: Any = options.temperature
        tt, soft, hard = options.teacher_temperature, options.soft_weight, options.hard_weight
        if options.numbers is not None:  # known only when the program runs
            _, ts, tt, soft, hard, _ = options.numbers.to(self.device).unbind()  # type: ignore[assignment]
        soft = soft * (1.0 if options.divergence == "mse" else ts**2)
        self._student.set_row_scale(coefficient, soft / ts + hard)
        self._teacher.set_row_scale(coefficient, soft / tt)

    def accumulate_grad(self, chunk: _Chunk, d_student: Tensor | None, d_teacher: Tensor | None) -> None:
        for side, grad in ((self._student, d_student), (self._teacher, d_teacher)):
            if grad is not None:
                side.accumulate_grad(chunk.at, chunk.slot, grad, chunk.missing)

    def hidden_grads(self, at: slice) -> list[Tensor]:
        """A chunk's rows of the wanted gradients of hidden states, where they are kept."""
        found = [side.hidden_grad(at) for side in (self._student, self._teacher) if isinstance(side, Head)]
        return [grad for grad in found if grad is not None]

    def grads(self) -> tuple[Tensor | None, ...]:
        return (*self._student.grads(), *self._teacher.grads())
