"""The soft-label loss on logits, in the compiled core: csrc/cpu/distill.cpp, and csrc/cuda/distill.cu for CUDA tensors.

On a device nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.calls import (
    DistillCall,
    Gradients,
    Outputs,
    accumulate_dtype,
    dense,
    is_soft,
    prepared,
    upstream,
)
from tgt_fast.kernels.native import adjusted, core, cuda
from tgt_fast.kernels.native.abi import matrix, option_values, packer, pointer, split_divisor
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.row_checks import bad_share, bad_target, bad_weight

AUTO_PLAN = (0, 0, True)  # path, blocks a row, bulk copies: chosen by size (csrc/cuda/distill.h)
_NOTHING = (0, 0, 0)  # a Matrix
_NO_TARGET = (0, 0, 0, 0)


def takes_shares(call: DistillCall) -> bool:
    """True if a target may be shares of the classes: in the pass over the logits on a CPU."""
    return cuda.engine(call.student) is None


def takes_adjustments(call: DistillCall) -> bool:
    """True if a call's adjustments are made in the kernel's passes over the logits."""
    return adjusted.serves(call) and (takes_shares(call) or not is_soft(call.target))


def forward(call: DistillCall, out: Outputs, *, plan: tuple[int, int, bool] = AUTO_PLAN) -> None:
    """Row losses, their reduction and the wanted gradients, in one pass over the logits."""
    if call.adjust is not None:
        made = adjusted.packed(call)
        run_forward("distill_adjusted_forward", made.call, out, plan, adjust=made.fields)
        return
    run_forward("distill_forward", call, out, plan)


def backward(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradients from logits and saved row statistics, with the upstream gradient applied before rounding."""
    if call.adjust is not None:
        made = adjusted.packed(call)
        run_backward("distill_adjusted_backward", made.call, row_state, d_loss, grads, adjust=made.fields)
        return
    run_backward("distill_backward", call, row_state, d_loss, grads)


def sums(call: DistillCall, row_state: Tensor) -> bool:
    """Puts the sums of a divergence that needs the normalisers, jsd or tvd, into rows' state, from what else it holds.

    The normalisers may be of more classes than the call's. False: on a device no kernel does this.
    """
    if cuda.engine(call.student) is not None:
        return False
    one = torch.ones((), dtype=accumulate_dtype(call.student, call.teacher))
    run_backward("distill_backward", call, row_state, one, (None, None))
    return True


def run_forward(
    kernel: str, call: DistillCall, out: Outputs, plan: tuple[int, int, bool], topk: tuple[Any, ...] | None = None,
    adjust: tuple[Any, ...] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """(status, row) of a kernel.

    Args:
        topk: the fields of the teacher's top k, in the place of its logits.
        adjust: those of a call's adjustments.
    """
    options, student, teacher, _, _, given, *_ = call
    target, weight, row_loss = prepared(call, out)
    engine = cuda.engine(student)
    divisor_at = workspace = None
    divisor = -1.0
    if given is not None:
        divisor_at, divisor = split_divisor(given, engine is not None)
    if engine is not None:
        workspace = student.new_empty(1, dtype=torch.float64)
    loss, stats, d_student, d_teacher, row_state = out
    # What there is nothing of is not asked for its address: at small sizes each question is seen in the time of a call.
    state = 0 if row_state is None else row_state.data_ptr()
    values = (
        *option_values(options), *student.shape, *matrix(student),
        *(matrix(teacher) if isinstance(teacher, Tensor) else _NOTHING),
        *(_NO_TARGET if target is None else _target(target)), 0 if weight is None else weight.data_ptr(), divisor,
        0 if divisor_at is None else divisor_at.data_ptr(), 0 if workspace is None else workspace.data_ptr(),
        loss.data_ptr(), row_loss.data_ptr(), *(_NOTHING if d_student is None else matrix(d_student)),
        *(_NOTHING if d_teacher is None else matrix(d_teacher)), state if topk is None else 0,
        0 if stats is None else stats.data_ptr(), 0, False, 0,
    )  # fmt: skip
    name = "DistillCall"
    if topk is not None:
        name, values = "TopKCall", (*values, *topk, state)
    elif adjust is not None:
        name, values = "AdjustedCall", (*values, *adjust)
    if engine is not None:
        with engine.current(student) as stream:
            getattr(engine.core, f"cuda_{kernel}")(packer(engine.core, name)(*values), plan, stream)
        return 0, 0
    compiled = core()
    status, row = getattr(compiled, kernel)(packer(compiled, name)(*values), threads())
    if status:
        _refuse_row(status, row, student.shape[1], target, weight, options)
    return status, row


def run_backward(
    kernel: str, call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients,
    topk: tuple[Any, ...] | None = None, adjust: tuple[Any, ...] | None = None,
) -> None:  # fmt: skip
    """Runs a kernel. ``topk``, ``adjust``: as in :func:`run_forward`."""
    student, teacher = call.student, call.teacher
    target, d_loss = dense(call.target), upstream(d_loss, accumulate_dtype(student, teacher))
    state = pointer(row_state)
    values = (
        *option_values(call.options), *student.shape, *matrix(student),
        *(matrix(teacher) if isinstance(teacher, Tensor) else _NOTHING), *_target(target), 0, -1.0, 0, 0, 0, 0,
        *matrix(grads[0]), *matrix(grads[1]), state if topk is None else 0, 0, pointer(d_loss), d_loss.dim() > 0, 0,
    )  # fmt: skip
    name = "DistillCall"
    if topk is not None:
        name, values = "TopKCall", (*values, *topk, state)
    elif adjust is not None:
        name, values = "AdjustedCall", (*values, *adjust)
    run(kernel, name, student, values)


def run(kernel: str, name: str, at: Tensor, values: tuple[Any, ...]) -> None:
    """Runs a kernel that takes a struct alone, on the device of a tensor."""
    engine = cuda.engine(at)
    if engine is None:
        compiled = core()
        packed = packer(compiled, name)(*values)  # first: a core that is older than the struct is named as such
        getattr(compiled, kernel)(packed, threads())
        return
    with engine.current(at) as stream:
        getattr(engine.core, f"cuda_{kernel}")(packer(engine.core, name)(*values), stream)


def _target(target: Tensor | None) -> tuple[int, int, int, int]:
    """The fields of labels, and of shares of the classes in their place."""
    return (0, *matrix(target)) if is_soft(target) else (pointer(target), *_NOTHING)


def _refuse_row(
    status: int, row: int, classes: int, target: Tensor | None, weight: Tensor | None, options: DistillOptions
) -> None:
    """The error that the core found in a row's label or weight, if it found one there."""
    if status == core().BAD_TARGET and target is not None:
        raise ArgumentError(bad_target(row, int(target[row]), classes, options))
    if status == core().BAD_SOFT_TARGET and target is not None:
        raise ArgumentError(bad_share(row, target[row]))
    if status == core().BAD_WEIGHT and weight is not None:
        raise ArgumentError(bad_weight(row, float(weight[row])))


def scale_(grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row; reads nothing but the factor when that is 1."""
    d_loss = upstream(d_loss, accumulate_dtype(grad, grad))
    run("distill_scale", "ScaleCall", grad, (*grad.shape, *matrix(grad), pointer(d_loss), d_loss.dim() > 0))
