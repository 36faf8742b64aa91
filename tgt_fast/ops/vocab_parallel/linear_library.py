"""The driver of the loss from hidden states over slices of heads, in eager mode and as PyTorch's dispatcher knows it.

It is that of whole heads, a chunk of rows at a time, with a row kernel that merges the states of the rows. A head's
gradient stays in its process. Those of hidden states, which all classes give, are added up a chunk at a time.

For a tracer all chunks are one after the other in the program: their products, what the row kernel does between two
collectives, each an op, and the collectives. So a program is made for a number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels import linear_chunks, select
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import DistillCall
from tgt_fast.kernels.options import DIFFERENTIABLE, DistillOptions, LinearForward, LinearOptions, LinearTensors
from tgt_fast.ops import library
from tgt_fast.ops._linear_op import CALL, Call, Linear, chosen, forward_fake, settled_inputs, unpacked
from tgt_fast.ops.library import or_nothing
from tgt_fast.ops.vocab_parallel import library as rows_library
from tgt_fast.ops.vocab_parallel.kernel import row_kernel, served
from tgt_fast.ops.vocab_parallel.shards import Shards, finished, started


class Driver:
    """The driver on a merging row kernel, as autograd wants it."""

    def __init__(self, kernels: Any, shards: Shards, steps: Any = None) -> None:
        self._kernels, self._shards, self._steps = kernels, shards, steps

    @classmethod
    def of(cls, backend: str, t: LinearTensors, shards: Shards) -> Driver:
        """On the row kernels of a backend.

        Raises:
            BackendError: one whose row states are not merged, or that cannot run the call.
        """
        form = "distill" if t.topk_ids is None else select.TOPK
        name = served(chosen(backend, t), "linear" if t.topk_ids is None else form)
        return cls([row_kernel(op, name) for op in (form, "distill")], shards)

    def forward(
        self, t: LinearTensors, divisor: Any, heads: LinearOptions, options: DistillOptions, **keywords: Any
    ) -> LinearForward:
        """Losses and the wanted gradients."""
        with torch.no_grad(), library.without_autocast():
            together = _Together(self._shards)
            made = linear_chunks.forward(
                _Rows(self), t, divisor, heads, options, widest=self._shards.widest, together=together, **keywords  # type: ignore[arg-type]
            )  # fmt: skip
            together.finish()
            return made

    def backward(
        self, t: LinearTensors, divisor: Any, d_loss: Tensor, heads: LinearOptions, options: DistillOptions, *,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """The gradients anew."""
        return self.forward(t, divisor, heads, options, wanted=wanted, upstream=d_loss).grads

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        if grad.numel():
            self._kernels[1].scale_(grad, d_loss)

    def of_rows(self, call: DistillCall) -> Any:
        """What gives the loss of a chunk's rows."""
        return rows_library.sharded(call, self._kernels, self._shards, self._steps)


class _Rows:
    """The row kernel of a driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def forward(self, call: DistillCall) -> Any:
        return self._driver.of_rows(call).forward(call)


class _Together:
    """Gradients of hidden states, a chunk's added up over the processes while the next chunk is at work."""

    def __init__(self, shards: Shards) -> None:
        self._groups = shards.groups
        self._parts: list[Tensor] = []
        self._begun: Tensor | None = None

    def __call__(self, parts: list[Tensor]) -> None:
        self.finish()
        if parts:
            self._parts = parts
            self._begun = started(torch.cat([part.reshape(-1) for part in parts]), "sum", self._groups)

    def finish(self) -> None:
        """Put the sums where the parts were."""
        if self._begun is None:
            return
        total, at = finished(self._begun, "sum", self._groups), 0
        for part in self._parts:
            part.copy_(total[at : at + part.numel()].view(part.shape))
            at += part.numel()
        self._begun = None


# Registration


def _parted(arguments: tuple[Any, ...]) -> tuple[Any, bool, str, Shards]:
    inputs, (want_stats, backend, groups, *places) = unpacked(arguments)
    return inputs, want_stats, backend, Shards(tuple(groups), *places)


def _loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, want_stats, backend, shards = _parted(arguments)
    t, divisor, heads, options, _ = settled_inputs(inputs, looked_at=True)
    out = Driver.of(backend, t, shards).forward(t, divisor, heads, options, want_stats=want_stats)
    return out.loss, or_nothing(out.stats, out.loss)


def _loss_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, want_stats, backend, _ = _parted(arguments)
    loss, stats, *_ = forward_fake(*arguments[:_INPUTS], want_stats, backend)
    return loss, stats


def _loss_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    (t, divisor, heads, options, _), want_stats, backend, shards = _parted(arguments)
    steps = rows_library.Dispatched(backend)
    call = Call(heads, options, Driver((steps, steps), shards, steps), want_stats)
    loss, stats = library.apply(Linear, divisor, call, *t)
    return loss, or_nothing(stats, loss.detach())


_INPUTS = sum(len(kind._fields) for kind in (LinearTensors, LinearOptions, DistillOptions, Adjustments)) + 2
vocab_linear_distillation_loss = library.define(
    f"vocab_linear_distillation_loss({CALL}, bool want_stats, str backend, {rows_library.SHARDS}) -> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
    differentiable=DIFFERENTIABLE,
)
