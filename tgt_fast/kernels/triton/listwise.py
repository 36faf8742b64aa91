"""The listwise loss in Triton: PyTorch ranks the classes, the kernel does the rest."""

from __future__ import annotations

import math

import torch

from tgt_fast.kernels.latent_calls import accumulate_dtype
from tgt_fast.kernels.listwise_calls import ListwiseCall, Outputs, no_distribution, ranked
from tgt_fast.kernels.triton import kernels, launch, running_on
from tgt_fast.kernels.triton.tuning import LISTWISE_BLOCK, LISTWISE_WARPS


def forward(call: ListwiseCall, out: Outputs) -> None:
    """Row losses and the wanted gradient."""
    student, d_student = call.student.detach(), out.d_student
    count, classes = student.shape
    if d_student is not None:
        d_student.zero_()  # what is left out
    if not student.numel():
        out.loss.zero_()
        return
    dtype = accumulate_dtype(student, call.teacher)
    order, weights = ranked(call, dtype)
    bad = no_distribution(call) & (call.factor != 0)
    factor = torch.where(bad, 0.0, call.factor)
    suffix = student.new_empty((count, classes), dtype=dtype)
    with running_on(student):
        launch(
            kernels().listwise.listwise_kernel, count, student, order, weights.contiguous(), factor, out.loss,
            d_student, suffix, classes, student.stride(0), 0 if d_student is None else d_student.stride(0),
            WANT_D=d_student is not None, IS_FP64=dtype == torch.float64,
            BLOCK=min(LISTWISE_BLOCK, max(16, 1 << (classes - 1).bit_length())), warps=LISTWISE_WARPS,
        )  # fmt: skip
    out.loss.masked_fill_(bad, math.nan)
    if d_student is not None:
        d_student.masked_fill_(bad[:, None], math.nan)
