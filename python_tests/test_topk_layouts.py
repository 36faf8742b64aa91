"""The loss against a top-k record, on an emulated device: every way to lay a row on the chip."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from kernel_calls import backward, forward
from numerics import logits
from topk_kit import assert_near, in_double, loss_and_gradient

import tgt_fast as tgt
from tgt_fast.kernels.native import cuda
from tgt_fast.kernels.native import topk as native_topk
from tgt_fast.kernels.options import DistillOptions, TopK

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
        topk = tgt.topk_teacher(logits(3, classes, 1), k, 2.0, tail=tail)
        options = DistillOptions(
            divergence, temperature=2.0, teacher_temperature=2.0, hard_weight=0.5, label_smoothing=0.1, reduction="none"
        )
        with tensors_on_an_emulated_gpu(emulated):
            assert cuda.engine(student) is not None
            teacher = TopK(topk.ids, topk.log_probs, topk.rest(), tail)
            wanted = (True, False)
            out = forward(native_topk.forward, student, teacher, target, None, None, options, wanted=wanted, plan=plan)
            again, _ = backward(
                native_topk.backward, student, teacher, target, out.row_state, torch.ones(()), options, wanted=wanted
            )
        truth = loss_and_gradient(
            student.double(), in_double(topk), target, backend="reference", divergence=divergence, hard_weight=0.5,
            label_smoothing=0.1, reduction="none",
        )  # fmt: skip
        for grad in (out.d_student, again):
            assert grad is not None
            assert_near((out.loss, grad), truth, student, topk, hard=True, divergence=divergence)


def test_a_row_of_more_classes_than_a_map_has_room_for(emulated: ModuleType) -> None:
    """Of each of them the kernel asks whether it is among the top k; those next to an entry's vector are not."""
    ids, log_probs = torch.tensor([[8, 15, 24]]), torch.tensor([[0.5, 0.2, 0.1]]).log()
    classes = 2_000_000
    record = tgt.TeacherTopK(ids, log_probs, None, 1.0, classes)
    student = torch.zeros(1, classes)
    student[0, [0, 7, 16, 23]] = torch.tensor([16.0, 14.0, 15.0, 13.0])
    found = []
    for place in (tensors_on_an_emulated_gpu(emulated), nullcontext()):
        leaf = student.clone().requires_grad_()
        with place:
            loss = tgt.distillation_loss(leaf, record, backend="native")
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
