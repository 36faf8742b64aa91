"""The loss against a top-k record where a process has some of the student's classes, and the whole record.

A process sums the tail of its own classes by the record's kernel, and the entries that are of its classes in double
here. Tails merge as sums of exponentials do; the entries' part of a divergence follows once the normalisers are known.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients
from tgt_fast.kernels.options import ROW_COEFFICIENT, DistillOptions, TopK
from tgt_fast.ops.vocab_parallel import merging, opening
from tgt_fast.ops.vocab_parallel.opening import DROPPED, FLAGS, HARD, INFINITE_HARD, INFINITE_SOFT, INVALID, has
from tgt_fast.ops.vocab_parallel.shards import Shards

# The columns of a row's state, csrc/common/topk.h.
(
    TAIL_MAX, TAIL_SUM, TAIL_FINITE, PEAK, STUDENT_LSE, TEACHER_LSE, HARD_LSE, COEFFICIENT, X, Y, FINITE, TOPK_FLAGS,
) = range(12)  # fmt: skip
STATE: Final = 12
OPENED: Final = opening.OPENED + 4  # numbers a row that a process has
SUMS: Final = 6  # and that they add up
assert COEFFICIENT == ROW_COEFFICIENT
_LOWEST: Final = -1e300


class Entries(NamedTuple):
    """A record's entries, in float64: those that count are the first of their ids."""

    log_probs: Tensor  # [N, k], -inf where one does not count
    ids: Tensor  # [N, k] of all classes
    tail: Tensor  # [N] log-probability of the classes that are not listed, -inf for none
    lse: Tensor  # [N] log-sum-exp of all these
    bad: Tensor  # [N] bool: no distribution

    def whole(self) -> Tensor:
        """What is said of a row as a whole, as the steps take it: tail, log-sum-exp, badness.  -> [N, 3]"""
        return torch.stack([self.tail, self.lse, self.bad.to(torch.float64)], dim=1)


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


