"""The loss against a top-k record where a process has some of the student's classes, and the whole record.

A process sums the tail of its own classes by the record's kernel, and the entries that are of its classes in double
here. Tails merge as sums of exponentials do; the entries' part of a divergence follows once the normalisers are known.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, accumulate_dtype
from tgt_fast.kernels.options import ROW_COEFFICIENT, DistillOptions, TopK
from tgt_fast.ops.vocab_parallel import merging, opening
from tgt_fast.ops.vocab_parallel.opening import DROPPED, FLAGS, HARD, INFINITE_HARD, INFINITE_SOFT, INVALID, has
from tgt_fast.ops.vocab_parallel.shards import Shards

# The columns of a row's state, csrc/common/topk.h.
(
    TAIL_MAX, TAIL_SUM, TAIL_FINITE, PEAK, STUDENT_LSE, TEACHER_LSE, HARD_LSE, COEFFICIENT, X, Y, FINITE, TOPK_FLAGS,
) = range(12)  # fmt: skip
STATE: Final = 12
assert COEFFICIENT == ROW_COEFFICIENT
_LOWEST: Final = -1e300


class Entries(NamedTuple):
    """A record's entries, in float64: those that count are the first of their ids."""

    log_probs: Tensor  # [N, k], -inf where one does not count
    ids: Tensor  # [N, k] of all classes
    tail: Tensor  # [N] log-probability of the classes that are not listed, -inf for none
    lse: Tensor  # [N] log-sum-exp of all these
    bad: Tensor  # [N] bool: no distribution


