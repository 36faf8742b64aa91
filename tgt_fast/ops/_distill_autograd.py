"""Autograd of the soft-label loss, whatever kernel computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops import library
from tgt_fast.ops._distill_arguments import OP
from tgt_fast.ops._readable import all_readable, upstream


class Call:
    """What travels through autograd beside the tensors."""

    __slots__ = ("data", "inplace", "kernel", "options", "want_stats")

    def __init__(
        self,
        options: DistillOptions,
        kernel: Any,
        inplace: bool,
        want_stats: bool,
        data: tuple[Tensor | None, ...] = (),  # what else the kernel reads, which must not change before backward
    ) -> None:
        self.options = options
        self.kernel = kernel
        self.inplace = inplace
        self.want_stats = want_stats
        self.data = data


class Distill(torch.autograd.Function):
    """Makes the gradients in forward, for an upstream gradient of 1, and hands them out once, scaled, in backward.

    A float16 gradient is made in backward instead, so that the upstream gradient (the loss scale) is applied before
    rounding. A later backward over the same graph makes the gradients anew from the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
        normalizer: float | Tensor | None, call: Call,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.wanted = ctx.needs_input_grad[:2]
        ctx.ready = None
        ctx.spent = False
        ctx.deferred = (ctx.wanted[0] and student.dtype == torch.float16) or (
            ctx.wanted[1] and teacher.dtype == torch.float16
        )
        out = call.kernel.forward(
            student, teacher, target, sample_weight, normalizer, call.options,
            wanted=(False, False) if ctx.deferred else ctx.wanted, keep_rows=True, inplace=call.inplace,
            want_stats=call.want_stats,
        )  # fmt: skip
        if not ctx.deferred:
            ctx.ready = (out.d_student, out.d_teacher)
        if call.inplace and not ctx.deferred:
            # The student's logits hold its gradient now: there is nothing left to compute a second one from.
            torch.autograd.graph.increment_version(student)
        else:
            _save(ctx, student, teacher, target, out.rows, *call.data)
        if out.stats is not None:
            ctx.mark_non_differentiable(out.stats)
        return out.loss, out.stats

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_loss: Tensor | None, *unused: Any) -> Any:  # type: ignore[override]
        if d_loss is None:
            return (None,) * 6
        call = ctx.call
        if call.inplace and ctx.spent:
            raise RuntimeError(
                f"{OP}: inplace=True overwrote the student's logits with their gradient, so backward runs once; "
                "pass inplace=False"
            )
        if call.inplace and torch.is_grad_enabled():
            raise RuntimeError(f"{OP}: inplace=True has no second derivative (create_graph=True); pass inplace=False")
        ctx.spent = True
        d_loss = upstream(OP, d_loss)
        if ctx.ready is not None:
            grads, ctx.ready = ctx.ready, None
            for grad in grads:
                if grad is not None:
                    call.kernel.scale_(grad, d_loss)
        else:
            student, teacher, target, rows, *data = _saved(ctx)
            all_readable(f"{OP}, backward", student_logits=student, teacher_logits=teacher, target=target)
            all_readable(f"{OP}, backward", **{f"the record's tensor {i}": tensor for i, tensor in enumerate(data)})
            grads = call.kernel.backward(
                student, teacher, target, rows, d_loss, call.options, wanted=ctx.wanted, inplace=call.inplace
            )
            if call.inplace:
                torch.autograd.graph.increment_version(student)
        if torch.is_grad_enabled():
            grads = tuple(None if grad is None else library.apply(_Once, grad, *_saved(ctx)[:2]) for grad in grads)
        return (*grads, None, None, None, None)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, which refuses what was made in inference mode, such as a teacher's logits: that is held."""
    ctx.held = tuple(tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors)
    ctx.save_for_backward(*(None if h is not None else t for t, h in zip(tensors, ctx.held, strict=True)))


def _saved(ctx: Any) -> tuple[Any, ...]:
    return tuple(t if h is None else h for t, h in zip(ctx.saved_tensors, ctx.held, strict=True))


class _Once(torch.autograd.Function):
    """Passes a gradient on; differentiating it again is an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{OP}: the compiled backends have no second derivative; pass backend='reference'")
