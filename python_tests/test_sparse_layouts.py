"""The loss against a top-k record, on an emulated device: every way to lay a row on the chip."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from numerics import logits
from sparse_kit import assert_near, in_double, loss_and_gradient

import tgt_fast as tgt
from tgt_fast.kernels.native import cuda, cuda_sparse
from tgt_fast.kernels.options import DistillOptions, Listed

PLANS = {
    "a block": (2, 1, False),
    "a block, bulk copies": (2, 1, True),
    "2 blocks, bulk copies": (2, 2, True),
    "4 blocks": (2, 4, False),
    "8 blocks, bulk copies": (2, 8, True),
    "streamed": (3, 0, True),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
# 2: six blocks of eight have nothing; 67: an end; 1033: blocks of unequal shares
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (67, 9), (1033, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(
    emulated: ModuleType, plan: tuple[int, int, bool], classes: int, k: int, dtype: torch.dtype
) -> None:
    student, target = logits(3, classes, 0, dtype=dtype), torch.tensor([0, classes // 2, classes - 1])
    for divergence, tail in (("forward_kl", "bucket"), ("jsd", "uniform"), ("reverse_kl", "renormalize")):
        record = tgt.topk_teacher(logits(3, classes, 1), k, 2.0, tail=tail)
        options = DistillOptions(
            divergence, temperature=2.0, teacher_temperature=2.0, hard_weight=0.5, label_smoothing=0.1, reduction="none"
        )
        with tensors_on_an_emulated_gpu(emulated):
            engine = cuda.engine(student)
            assert engine is not None
            listed = Listed(record.ids, record.log_probs, record.rest(), tail)
            out = cuda_sparse.forward(
                engine, student, listed, target, None, None, options, wanted=True, keep_rows=True, plan=plan
            )
            assert out.rows is not None
            again = cuda_sparse.backward(engine, student, listed, target, out.rows, torch.ones(()), options)
        truth = loss_and_gradient(
            student.double(), in_double(record), target, backend="reference", divergence=divergence, hard_weight=0.5,
            label_smoothing=0.1, reduction="none",
        )  # fmt: skip
        for grad in (out.d_student, again):
            assert grad is not None
            assert_near((out.loss, grad), truth, student, record, hard=True, divergence=divergence)