def entries_of(topk: TopK, classes: int) -> Entries:
    """A whole record, whose ids are global."""
    log = topk.log_probs.detach().to(torch.float64)
    counts = (log != -math.inf) & (topk.ids >= 0) & (topk.ids < classes)
    in_order, order = torch.where(counts, topk.ids, classes).sort(dim=-1, stable=True)
    repeats = torch.zeros_like(counts)
    repeats[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    counts = counts & ~torch.zeros_like(counts).scatter(1, order, repeats)
    log = torch.where(counts, log, -math.inf)
    if topk.tail_log_prob is None or topk.tail_mode == "renormalize":
        tail = log.new_full((log.shape[0],), -math.inf)
    else:
        tail = topk.tail_log_prob.detach().to(torch.float64)
    whole = torch.cat([log, tail[:, None]], dim=1)
    most = whole.amax(dim=1)
    bad = most.isnan() | (most == math.inf) | (most == -math.inf)
    return Entries(log, topk.ids, tail, torch.where(bad[:, None], 0.0, whole).logsumexp(dim=1), bad)


def local_record(topk: TopK, entries: Entries, shards: Shards) -> TopK:
    """The entries that are of this process's classes, by its own ids; the others are padding."""
    here = (entries.ids >= shards.start) & (entries.ids < shards.start + shards.width)
    here = here & (entries.log_probs > -math.inf)
    ids = torch.where(here, entries.ids - shards.start, 0)
    return topk._replace(ids=ids, log_probs=topk.log_probs.masked_fill(~here, -math.inf))


class ShardedTopK:
    """The loss of a call whose teacher is a process's part of a record, of the form of ``Direct``."""

    def __init__(self, kernel: Any, dense: Any, shards: Shards, entries: Entries) -> None:
        self.kernel, self.dense = kernel, dense  # of records, and of pairs of logits
        self.shards, self.entries = shards, entries

    def forward(self, call: DistillCall) -> Outputs:
        """Losses from the merged states: a reduction of maxima, and two of sums."""
        options, shards = call.options, self.shards
        topk = call.teacher
        assert isinstance(topk, TopK)
        soft = options.soft_weight != 0
        # The student by itself: its largest logit, what the hard term sums, and whether it is a distribution at all.
        alone = call._replace(teacher=call.student, options=options._replace(soft_weight=0.0))
        own = opening.opened(self.dense, alone)
        s, a = self._listed(call, topk)
        tail = self._tail(call, own) if soft else own.new_zeros((own.shape[0], 2))
        missing = ((a > -math.inf) & (s == -math.inf)).any(dim=1)
        most = s.amax(dim=1) if s.shape[1] else torch.full_like(own[:, 0], -math.inf)
        of_student = merging.maxima_of(own)
        mine = (of_student[:, 0], of_student[:, 2], of_student[:, 6], tail[:, 0], most, missing.to(torch.float64))
        maxima = shards.largest(torch.stack(mine, dim=1))
        # Of all: the largest logit, that of the tail, that of the entries.
        peak, bad, hard, tail_max, listed_max, lacks = maxima.unbind(1)
        student = torch.stack([peak, peak, bad, bad * 0, bad * 0, bad * 0, hard], dim=1)
        parts = merging.parts_of(own, student, alone.options)
        inverse_t = 1 / options.temperature
        of_tail = merging.log_of(tail[:, 1], tail[:, 0] - tail_max, options.temperature).exp()
        of_listed = torch.where(s > -math.inf, ((s - listed_max[:, None]) * inverse_t).exp(), 0.0).sum(dim=1)
        totals = shards.total(
            torch.stack([of_tail, of_listed, parts.hard, parts.finite, parts.linear, parts.label], dim=1)
        )
        tail_sum, listed_sum, hard_sum, finite, linear, label = totals.unbind(1)
        all_of = merging.Parts(tail_sum, tail_sum, hard_sum, finite, linear, label, tail_sum, tail_sum)

        dropped = has(own, DROPPED)
        restricted = topk.tail_mode == "renormalize"
        invalid = (bad > 0) | (peak == -math.inf)
        if soft:
            invalid = invalid | self.entries.bad
            if restricted:
                invalid = invalid | (listed_max == -math.inf)
        sound = ~dropped & ~invalid
        log_tail = merging.log_of(tail_sum, tail_max - peak, options.temperature)
        log_listed = merging.log_of(listed_sum, listed_max - peak, options.temperature)
        lse = log_listed if restricted else torch.logaddexp(log_tail, log_listed)
        state = own.new_zeros((own.shape[0], STATE))
        state[:, TAIL_MAX] = torch.where(tail_max == -math.inf, 0.0, tail_max)
        state[:, TAIL_SUM], state[:, PEAK] = tail_sum, peak
        state[:, STUDENT_LSE], state[:, TEACHER_LSE] = lse, self.entries.lse
        state[:, HARD_LSE], state[:, FINITE] = hard_sum.log(), finite

        # log q and log p of the entries, and of the tail as one class.
        b = torch.where(s > -math.inf, (s - peak[:, None]) * inverse_t - lse[:, None], -math.inf)
        sums = shards.total(torch.stack(_sums(a - self.entries.lse[:, None], b, options), dim=1))
        tail_a, tail_b = self.entries.tail - self.entries.lse, log_tail - lse
        if not restricted:
            sums = sums + torch.stack(_sums(tail_a[:, None], tail_b[:, None], options), dim=1)
        infinite = _infinite(options.divergence, lacks > 0, tail_a, tail_b, restricted) if soft else lacks < 0
        usable = sound & ~infinite & soft
        state[:, X], state[:, Y] = (torch.where(usable, sums[:, at], 0.0) for at in (0, 1))

        no_label = (hard > 0) & (label == -math.inf) & (options.label_smoothing < 1)
        flags = torch.where(dropped, DROPPED, torch.where(invalid, INVALID, 0))
        flags = flags + sound * (infinite * INFINITE_SOFT + (hard > 0) * HARD + no_label * INFINITE_HARD)
        state[:, TOPK_FLAGS] = flags.to(torch.float64)
        divisor = merging.divisor_of(own, call.divisor, options)
        weight = torch.where(divisor != 0, own[:, COEFFICIENT] / torch.where(divisor != 0, divisor, 1.0), 0.0)
        state[:, COEFFICIENT] = torch.where(dropped, 0.0, weight)
        row_loss = self._losses(state, merging.hard_loss(all_of, hard > 0, no_label, options), options)
        loss = row_loss if options.reduction == "none" else row_loss.sum()
        dtype = accumulate_dtype(call.student, topk)
        grads: Gradients = (None, None)
        if call.want_d_student:
            grads = self.backward(call, state, loss.new_ones((), dtype=dtype))
        return Outputs(loss.to(dtype), None, *grads, state if call.want_row_state else None)

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradient anew, from the merged states. Nothing travels."""
        if call.student.shape[1] == 0:
            return torch.zeros_like(call.student) if call.want_d_student else None, None
        return self.kernel.backward(call, row_state, d_loss)  # type: ignore[no-any-return]

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        if grad.numel():
            self.kernel.scale_(grad, d_loss)

    def _listed(self, call: DistillCall, topk: TopK) -> tuple[Tensor, Tensor]:
        """Logits and log-probabilities of the entries here, -inf for the others.  -> [N, k] float64, twice"""
        a = topk.log_probs.detach().to(torch.float64)
        if not call.student.shape[1]:
            return torch.full_like(a, -math.inf), a
        s = call.student.detach().gather(1, topk.ids).to(torch.float64)
        return torch.where(a > -math.inf, s, -math.inf), a

    def _tail(self, call: DistillCall, own: Tensor) -> Tensor:
        """The largest logit of the tail here, and sum exp((s - max) / T) over it.  -> [N, 2]"""
        made = own.new_zeros((own.shape[0], 2))
        made[:, 0] = -math.inf
        if not call.student.shape[1]:
            return made
        topk = call.teacher
        assert isinstance(topk, TopK)
        nothing = topk.log_probs.new_zeros(topk.ids.shape[0])
        bucket = topk._replace(tail_log_prob=nothing, tail_mode="bucket")
        plain = call.options._replace(
            reduction="none", divergence="cross_entropy", soft_weight=1.0, hard_weight=0.0, label_smoothing=0.0
        )
        state = opening.state_of(self.kernel, call._replace(teacher=bucket, target=None, sample_weight=None), plain)
        there = ~has_flag(state, INVALID) & (state[:, TAIL_SUM] > 0)
        made[:, 0] = torch.where(there, state[:, TAIL_MAX], -math.inf)
        made[:, 1] = torch.where(there, state[:, TAIL_SUM], 0.0)
        return made

    def _losses(self, state: Tensor, hard: Tensor, options: DistillOptions) -> Tensor:
        """The weighted loss of each row."""
        as_dense = state.new_zeros((state.shape[0], opening.STATE + 1))
        as_dense[:, opening.X], as_dense[:, opening.Y] = state[:, X], state[:, Y]
        as_dense[:, opening.COEFFICIENT], as_dense[:, FLAGS] = state[:, COEFFICIENT], state[:, TOPK_FLAGS]
        as_dense[:, opening.STATE] = hard
        return merging.losses(as_dense, options)


def has_flag(state: Tensor, flag: int) -> Tensor:
    """Which rows carry a flag.  -> [N] bool"""
    return (state[:, TOPK_FLAGS].to(torch.int64) & flag) != 0


def _sums(a: Tensor, b: Tensor, options: DistillOptions) -> tuple[Tensor, Tensor]:
    """The divergence's sums x, y over classes of log-probabilities a of the teacher and b of the student."""
    a, b = a.clamp_min(_LOWEST), b.clamp_min(_LOWEST)
    p, q, zero = a.exp(), b.exp(), torch.zeros_like(a[:, :0].sum(dim=1))
    if options.divergence == "forward_kl":
        return (p * (a - b)).sum(dim=1), zero
    if options.divergence == "cross_entropy":
        return (p * -b).sum(dim=1), zero
    if options.divergence == "reverse_kl":
        return zero, (q * (b - a)).sum(dim=1)
    d = a - b
    other = torch.where(d < 0, options.beta, 1 - options.beta)
    larger = -torch.log1p(other * torch.expm1(-d.abs()))
    of_teacher, of_student = torch.where(d < 0, larger + d, larger), torch.where(d < 0, larger, larger - d)
    return (p * of_teacher).sum(dim=1), (q * of_student).sum(dim=1)


def _infinite(divergence: str, lacks: Tensor, tail_a: Tensor, tail_b: Tensor, restricted: bool) -> Tensor:
    """Rows one side of which has mass where the other has none."""
    of_teacher, of_student = tail_a > -math.inf, tail_b > -math.inf
    if divergence == "reverse_kl":
        return (of_student & ~of_teacher) if not restricted else torch.zeros_like(lacks)
    if divergence == "jsd":
        return torch.zeros_like(lacks)
    return lacks if restricted else lacks | (of_teacher & ~of_student)
