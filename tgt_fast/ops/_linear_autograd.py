"""Autograd of the loss from hidden states, whatever kernel computes its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.kernels.options import DIFFERENTIABLE, DistillOptions, LinearOptions, LinearTensors
from tgt_fast.ops import library
from tgt_fast.ops._linear_arguments import OP
from tgt_fast.ops._readable import all_readable, upstream

_HEADS = (1, 2, 4, 5)  # weights and biases: their gradients are sums over rows


class Call:
    """What travels through autograd beside the tensors."""

    __slots__ = ("heads", "kernel", "options", "want_stats")

    def __init__(self, heads: LinearOptions, options: DistillOptions, kernel: Any, want_stats: bool) -> None:
        self.heads = heads
        self.options = options
        self.kernel = kernel  # forward(), backward() and scale_(), as _linear_library.Direct
        self.want_stats = want_stats


class Linear(torch.autograd.Function):
    """Makes the wanted gradients in forward, for an upstream gradient of 1; hands them out once, scaled, in backward.

    They are made in backward instead where the upstream gradient has to come first: in float16, which would underflow,
    and for a loss a row with a gradient that sums over rows. A later backward over the same graph makes them anew.
    """

    @staticmethod
    def forward(ctx: Any, normalizer: float | Tensor | None, call: Call, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.wanted = wanted = tuple(ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE])
        t = LinearTensors(*tensors)  # type: ignore[arg-type]
        half = any(w and x is not None and x.dtype == torch.float16 for w, x in zip(wanted, t, strict=False))
        deferred = half or (call.options.reduction == "none" and any(wanted[i] for i in _HEADS))
        out = call.kernel.forward(
            t, normalizer, call.heads, call.options, want_stats=call.want_stats,
            wanted=(False,) * DIFFERENTIABLE if deferred else wanted,
        )  # fmt: skip
        ctx.ready = None if deferred else out.grads
        # save_for_backward refuses what was made in inference mode, such as a teacher's hidden states: that is held.
        on_device, ctx.divisor = library.split(normalizer)
        kept = (*tensors, on_device)
        ctx.held = tuple(x if x is not None and x.is_inference() else None for x in kept)
        ctx.save_for_backward(*(None if h is not None else x for x, h in zip(kept, ctx.held, strict=True)))
        if out.stats is not None:
            ctx.mark_non_differentiable(out.stats)
        return out.loss, out.stats

    @staticmethod
    @one_thread_in_forks
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> Any:  # type: ignore[override]
        if d_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        call = ctx.call
        d_loss = upstream(OP, d_loss)
        if ctx.ready is not None:
            grads, ctx.ready = ctx.ready, None
            for grad in grads:
                if grad is not None:
                    call.kernel.scale_(grad if grad.dim() == 2 else grad[None], d_loss)
        else:
            t, normalizer = _saved(ctx)
            all_readable(f"{OP}, backward", **t._asdict())
            grads = call.kernel.backward(t, normalizer, d_loss, call.heads, call.options, wanted=ctx.wanted)
        if torch.is_grad_enabled():
            inputs = [x for x in _saved(ctx)[0][:DIFFERENTIABLE] if x is not None]
            grads = tuple(None if grad is None else library.apply(_Once, grad, *inputs) for grad in grads)
        return (None, None, *grads, *(None,) * (len(LinearTensors._fields) - DIFFERENTIABLE))


def _saved(ctx: Any) -> tuple[LinearTensors, float | Tensor | None]:
    *tensors, on_device = (x if h is None else h for x, h in zip(ctx.saved_tensors, ctx.held, strict=True))
    return LinearTensors(*tensors), ctx.divisor if on_device is None else on_device


class _Once(torch.autograd.Function):
    """Passes a gradient on; differentiating it again is an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{OP}: no second derivative; pass backend='reference'")
