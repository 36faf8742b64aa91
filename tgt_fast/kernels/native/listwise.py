"""The listwise loss in the compiled core: csrc/cpu/listwise.cpp."""

from __future__ import annotations

from tgt_fast.kernels.listwise_calls import ListwiseCall, Outputs
from tgt_fast.kernels.native.abi import matrix, pointer
from tgt_fast.kernels.native.distill import run


def forward(call: ListwiseCall, out: Outputs) -> None:
    """Row losses and the wanted gradient."""
    student, ids = call.student.detach(), call.ids
    if not student.numel():
        out.loss.zero_()
        return
    others, label, factor = (None if x is None else x.contiguous() for x in (call.others, call.label, call.factor))
    listed = (0, 0, 0) if ids is None else (ids.data_ptr(), ids.stride(0), ids.shape[1])
    values = (
        *student.shape, *matrix(student), *matrix(call.teacher.detach()), call.teacher_temperature, *listed,
        pointer(others), pointer(label), pointer(factor), pointer(out.loss), *matrix(out.d_student),
    )  # fmt: skip
    run("listwise", "ListwiseCall", student, values)
