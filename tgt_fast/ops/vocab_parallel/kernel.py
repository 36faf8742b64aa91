"""A kernel for a process's classes that gives the loss of all of them, in the form of the kernels for whole rows."""

from __future__ import annotations

import math
from typing import Any, Final

from torch import Tensor

from tgt_fast.errors import BackendError
from tgt_fast.kernels import select
from tgt_fast.kernels.calls import Direct, DistillCall, Gradients, Outputs, accumulate_dtype
from tgt_fast.ops.vocab_parallel import gradients, merging, opening, statistics
from tgt_fast.ops.vocab_parallel.shards import Shards
from tgt_fast.ops.vocab_parallel.triton_rows import TritonRows

SERVED: Final = ("native", "triton")  # the backends whose row states are merged


def served(name: str, op: str) -> str:
    """The backend's name.

    Raises:
        BackendError: its row states are not merged.
    """
    if name not in SERVED:
        raise BackendError(
            f"{op}: backend {name!r} has all classes of a row in one process; with vocab_group, or for DTensors that "
            f"are sharded on classes, pass one of {SERVED}"
        )
    return name


def row_kernel(op: str, name: str) -> Any:
    """The row kernel of a backend, whose states are in the form that is merged."""
    direct = Direct(select.kernel(op, name))
    return TritonRows(direct) if name == "triton" else direct


class Steps:
    """The work of a process by itself between two collectives, on the row kernel of a backend."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def opened(self, call: DistillCall) -> Tensor:
        """The rows' own state and what else is to travel."""
        return opening.opened(self.kernel, call)

    def sums(self, call: DistillCall, opened: Tensor, maxima: Tensor) -> Tensor:
        """Sums of the processes."""
        return merging.sums_of(opened, maxima, call.options)

    def merged(self, call: DistillCall, opened: Tensor, maxima: Tensor, totals: Tensor) -> Tensor:
        """The rows' state over all classes and, last, their hard losses."""
        divisor = merging.divisor_of(opened, call.divisor, call.options)
        return merging.merged(opened, maxima, totals, divisor, call.options)

    def second(self, call: DistillCall, merged: Tensor) -> Tensor:
        """Sums of jsd and tvd once the normalisers are known."""
        return gradients.second_sums(self.kernel, call, merged)

    def with_second(
        self, call: DistillCall, merged: Tensor, opened: Tensor, maxima: Tensor, own: Tensor, sums: Tensor
    ) -> Tensor:
        """The rows' state with those."""
        return merging.with_second(merged, opened, maxima, own, sums, call.options)

    def losses(self, call: DistillCall, merged: Tensor) -> Tensor:
        """The weighted loss of each row, in the first of one column."""
        return merging.losses(merged, call.options)[:, None]

    def stats(self, call: DistillCall) -> Tensor:
        """Parts of the statistics."""
        return statistics.opened(self.kernel, call)

    def stats_sums(self, call: DistillCall, own: Tensor, maxima: Tensor, mine: Tensor) -> Tensor:
        """The numbers that are added up for them."""
        return statistics.sums_of(own, maxima, mine, call.options)

    def stats_values(self, call: DistillCall, own: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
        """The statistics, a column a field."""
        return statistics.values_of(own, maxima, sums, call.divisor, call.options)

    def gradients(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradients to this process's logits."""
        return gradients.gradients(self.kernel, call, row_state, d_loss)


class Sharded:
    """The loss over the classes of all processes, of the form of :class:`tgt_fast.kernels.calls.Direct`.

    Its calls hold this process's logits and labels; every process of the groups makes the same ones.
    """

    def __init__(self, kernel: Any, shards: Shards, steps: Any = None) -> None:
        self.kernel = kernel  # whose scale_ is called
        self.shards = shards
        self.steps = Steps(kernel) if steps is None else steps

    def forward(self, call: DistillCall) -> Outputs:
        """Losses from the merged states: a reduction of maxima, one of sums, and one more for jsd and tvd."""
        steps, shards = self.steps, self.shards
        opened = steps.opened(call)
        maxima = shards.largest(merging.maxima_of(opened))
        merged = steps.merged(call, opened, maxima, shards.total(steps.sums(call, opened, maxima)))
        if call.options.divergence in opening.SECOND_PASS and call.options.soft_weight != 0:
            own = steps.second(call, merged)
            merged = steps.with_second(call, merged, opened, maxima, own, shards.total(own))
        row_loss = steps.losses(call, merged)[:, 0]
        loss = row_loss if call.options.reduction == "none" else row_loss.sum()
        dtype = accumulate_dtype(call.student, call.teacher)
        stats = None
        if call.want_stats:
            stats = self._stats(call).to(dtype)
        row_state = merged[:, : opening.STATE].contiguous()
        grads: Gradients = (None, None)
        if call.want_d_student or call.want_d_teacher:
            grads = steps.gradients(call, row_state, loss.new_ones((), dtype=dtype))
        return Outputs(loss.to(dtype), stats, *grads, row_state if call.want_row_state else None)

    def _stats(self, call: DistillCall) -> Tensor:
        """The fields of DistillStats.  -> [6, N] float64"""
        steps, shards = self.steps, self.shards
        own = steps.stats(call)
        maxima = shards.largest(statistics.maxima_of(own))
        first = statistics.first_of(own, maxima, shards)
        mine = (first == shards.largest(first)) & (first > -math.inf)
        sums = shards.total(steps.stats_sums(call, own, maxima, mine))
        return steps.stats_values(call, own, maxima, sums).t()  # type: ignore[no-any-return]

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradients anew, from the merged states. Nothing travels."""
        return self.steps.gradients(call, row_state, d_loss)  # type: ignore[no-any-return]

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        if grad.numel():
            self.kernel.scale_(grad, d_loss)