class Steps:
    """The work of a process by itself between two collectives, against its own part of a record."""

    def __init__(self, kernel: Any, dense: Any) -> None:
        self.kernel, self.dense = kernel, dense  # of records, and of pairs of logits

    def record_opened(self, call: DistillCall) -> Tensor:
        """The student by itself, its tail here, the largest logit of the entries, and whether one has none."""
        # The student alone: its largest logit, what the hard term sums, and whether it is a distribution at all.
        own = opening.opened(self.dense, _alone(call))
        s, a = _listed(call)
        tail = self._tail(call, own) if call.options.soft_weight != 0 else own.new_zeros((own.shape[0], 2))
        missing = ((a > -math.inf) & (s == -math.inf)).any(dim=1).to(torch.float64)
        most = s.amax(dim=1) if s.shape[1] else torch.full_like(own[:, 0], -math.inf)
        return torch.cat([own, tail, most[:, None], missing[:, None]], dim=1)

    def record_sums(self, call: DistillCall, opened: Tensor, maxima: Tensor) -> Tensor:
        """Sums of the processes.  -> [N, SUMS]"""
        options, listed_max = call.options, maxima[:, 4]
        s, _ = _listed(call)
        parts = merging.parts_of(opened[:, : opening.OPENED], _of_student(maxima), _alone(call).options)
        tail_max, tail_sum = opened[:, opening.OPENED], opened[:, opening.OPENED + 1]
        of_tail = merging.log_of(tail_sum, tail_max - maxima[:, 3], options.temperature).exp()
        rise = (s - listed_max[:, None]) / options.temperature
        of_listed = torch.where(s > -math.inf, rise.exp(), 0.0).sum(dim=1)
        return torch.stack([of_tail, of_listed, parts.hard, parts.finite, parts.linear, parts.label], dim=1)

    def record_second(self, call: DistillCall, opened: Tensor, maxima: Tensor, totals: Tensor, whole: Tensor) -> Tensor:
        """The divergence's sums over the entries here, once the normalisers are known.  -> [N, 2]"""
        s, a = _listed(call)
        lse, _ = _normalisers(call, maxima, totals)
        tempered = (s - maxima[:, :1]) / call.options.temperature - lse[:, None]
        b = torch.where(s > -math.inf, tempered, -math.inf)
        return torch.stack(_sums(a - whole[:, 1:2], b, call.options), dim=1)

    def record_merged(
        self, call: DistillCall, opened: Tensor, maxima: Tensor, totals: Tensor, sums: Tensor, whole: Tensor
    ) -> Tensor:
        """The rows' state over all classes and, last, their hard losses."""
        options, own = call.options, opened[:, : opening.OPENED]
        assert isinstance(call.teacher, TopK)
        soft, restricted = options.soft_weight != 0, call.teacher.tail_mode == "renormalize"
        peak, bad, hard, tail_max, listed_max, lacks = maxima.unbind(1)
        tail_sum, _, hard_sum, finite, linear, label = totals.unbind(1)
        tail, teacher_lse, bad_record = whole.unbind(1)
        dropped = has(own, DROPPED)
        invalid = (bad > 0) | (peak == -math.inf)
        if soft:
            invalid = invalid | (bad_record > 0)
            if restricted:
                invalid = invalid | (listed_max == -math.inf)
        sound = ~dropped & ~invalid
        lse, log_tail = _normalisers(call, maxima, totals)
        state = own.new_zeros((own.shape[0], STATE + 1))
        if soft:
            state[:, TAIL_MAX] = torch.where(tail_max == -math.inf, 0.0, tail_max)
            state[:, TAIL_SUM] = tail_sum
        else:  # all are the tail, which nobody has looked at: exponentials may begin at any logit
            state[:, TAIL_MAX] = torch.where(peak == -math.inf, 0.0, peak)
            state[:, TAIL_SUM] = 1.0
        state[:, PEAK] = peak
        state[:, STUDENT_LSE], state[:, TEACHER_LSE] = lse, teacher_lse
        state[:, HARD_LSE], state[:, FINITE] = hard_sum.log(), finite

        # log q and log p of the tail as one class.
        tail_a, tail_b = tail - teacher_lse, log_tail - lse
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
        all_of = merging.Parts(tail_sum, tail_sum, hard_sum, finite, linear, label, tail_sum, tail_sum)
        state[:, STATE] = merging.hard_loss(all_of, hard > 0, no_label, options)
        return state

    def record_losses(self, call: DistillCall, merged: Tensor) -> Tensor:
        """The weighted loss of each row, in the first of one column."""
        as_dense = merged.new_zeros((merged.shape[0], opening.STATE + 1))
        as_dense[:, opening.X], as_dense[:, opening.Y] = merged[:, X], merged[:, Y]
        as_dense[:, opening.COEFFICIENT], as_dense[:, FLAGS] = merged[:, COEFFICIENT], merged[:, TOPK_FLAGS]
        as_dense[:, opening.STATE] = merged[:, STATE]
        return merging.losses(as_dense, call.options)[:, None]

    def gradients(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradient to this process's logits."""
        if call.student.shape[1] == 0:
            return torch.zeros_like(call.student) if call.want_d_student else None, None
        return self.kernel.backward(call, row_state, d_loss)  # type: ignore[no-any-return]

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


def maxima_of(opened: Tensor) -> Tensor:
    """Numbers of which the processes take the largest: of all, of what is no number, of labels, tail and entries."""
    own = merging.maxima_of(opened[:, : opening.OPENED])
    columns = (own[:, 0], own[:, 2], own[:, 6], *opened[:, opening.OPENED :].unbind(1))
    return torch.stack([columns[at] for at in (0, 1, 2, 3, 5, 6)], dim=1)


def _alone(call: DistillCall) -> DistillCall:
    return call._replace(teacher=call.student, options=call.options._replace(soft_weight=0.0))


def _of_student(maxima: Tensor) -> Tensor:
    """The maxima as the merge of a pair of logits takes them, of the student beside itself."""
    peak, bad, hard = maxima[:, 0], maxima[:, 1], maxima[:, 2]
    return torch.stack([peak, peak, bad, bad * 0, bad * 0, bad * 0, hard], dim=1)


def _normalisers(call: DistillCall, maxima: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of what the divergence is over, relative to the largest logit, and that of the tail."""
    assert isinstance(call.teacher, TopK)
    peak, _, _, tail_max, listed_max, _ = maxima.unbind(1)
    log_tail = merging.log_of(totals[:, 0], tail_max - peak, call.options.temperature)
    log_listed = merging.log_of(totals[:, 1], listed_max - peak, call.options.temperature)
    restricted = call.teacher.tail_mode == "renormalize"
    return log_listed if restricted else torch.logaddexp(log_tail, log_listed), log_tail


def _listed(call: DistillCall) -> tuple[Tensor, Tensor]:
    """Logits and log-probabilities of the entries here, -inf for the others.  -> [N, k] float64, twice"""
    assert isinstance(call.teacher, TopK)
    a = call.teacher.log_probs.detach().to(torch.float64)
    if not call.student.shape[1]:
        return torch.full_like(a, -math.inf), a
    s = call.student.detach().gather(1, call.teacher.ids).to(torch.float64)
    return torch.where(a > -math.inf, s, -math.inf), a


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
