"""The adjustments of a loss as the compiled core's kernels take them, in their passes over the logits."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.adjust import LEAST_SKEW
from tgt_fast.kernels.calls import DistillCall, accumulate_dtype
from tgt_fast.kernels.native.abi import matrix, pointer

# Of a decoupled divergence's second weight in the first: what is below leaves the range of float32.
_LEAST_SHARE: Final = 1e-6


def serves(call: DistillCall) -> bool:
    """True if a call's adjustments are among those that the kernels take."""
    adjust = call.adjust
    if adjust is None or not isinstance(call.teacher, Tensor):
        return False
    if adjust.decoupled is not None:
        own, rest = adjust.decoupled
        return own + rest > 0 and (rest == 0 or rest >= _LEAST_SHARE * own)
    return adjust.skew == 0 or adjust.skew >= LEAST_SKEW


class Packed(NamedTuple):
    """What a call's adjustments are to the core."""

    call: DistillCall  # its temperatures are 0 where a row has its own
    fields: tuple[Any, ...]  # of Adjustments (csrc/common/adjust.h)
    kept: tuple[Tensor | None, ...]  # which these point into


def packed(call: DistillCall) -> Packed:
    """A call's adjustments, in the precision of the arithmetic; a scale of its own is a temperature of a row's own."""
    adjust, options = call.adjust, call.options
    assert adjust is not None
    dtype = accumulate_dtype(call.student, call.teacher)
    biases = tuple(_dense(bias, dtype) for bias in (adjust.student_bias, adjust.teacher_bias))
    margin = _dense(adjust.label_margin, torch.float64)
    ours, theirs = (_dense(rows, torch.float64) for rows in (adjust.student_temperature, adjust.teacher_temperature))
    if adjust.standardize and ours is None:
        rows = call.student.shape[0]
        ours, theirs = (
            torch.full((rows,), of_all, dtype=torch.float64, device=call.student.device)
            for of_all in (options.temperature, options.teacher_temperature)
        )
    if ours is not None:
        call = call._replace(options=options._replace(temperature=0.0, teacher_temperature=0.0))
    of_label, of_others = adjust.decoupled or (0.0, 0.0)
    fields = (
        *matrix(biases[0]), *matrix(biases[1]), pointer(margin), pointer(ours), pointer(theirs), of_label, of_others,
        adjust.skew, adjust.correct_teacher or 0.0, adjust.standardize,
    )  # fmt: skip
    return Packed(call, fields, (*biases, margin, ours, theirs))


def _dense(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.detach().to(dtype).contiguous()
