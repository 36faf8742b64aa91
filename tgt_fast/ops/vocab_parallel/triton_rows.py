"""Rows' states in the form of the Triton kernels, and in the one that is merged.

Theirs is a column a number, in the dtype of the arithmetic. Two coefficients and a kind tell what weight and flags tell
in the merged form, that of ``csrc/common/row_stats.h``. The sums x and y are of logits relative to the largest, in
units that keep them in range; with P and Q the sums of the teacher's and the student's exponentials, those of the
merged form are::

    forward_kl      units x - log(P / Q)
    reverse_kl      units y + log(P / Q)
    cross_entropy   units x + log Q
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import Direct, DistillCall, Gradients, Outputs, accumulate_dtype
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.triton.distill import unit_of
from tgt_fast.ops.vocab_parallel import opening
from tgt_fast.ops.vocab_parallel.opening import (
    COEFFICIENT,
    DROPPED,
    FLAGS,
    INFINITE_HARD,
    INFINITE_SOFT,
    INVALID,
    has,
    soft_kind,
)

# The columns that Triton's kernels write, of kernels/triton/distill_row.py, by their names there.
COLUMNS: Final = (
    "STUDENT_MAX", "TEACHER_MAX", "STUDENT_SUM", "TEACHER_SUM", "HARD_SUM", "FINITE", "X", "Y", "SOFT", "HARD", "KIND",
)  # fmt: skip
_SAME: Final = 5  # the first columns, which are those of the merged form
_FINITE, _X, _Y, _SOFT, _HARD, _KIND = range(_SAME, len(COLUMNS))
_FITS: Final = 1e37  # squares of mse that are larger stand in y, times this:
_SMALL: Final = 2.0**-140
_IN_UNITS: Final = ("forward_kl", "reverse_kl", "symmetric", "cross_entropy")


class TritonRows:
    """The row kernel in Triton, whose states are those that are merged; of the form of ``Direct``."""

    def __init__(self, kernel: Direct) -> None:
        self._kernel = kernel

    def forward(self, call: DistillCall) -> Outputs:
        """One pass over the logits; with ``want_row_state`` for the states' sake: the losses have no weights then."""
        if not call.want_row_state:
            return self._kernel.forward(call)
        # A weight that leaves the range of the arithmetic's dtype would hide what the coefficients tell.
        out = self._kernel.forward(call._replace(sample_weight=None))
        assert out.row_state is not None
        dtype = accumulate_dtype(call.student, call.teacher)
        return out._replace(row_state=merged_form(out.row_state, dtype, call))

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradients from logits and merged states."""
        return self._kernel.backward(call, triton_form(row_state, call), d_loss)

    def sums(self, call: DistillCall, row_state: Tensor) -> bool:
        """No kernel makes those of jsd and tvd alone."""
        return False

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        self._kernel.scale_(grad, d_loss)


def merged_form(row_state: Tensor, dtype: torch.dtype, call: DistillCall) -> Tensor:
    """What a forward without weights left, each row by itself.  -> [N, STATE] float64"""
    count = row_state.shape[0]
    own = row_state.view(dtype).view(-1)[: len(COLUMNS) * count].view(len(COLUMNS), count).t().to(torch.float64)
    kind, soft = own[:, _KIND], own[:, _SOFT]
    weight = own.new_ones(count) if call.sample_weight is None else call.sample_weight.detach().to(torch.float64)
    invalid = kind.isnan()
    dropped = (kind == 0) | ~((weight > 0) & (weight < math.inf))
    made = own.new_zeros((count, opening.STATE))
    # Of a row that is no distribution they may be anything.
    own = torch.where((dropped | invalid)[:, None], 0.0, own)
    made[:, :_SAME], made[:, opening.X : opening.Y + 1] = own[:, :_SAME], own[:, _X : _Y + 1]
    made[:, opening.FINITE] = own[:, _FINITE]
    _to_merged_sums(made, call.options, call.student.shape[1])
    made[:, COEFFICIENT] = torch.where(dropped, 0.0, weight)
    infinite = ~invalid & (soft == 0)
    flags = torch.where(invalid, INVALID, torch.where(infinite, INFINITE_SOFT, 0))
    made[:, FLAGS] = torch.where(dropped, DROPPED, flags).to(torch.float64)
    return made


def triton_form(row_state: Tensor, call: DistillCall) -> Tensor:
    """Merged states as Triton's backward reads them.  -> [11, N] in the dtype of the arithmetic"""
    coefficient = row_state[:, COEFFICIENT]
    made = row_state.new_zeros((len(COLUMNS), row_state.shape[0]))
    made[:_SAME], made[_FINITE] = row_state[:, :_SAME].t(), row_state[:, opening.FINITE]
    of_x, of_y = _logarithms(row_state, call.options)
    unit = unit_of(call.options, call.student.shape[1]) if soft_kind(call.options) in _IN_UNITS else 1.0
    made[_X] = (row_state[:, opening.X] - of_x) / unit
    made[_Y] = (row_state[:, opening.Y] - of_y) / unit
    made[_SOFT] = torch.where(has(row_state, INFINITE_SOFT), 0.0, coefficient)
    hard = has(row_state, opening.HARD) & ~has(row_state, INFINITE_HARD)
    made[_HARD] = torch.where(hard, coefficient, 0.0)
    silent = has(row_state, DROPPED) | (coefficient == 0)
    made[_KIND] = torch.where(silent, 0.0, torch.where(has(row_state, INVALID), math.nan, 1.0))
    # An infinite maximum is that of a row without gradients; differences to it would be no numbers.
    made[:2] = torch.where(made[:2].isfinite(), made[:2], 0.0)
    return made.to(accumulate_dtype(call.student, call.teacher))


def _to_merged_sums(state: Tensor, options: DistillOptions, classes: int) -> None:
    """The sums x and y of states that Triton's forward left."""
    kind, x, y = soft_kind(options), state[:, opening.X], state[:, opening.Y]
    if kind in _IN_UNITS:
        unit = unit_of(options, classes)
        of_x, of_y = _logarithms(state, options)
        state[:, opening.X], state[:, opening.Y] = x * unit + of_x, y * unit + of_y
    elif kind == "mse":
        state[:, opening.X] = torch.where(x < _FITS, x, y / _SMALL)
        state[:, opening.Y] = 0.0


def _logarithms(state: Tensor, options: DistillOptions) -> tuple[Tensor, Tensor]:
    """What the merged x and y have beside Triton's, of states in the merged order.  -> [N], twice"""
    kind, sums = soft_kind(options), state[:, opening.STUDENT_SUM : opening.TEACHER_SUM + 1]
    log_q, log_p = torch.where(sums > 0, sums, 1.0).log().unbind(1)  # a row that counts has both
    none = torch.zeros_like(log_q)
    if kind == "cross_entropy":
        return log_q, none
    forward, reverse = kind in ("forward_kl", "symmetric"), kind in ("reverse_kl", "symmetric")
    return (log_q - log_p if forward else none), (log_p - log_q if reverse else none)
