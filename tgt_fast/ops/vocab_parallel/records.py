"""The loss against a whole record where a process has some of the student's classes, of the form of a row kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, accumulate_dtype
from tgt_fast.kernels.options import DistillOptions, TopK
from tgt_fast.ops.vocab_parallel import topk
from tgt_fast.ops.vocab_parallel.kernel import Sharded
from tgt_fast.ops.vocab_parallel.opening import STATE
from tgt_fast.ops.vocab_parallel.shards import Shards


class ShardedRecord:
    """The loss of a call whose teacher is a record of all classes, whole in each process.

    Of ``tail="bucket"`` and ``"renormalize"``; the others' is :class:`UniformRecord`.
    """

    def __init__(self, kernel: Any, dense: Any, shards: Shards, steps: Any = None) -> None:
        self.kernel = kernel  # whose scale_ is called
        self.shards = shards
        self.steps = topk.Steps(kernel, dense) if steps is None else steps

    def forward(self, call: DistillCall) -> Outputs:
        """Losses from the merged states: a reduction of maxima, and two of sums."""
        steps, shards = self.steps, self.shards
        call, entries = self._local(call)
        whole = entries.whole()
        opened = steps.record_opened(call)
        maxima = shards.largest(topk.maxima_of(opened))
        totals = shards.total(steps.record_sums(call, opened, maxima))
        sums = shards.total(steps.record_second(call, opened, maxima, totals, whole))
        merged = steps.record_merged(call, opened, maxima, totals, sums, whole)
        row_loss = steps.record_losses(call, merged)[:, 0]
        loss = row_loss if call.options.reduction == "none" else row_loss.sum()
        dtype = accumulate_dtype(call.student, call.teacher)
        row_state = merged[:, : topk.STATE].contiguous()
        grads: Gradients = (None, None)
        if call.want_d_student:
            grads = steps.gradients(call, row_state, loss.new_ones((), dtype=dtype))
        return Outputs(loss.to(dtype), None, *grads, row_state if call.want_row_state else None)

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradient anew, from the merged states. Nothing travels."""
        return self.steps.gradients(self._local(call)[0], row_state, d_loss)  # type: ignore[no-any-return]

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        if grad.numel():
            self.kernel.scale_(grad, d_loss)

    def _local(self, call: DistillCall) -> tuple[DistillCall, topk.Entries]:
        """The call with the entries of this process's classes, and all of them."""
        assert isinstance(call.teacher, TopK)
        entries = topk.entries_of(call.teacher, self.shards.classes)
        return call._replace(teacher=topk.local_record(call.teacher, entries, self.shards)), entries


class UniformRecord:
    """The same of ``tail="uniform"``, as the loss beside the logits that such a record stands for.

    How many classes share the tail the processes count first. Where there is none, it is a class of its own that the
    student cannot give; the process that has the first class has that one, too.
    """

    def __init__(self, sharded: Sharded) -> None:
        self._sharded = sharded

    def forward(self, call: DistillCall) -> Outputs:
        """Losses: a reduction of counts, and those of the loss on logits."""
        entries, others = self._others(call)
        count = self._sharded.shards.total(others.sum(dim=1, dtype=torch.float64)[:, None])
        out = self._sharded.forward(self._beside_logits(call, entries, others, count))
        state = None if out.row_state is None else torch.cat([out.row_state, count], dim=1)
        return out._replace(d_student=self._own(call, out.d_student), row_state=state)

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradient anew, from the merged states. Nothing travels."""
        entries, others = self._others(call)
        state, count = row_state[:, :STATE].contiguous(), row_state[:, STATE:]
        grad, _ = self._sharded.backward(self._beside_logits(call, entries, others, count), state, d_loss)
        return self._own(call, grad), None

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        self._sharded.scale_(grad, d_loss)

    def _others(self, call: DistillCall) -> tuple[topk.Entries, Tensor]:
        """The record's entries, and which classes here are not listed though the student can give them."""
        assert isinstance(call.teacher, TopK)
        shards = self._sharded.shards
        entries = topk.entries_of(call.teacher, shards.classes)
        listed = call.student.new_zeros((call.student.shape[0], shards.width + 1), dtype=torch.bool)
        listed = listed.scatter(1, self._places(entries), True)[:, : shards.width]
        return entries, (call.student.detach() > -math.inf) & ~listed

    def _places(self, entries: topk.Entries) -> Tensor:
        """Where the entries are among the classes here; one behind them for those that are elsewhere.  -> [N, k]"""
        shards = self._sharded.shards
        here = entries.ids - shards.start
        inside = (here >= 0) & (here < shards.width) & (entries.log_probs > -math.inf)
        return torch.where(inside, here, shards.width)

    def _beside_logits(self, call: DistillCall, entries: topk.Entries, others: Tensor, count: Tensor) -> DistillCall:
        """The call with the teacher's logits in the place of the record."""
        shards, dtype = self._sharded.shards, accumulate_dtype(call.student, call.teacher)
        each = (entries.tail[:, None] - count.clamp_min(1.0).log()).to(dtype)
        teacher = torch.where(others, each, -math.inf)
        teacher = torch.cat([teacher, torch.zeros_like(each)], dim=1)
        teacher = teacher.scatter(1, self._places(entries), entries.log_probs.to(dtype))[:, : shards.width]
        student, target = call.student, call.target
        if self._has_first:
            homeless = torch.where(count == 0, entries.tail[:, None], -math.inf).to(dtype)
            teacher = torch.cat([teacher, homeless], dim=1)
            student = torch.cat([student, torch.full_like(student[:, :1], -math.inf)], dim=1)
            if target is not None:  # what is no class is none of these either
                target = torch.where(target == shards.width, shards.width + 1, target)
        teacher = teacher.masked_fill(entries.bad[:, None], math.nan)
        return call._replace(
            options=_of_log_probs(call.options), student=student, teacher=teacher, target=target, inplace=False
        )

    def _own(self, call: DistillCall, grad: Tensor | None) -> Tensor | None:
        """A gradient of the classes here, in the place of the logits where that is wanted."""
        if grad is None:
            return None
        if self._has_first:
            grad = grad[:, :-1].contiguous()
        return call.student.detach().copy_(grad) if call.inplace else grad

    @property
    def _has_first(self) -> bool:
        return self._sharded.shards.start == 0 and self._sharded.shards.width > 0


def _of_log_probs(options: DistillOptions) -> DistillOptions:
    """The options beside logits that are the teacher's tempered log-probabilities."""
    numbers = options.numbers
    if numbers is not None:
        numbers = torch.cat([numbers[:2], torch.ones_like(numbers[:1]), numbers[3:]])
    return options._replace(teacher_temperature=1.0, numbers=numbers)


def of_record(tail: str, kernel: Any, dense: Any, shards: Shards, steps: Any = None) -> ShardedRecord | UniformRecord:
    """The kernel of records with such a tail, on those of a backend for records and for pairs of logits."""
    if tail == "uniform":
        return UniformRecord(Sharded(dense, shards, steps))
    return ShardedRecord(kernel, dense, shards, steps)
