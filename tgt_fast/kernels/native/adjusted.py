"""A loss with adjustments on the compiled core's CPU kernel, which knows none of them.

A few rows at a time, in memory that stays in a cache: the logits are adjusted there, the kernel runs on them, and its
gradients go the way back. So the logits are read from memory once and the gradients written once, as without. PyTorch
keeps to one thread meanwhile: threads of its own that wait for the next op would take the processor from the core's. A
chunk that holds what a shortcut does not serve (a class that is not there, a row of one value) goes by the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tgt_fast._forks import one_thread
from tgt_fast.kernels import composed
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, accumulate_dtype, labels_of
from tgt_fast.kernels.options import ROW_COEFFICIENT, ROW_STATE
from tgt_fast.kernels.reference import distill as reference

_ELEMENTS: Final = 1 << 20  # of a chunk's logits
_TINY: Final = 1e-7  # beside a standard deviation
_STUDENT_MAX, _TEACHER_MAX, _STUDENT_SUM, _TEACHER_SUM, _FLAGS = 0, 1, 2, 3, 9  # csrc/common/row_stats.h
_ODD: Final = 2 | 4 | 32  # of a row's flags: not a number, infinite, beyond the range of float32


def serves(call: DistillCall) -> bool:
    """True if a call's adjustments are among those here."""
    adjust = call.adjust
    if adjust is None or not isinstance(call.teacher, Tensor):
        return False
    whole = adjust.decoupled is None or adjust.decoupled[1] > 0
    return not adjust.skew and adjust.correct_teacher is None and whole


def forward(kernel: Any, call: DistillCall, out: Outputs) -> None:
    """Row losses, their reduction and the wanted gradients; ``kernel``: that of calls without adjustments."""
    counted, labeled, weight, divisor = reference._counts(
        call.student, call.target, call.sample_weight, call.divisor, call.options
    )
    if call.options.reduction == "mean":
        weight = torch.where(divisor != 0, weight / torch.where(divisor != 0, divisor, 1.0), 0.0)
    coefficient = torch.where(counted, weight, 0.0)
    rows = out.loss if call.options.reduction == "none" else out.loss.new_empty(call.student.shape[0])
    with one_thread():
        _Rows(kernel, call, coefficient, labeled).run(rows, out.stats, (out.d_student, out.d_teacher))
    if rows is not out.loss:
        out.loss.copy_(rows.sum(dtype=torch.float64))
    if out.row_state is not None:
        out.row_state.zero_()[:, ROW_COEFFICIENT] = coefficient


