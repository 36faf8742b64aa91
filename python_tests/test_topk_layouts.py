"""The loss against a top-k record, on an emulated device: every way to lay a row on the chip."""

from __future__ import annotations

import dataclasses
import math
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


@pytest.mark.parametrize("plan", [(2, 1, True), (2, 2, False), (3, 0, True)], ids=str)
def test_of_entries_with_one_id_the_first_counts(emulated: ModuleType, plan: tuple[int, int, bool]) -> None:
    """Fewer ids than entries, more entries than threads, ids that are in no row, and padding that counts as nothing."""
    generator = torch.Generator().manual_seed(0)
    options = DistillOptions("forward_kl", temperature=2.0, teacher_temperature=2.0, hard_weight=0.5, reduction="none")
    for entries, different in ((64, 40), (600, 1000), (600, 3), (5, 1)):
        ids = torch.randint(-1, different + 1, (2, entries), generator=generator)
        student, log_probs = logits(2, max(different, 9), 0), logits(2, entries, 1).log_softmax(-1)
        log_probs[:, ::7] = -math.inf
        without = log_probs.clone()
        for row, of_row in enumerate(ids.tolist()):
            seen: set[int] = set()
            for j, one in enumerate(of_row):
                if one in seen:
                    without[row, j] = -math.inf
                elif log_probs[row, j] > -math.inf:
                    seen.add(one)
        found = []
        with tensors_on_an_emulated_gpu(emulated):
            for of_teacher in (log_probs, without):
                record = TopK(ids, of_teacher, None, "renormalize" if different < 9 else "bucket")
                out = forward(
                    native_topk.forward, student, record, torch.tensor([0, 1]), None, None, options,
                    wanted=(True, False), plan=plan,
                )  # fmt: skip
                found.append((out.loss, out.d_student))
        for mine, theirs in zip(*found, strict=True):
            assert mine is not None
            assert mine.isfinite().all()
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", [(2, 1, True), (3, 0, True)], ids=str)
def test_the_hard_term_at_any_temperature(
    emulated: ModuleType, plan: tuple[int, int, bool], dtype: torch.dtype, temperature: float
) -> None:
    """Of a tail next to the top k, far below it, and of nothing; without smoothed labels."""
    student, target = logits(4, 67, 0, dtype=dtype), torch.tensor([0, 33, 66, 5])
    record = tgt.topk_teacher(logits(4, 67, 1), 9, temperature)
    inside = torch.zeros(4, 67, dtype=torch.bool).scatter(1, record.ids, True)
    student[1, ~inside[1]] -= 60
    student[2, ~inside[2]] = -math.inf
    student[2, inside[2]] -= 3e4
    target[2] = record.ids[2, 0]
    teacher = TopK(record.ids, record.log_probs, record.rest(), "renormalize")
    options = DistillOptions(
        "forward_kl", temperature=temperature, teacher_temperature=temperature, hard_weight=0.5, reduction="none"
    )
    with tensors_on_an_emulated_gpu(emulated):
        out = forward(
            native_topk.forward, student, teacher, target, None, None, options, wanted=(True, False), plan=plan
        )
    truth = loss_and_gradient(
        student.double(), dataclasses.replace(in_double(record), tail="renormalize"), target, backend="reference",
        divergence="forward_kl", hard_weight=0.5, reduction="none",
    )  # fmt: skip
    assert out.d_student is not None
    for row in range(4):
        mine = (out.loss[row : row + 1], out.d_student[row : row + 1])
        theirs = (truth[0][row : row + 1], truth[1][row : row + 1])
        assert_near(mine, theirs, student[row : row + 1], record, hard=True, divergence="forward_kl")