def backward(kernel: Any, call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradients from logits and the rows' weights in the reduced loss."""
    _, labeled, *_ = reference._counts(call.student, call.target, None, None, call.options)
    coefficient = row_state[:, ROW_COEFFICIENT] * d_loss.detach().double()
    # A kernel takes weights from 0; gradients are linear in them.
    sign = torch.where(coefficient < 0, -1.0, 1.0)
    rows = torch.empty(call.student.shape[0], dtype=accumulate_dtype(call.student, call.teacher))
    with one_thread():
        _Rows(kernel, call, coefficient.abs(), labeled).run(rows, None, grads)
    if bool((sign < 0).any()):
        for grad in grads:
            if grad is not None:
                grad.mul_(sign.to(grad.dtype)[:, None])


class _Side(NamedTuple):
    """One side of a chunk as the kernel is to see it, and what leads back from its gradient."""

    logits: Tensor  # [n, C]
    scale: Tensor | None  # [n] factor of the gradient; None: 1
    along: Tensor | None  # [n] what of the part along the logits is to be taken away, by their product; None: nothing


class _Rows:
    """The rows of a call, a chunk at a time."""

    def __init__(self, kernel: Any, call: DistillCall, coefficient: Tensor, labeled: Tensor) -> None:
        assert call.adjust is not None
        assert isinstance(call.teacher, Tensor)
        self._kernel, self._call, self._labeled = kernel, call, labeled
        self._adjust: Adjustments = call.adjust
        self._teacher: Tensor = call.teacher
        self._coefficient = coefficient
        self._dtype = accumulate_dtype(call.student, call.teacher)
        count, self._classes = call.student.shape
        self._step = max(1, min(count, _ELEMENTS // self._classes))
        self._memory: dict[str, Tensor] = {}
        o, a = call.options, self._adjust
        self._soft, self._hard = o.soft_weight != 0, o.hard_weight != 0 and call.target is not None
        by_row = a.student_temperature is not None
        apart = a.standardize or a.decoupled is not None or by_row
        self._apart = (apart and self._soft) or (a.label_margin is not None and self._hard)
        self._biases = tuple(None if b is None else b.to(self._dtype) for b in (a.student_bias, a.teacher_bias))

    def run(self, rows: Tensor, stats: Tensor | None, grads: Gradients) -> None:
        """Losses times coefficients, statistics and gradients, where there is room for them."""
        for start in range(0, self._call.student.shape[0], self._step):
            at = slice(start, min(start + self._step, self._call.student.shape[0]))
            found = None if stats is None else torch.empty(6, at.stop - at.start, dtype=self._dtype)
            mine = _each(grads, lambda _, grad, at=at: grad[at])
            if self._apart:
                sound = self._in_parts(at, rows[at], found, mine)
            else:
                self._at_once(at, rows[at], found, mine)
                sound = True
            if not sound:
                self._by_formula(at, rows[at], found, mine)
            if stats is not None and found is not None:
                stats[:, at] = found

    def _room(self, name: str, at: slice) -> Tensor:
        if name not in self._memory:
            self._memory[name] = torch.empty(self._step, self._classes, dtype=self._dtype)
        return self._memory[name][: at.stop - at.start]

    def _own(self, name: str, at: slice, logits: Tensor) -> Tensor:
        """Logits in memory of our own, which may be written to."""
        room = self._room(name, at)
        return logits if logits.data_ptr() == room.data_ptr() else room.copy_(logits)

    def _biased(self, name: str, at: slice, *, teacher: bool) -> Tensor:
        """A side's logits in the precision of the arithmetic, with their bias; the call's own where it has none."""
        given, bias = (self._teacher if teacher else self._call.student)[at], self._biases[teacher]
        if bias is None:
            return given
        room = self._room(name, at)
        if given.dtype == self._dtype:
            return torch.add(given, bias, out=room)
        return room.copy_(given).add_(bias)

    def _launch(
        self, at: slice, student: Tensor, teacher: Tensor, weight: Tensor, loss: Tensor, grads: Gradients,
        stats: Tensor | None = None, state: Tensor | None = None, *, target: Tensor | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """The kernel on a chunk, for losses times weights."""
        plain = self._call.options._replace(reduction="none", **options)
        call = DistillCall(
            plain, student, teacher, target, weight, None, grads[0] is not None, grads[1] is not None,
            state is not None, stats is not None,
        )  # fmt: skip
        self._kernel(call, Outputs(loss, stats, grads[0], grads[1], state))

    def _at_once(self, at: slice, loss: Tensor, stats: Tensor | None, grads: Gradients) -> None:
        target = None if self._call.target is None else self._call.target[at]
        student, teacher = self._biased("student", at, teacher=False), self._biased("teacher", at, teacher=True)
        self._launch(at, student, teacher, self._coefficient[at], loss, grads, stats, target=target)

    def _by_formula(self, at: slice, loss: Tensor, stats: Tensor | None, grads: Gradients) -> None:
        call = composed._rows(self._call, at)._replace(
            sample_weight=self._coefficient[at], divisor=None, want_d_student=grads[0] is not None,
            want_d_teacher=grads[1] is not None, want_stats=stats is not None,
            options=self._call.options._replace(reduction="none"),
        )  # fmt: skip
        composed.forward(call, Outputs(loss, stats, grads[0], grads[1]))

    def _in_parts(self, at: slice, loss: Tensor, stats: Tensor | None, grads: Gradients) -> bool:
        """The soft term of its own logits, and the hard one; False where a row is not served: nothing is written."""
        weight = self._coefficient[at]
        hard = torch.empty_like(loss) if self._hard else None
        d_hard = self._room("d_hard", at) if self._hard and grads[0] is not None else None
        if hard is not None:
            logits = self._lowered(at)
            target = None if self._call.target is None else self._call.target[at]
            beside = None if self._soft else grads[1]
            self._launch(at, logits, logits, weight, hard, (d_hard, beside), target=target, soft_weight=0.0)
        total = torch.zeros_like(loss)
        made: list[Tensor | None] | None = None
        if self._soft:
            total = torch.empty_like(loss)
            sides = self._sides(at)
            if sides is None:
                return False
            room = _each(grads, lambda i, _: self._room(f"d{i}", at))
            if not self._soft_part(at, sides, weight, total, stats, room):
                return False
            whole = grads if d_hard is None else (d_hard, grads[1])
            made = [
                None if grad is None or to is None else _back(grad, side, to if to.dtype == grad.dtype else grad, add)
                for grad, side, to, add in zip(room, sides, whole, (d_hard is not None, False), strict=True)
            ]
        elif stats is not None:
            return False
        loss.copy_(total if hard is None else total + hard)
        for i, grad in enumerate(grads):
            if grad is None or (i == 1 and not self._soft):
                continue
            here = d_hard if made is None else made[i]
            if here is not None and here.data_ptr() != grad.data_ptr():
                grad.copy_(here)
        return True

    def _lowered(self, at: slice) -> Tensor:
        """The student's logits for the hard term."""
        margin = self._adjust.label_margin
        given = self._biased("hard", at, teacher=False)
        if margin is None or labels_of(self._call.target) is None:
            return given
        room = given if self._biases[0] is not None else self._room("hard", at).copy_(given)
        labeled, index = self._label(at)
        lower = torch.where(labeled, -margin.to(self._dtype)[index], 0.0)
        return room.scatter_add_(1, index[:, None], lower[:, None])

    def _label(self, at: slice) -> tuple[Tensor, Tensor]:
        """Which rows have a label, and the label, 0 where there is none."""
        labeled, target = self._labeled[at], labels_of(self._call.target)
        if target is None:
            return labeled, torch.zeros(at.stop - at.start, dtype=torch.int64)
        return labeled, torch.where(labeled, target[at], 0)

    def _sides(self, at: slice) -> tuple[_Side, _Side] | None:
        """Both sides of the soft term; None where one has a row that cannot be standardised in this way."""
        temperatures = (self._adjust.student_temperature, self._adjust.teacher_temperature)
        dropped = self._coefficient[at] == 0
        some_dropped = bool(dropped.any())
        made = []
        for teacher, name in enumerate(("student", "teacher")):
            logits, of_rows = self._biased(name, at, teacher=bool(teacher)), temperatures[teacher]
            inverse = None if of_rows is None else of_rows[at].to(torch.float64).reciprocal()
            along: Tensor | None = None
            if self._adjust.standardize:
                room = self._room(name, at)
                wide = logits if logits.dtype == self._dtype else room.copy_(logits)
                torch.sub(wide, wide.mean(dim=1, keepdim=True), out=room)
                squares = torch.linalg.vector_norm(room, dim=1).double().square()
                if not bool(((squares > 0) & squares.isfinite() | dropped).all()):
                    return None
                spread = (squares / max(1, self._classes - 1)).sqrt()
                # In units of what the kernel sees, which is divided by the row's temperature, too.
                along = (1.0 if of_rows is None else of_rows[at]) / ((self._classes - 1) * spread)
                inverse = (1.0 if inverse is None else inverse) / (_TINY + spread)
                if some_dropped:  # whatever they hold
                    along, inverse = (torch.where(dropped, 0.0, x) for x in (along, inverse))
                    room.masked_fill_(dropped[:, None], 0.0)
                logits = room.mul_(inverse.to(self._dtype)[:, None])
            elif inverse is not None:
                inverse = torch.where(dropped, 0.0, inverse) if some_dropped else inverse
                wide = logits if logits.dtype == self._dtype else self._room(name, at).copy_(logits)
                logits = torch.mul(wide, inverse.to(self._dtype)[:, None], out=self._room(name, at))
            made.append(_Side(logits, inverse, along))
        return made[0], made[1]

    def _soft_part(
        self, at: slice, sides: tuple[_Side, _Side], weight: Tensor, loss: Tensor, stats: Tensor | None,
        grads: Gradients,
    ) -> bool:  # fmt: skip
        """The soft term of a chunk, in the logits that the kernel sees; False where a row is not served."""
        options: dict[str, Any] = {"hard_weight": 0.0}
        if self._adjust.student_temperature is not None:
            options |= {"temperature": 1.0, "teacher_temperature": 1.0}
            if self._call.options.divergence != "mse":
                weight = weight * self._adjust.student_temperature[at].to(torch.float64).square()
        if self._adjust.decoupled is None:
            self._launch(at, sides[0].logits, sides[1].logits, weight, loss, grads, stats, **options)
            return True
        return self._decoupled(at, sides, weight, loss, stats, grads, options)

    def _decoupled(
        self, at: slice, sides: tuple[_Side, _Side], weight: Tensor, loss: Tensor, stats: Tensor | None,
        grads: Gradients, options: dict[str, Any],
    ) -> bool:  # fmt: skip
        """The kernel's KL among the others, and that of (label, others) from what the kernel's rows are made of."""
        assert self._adjust.decoupled is not None
        own, rest = self._adjust.decoupled
        labeled, index = self._label(at)
        if stats is not None:
            nothing = torch.empty_like(loss)
            self._launch(at, sides[0].logits, sides[1].logits, weight, nothing, (None, None), stats, **options)
        logits = [self._own(name, at, side.logits) for name, side in zip(("student", "teacher"), sides, strict=True)]
        at_label = index[:, None]
        of_label = [x.gather(1, at_label) for x in logits]
        for x, own_logit in zip(logits, of_label, strict=True):
            x.scatter_(1, at_label, torch.where(labeled[:, None], -torch.inf, own_logit))
        state = torch.empty(at.stop - at.start, ROW_STATE, dtype=torch.float64)
        weights = torch.where(labeled, weight * rest, weight)
        self._launch(at, logits[0], logits[1], weights, loss, grads, None, state, **options)
        flags = state[:, _FLAGS].to(torch.int64)
        counted = weight != 0
        temperatures = (
            options.get("temperature", self._call.options.temperature),
            options.get("teacher_temperature", self._call.options.teacher_temperature),
        )
        parts = []  # (log q of the label, log q of all others, log-sum-exp of the others), of both sides
        for k, temperature in enumerate(temperatures):
            others = state[:, (_STUDENT_MAX, _TEACHER_MAX)[k]] / temperature
            others = others + state[:, (_STUDENT_SUM, _TEACHER_SUM)[k]].log()
            label = of_label[k].squeeze(1).double() / temperature
            both = torch.logaddexp(label, others)
            parts.append((label - both, others - both, others))
        (log_q, log_rest_q, _), (log_p, log_rest_p, _) = parts
        p, q, rest_p, rest_q = (x.exp() for x in (log_p, log_q, log_rest_p, log_rest_q))
        value = p * (log_p - log_q) + rest_p * (log_rest_p - log_rest_q)
        if bool((counted & labeled & (((flags & _ODD) != 0) | ~value.isfinite())).any()):
            return False
        factor = temperatures[0] ** 2 * self._call.options.soft_weight
        share = torch.where(labeled & counted, weight * own * factor, 0.0)
        use = share != 0
        loss.add_(torch.where(use, share * value.clamp_min(0.0), 0.0).to(loss.dtype))
        less = torch.where(p > 0.5, rest_p - rest_q, q - p)  # q - p, from the smaller numbers
        slopes = ((less, -less), (p * (log_p - log_q - value), rest_p * (log_rest_p - log_rest_q - value)))
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            of_own, of_rest = (torch.where(use, share * x / temperatures[k], 0.0) for x in slopes[k])
            shared = torch.mul(logits[k], 1.0 / temperatures[k], out=self._room("shared", at))
            shared.sub_(torch.where(use, parts[k][2], 0.0).to(self._dtype)[:, None]).exp_()
            if not bool(use.all()):
                shared.masked_fill_(~use[:, None], 0.0)
            grad.addcmul_(shared, of_rest.to(self._dtype)[:, None])
            added = torch.where(labeled, of_own.to(self._dtype), 0.0)
            grad.scatter_add_(1, at_label, added[:, None])
        for x, own_logit in zip(logits, of_label, strict=True):
            x.scatter_(1, at_label, own_logit)
        return True


def _each(grads: Gradients, make: Callable[..., Tensor]) -> Gradients:
    """make(0 or 1, gradient) of those that are wanted."""
    first, second = (None if grad is None else make(i, grad) for i, grad in enumerate(grads))
    return first, second


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row.  [n, C], [n, C] -> [n] float64"""
    return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)]).double()  # a batched product is slower


def _back(grad: Tensor, side: _Side, to: Tensor, add: bool) -> Tensor:
    """The gradient of the logits from that of what the kernel saw, in ``to``, or added to what is there.

    Of standardised ones z = (x - mean) / spread the way back takes away the gradient's mean, which is 0 already (for
    mse, too, whose gradient is of a difference of such rows), and its part along z.
    """
    if side.scale is None:
        return to.add_(grad) if add else to.copy_(grad)
    scale = side.scale.to(grad.dtype)[:, None]
    along = None if side.along is None else (_product(grad, side.logits) * side.along).to(grad.dtype)[:, None]
    if add:
        to.addcmul_(grad, scale)
    else:
        torch.mul(grad, scale, out=to)
    return to if along is None else to.addcmul_(side.logits, along, value=-1.0)
