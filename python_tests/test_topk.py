"""The loss against a top-k record: values, gradients, bounds, masks, rows that do not count."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import logits, magnitude, targets
from strategies import DTYPES, lay_out
from topk_kit import INF, assert_near, check, divergences, dtypes, in_double, loss_and_gradient, peaked, tails
from torch import Tensor

import tgt_fast as tgt
from tgt_fast import TeacherTopK
from tgt_fast.kernels.options import TAILS, TOPK_DIVERGENCES

pytestmark = pytest.mark.records

# The meaning


@divergences
@tails
def test_the_reference_has_the_right_gradients(divergence: str, tail: str) -> None:
    student = logits(3, 9, 0, dtype=torch.float64).requires_grad_()
    topk = tgt.topk_teacher(logits(3, 9, 1, dtype=torch.float64), 4, 2.0, tail=tail)
    assert torch.autograd.gradcheck(
        lambda s: tgt.distillation_loss(
            s, topk, targets(3, 9, 2), divergence=divergence, temperature=2.0, hard_weight=0.5, label_smoothing=0.1,
            backend="reference",
        ),
        student,
    )  # fmt: skip


def test_the_bucket_form_is_torchs_divergence_of_k_plus_1_classes(backend: str) -> None:
    student, teacher = logits(6, 50, 0), logits(6, 50, 1)
    topk = tgt.topk_teacher(teacher, 8, 2.0)

    def bucketed(x: Tensor) -> Tensor:
        full = (x / 2.0).log_softmax(-1)
        rest = full.scatter(-1, topk.ids, -INF).logsumexp(-1, keepdim=True)
        return torch.cat([full.gather(-1, topk.ids), rest], -1)

    expected = 4.0 * F.kl_div(bucketed(student), bucketed(teacher), log_target=True, reduction="batchmean")
    loss = tgt.distillation_loss(student, topk, temperature=2.0, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@divergences
def test_the_other_forms_are_dense_losses(backend: str, divergence: str) -> None:
    student, teacher = logits(6, 50, 0), logits(6, 50, 1)
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    dense = tgt.distillation_loss(student, teacher, **options)
    for tail in TAILS:
        every = tgt.distillation_loss(student, tgt.topk_teacher(teacher, 50, 2.0, tail=tail), **options)
        torch.testing.assert_close(every, dense, rtol=1e-5, atol=1e-6)
    topk = tgt.topk_teacher(teacher, 8, 2.0, tail="uniform")
    assert topk.tail_log_prob is not None
    spread = (topk.tail_log_prob - math.log(42.0))[:, None].expand(6, 50).scatter(-1, topk.ids, topk.log_probs)
    torch.testing.assert_close(
        tgt.distillation_loss(student, topk, **options),
        tgt.distillation_loss(student, 2.0 * spread, **options), rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    torch.testing.assert_close(
        tgt.distillation_loss(student, dataclasses.replace(topk, tail="renormalize"), **options),
        tgt.distillation_loss(student.gather(-1, topk.ids), 2.0 * topk.log_probs, **options), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


# Against the float64 truth


@pytest.mark.meet(3)
@dtypes
@divergences
@tails
# 5: less than a vector; 33: a vector and its end; 2100: more than a block of the CPU kernels
@pytest.mark.parametrize(("classes", "k"), [(5, 2), (33, 33), (2100, 64)])
def test_against_the_truth(backend: str, classes: int, k: int, tail: str, divergence: str, dtype: torch.dtype) -> None:
    student = lay_out(logits(2, classes, 0, dtype=dtype), "row-strided")
    source = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "reduction": "none"}
    teacher = logits(2, classes, 1, dtype=source)
    check(student, tgt.topk_teacher(teacher, k, 3.0, tail=tail), **options)
    topk = tgt.topk_teacher(teacher, k, 2.0, tail=tail)
    check(student, topk, targets(2, classes, 2), hard_weight=0.5, label_smoothing=0.1, beta=0.3, **options)
    topk = tgt.topk_teacher(teacher, k, 1.0, tail=tail)
    check(student, topk, topk.ids[:, -1], hard_weight=2.0, **options)


@dtypes
@divergences
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_peaked_rows(backend: str, divergence: str, tail: str, dtype: torch.dtype) -> None:
    """The listed classes have all of the mass but 1e-9 and less, on either side or on both."""
    for ours, theirs in ((0.0, 25.0), (25.0, 0.0), (60.0, 60.0)):
        student, teacher = peaked(4, 70, ours, 0).to(dtype), peaked(4, 70, theirs, 0)
        teacher = teacher.double() if dtype == torch.float64 else teacher
        topk = tgt.topk_teacher(teacher, 8, tail=tail)
        check(student, topk, backend=backend, divergence=divergence, reduction="none")


@pytest.mark.parametrize("classes", [40, 1000, 9001])
def test_a_students_peak_in_the_teachers_tail(backend: str, classes: int) -> None:
    """A gradient that is small where most of the student's mass is: made of what the other classes leave."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, 30, classes, generator=generator)
    teacher[:, 7] -= 5  # out of the record
    topk = tgt.topk_teacher(teacher, 8, tail="uniform")
    options: dict[str, Any] = {"divergence": "jsd", "reduction": "none"}
    for lift in (4, 7, 10, 13, 16, 20, 25):
        peaked_student = student.clone()
        peaked_student[:, 7] += lift
        _, grad = loss_and_gradient(peaked_student, topk, backend=backend, **options)
        _, truth = loss_and_gradient(peaked_student.double(), in_double(topk), backend="reference", **options)
        error = (grad.double() - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-2)
        assert float(error.max()) < 1e-5, f"{lift}: {float(error.max()):.1e}"


def test_a_share_of_1e_9_still_teaches(backend: str) -> None:
    """q and p of the tail differ by far less than float32 resolves beside 1, and the gradient knows it."""
    student = peaked(4, 100, 30.0, 0)
    topk = tgt.topk_teacher(student, 8)
    student.scatter_add_(1, topk.ids, torch.full((4, 8), -1.0))  # e times as much in the tail
    _, grad = loss_and_gradient(student, topk, backend=backend, reduction="none")
    assert topk.tail_log_prob is not None
    wanted = (math.e - 1.0) * topk.tail_log_prob.exp()
    torch.testing.assert_close(grad.scatter(1, topk.ids, 0.0).sum(-1), wanted, rtol=1e-4, atol=0.0)


@tails
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_record_of_16_bits_does_no_harm(backend: str, tail: str, dtype: torch.dtype) -> None:
    student = logits(6, 60, 0)
    topk = tgt.topk_teacher(student, 5, tail=tail)
    assert topk.tail_log_prob is not None
    topk = dataclasses.replace(
        topk, log_probs=topk.log_probs.to(dtype), tail_log_prob=topk.tail_log_prob.to(dtype),
        ids=topk.ids.to(torch.int32),
    )  # fmt: skip
    for divergence in TOPK_DIVERGENCES:
        loss, _ = check(student, topk, backend=backend, divergence=divergence, reduction="none")
        assert (loss >= 0).all()


def test_the_comparison_fails_for_wrong_results() -> None:
    student, topk = logits(4, 30, 0), tgt.topk_teacher(logits(4, 30, 1), 5)
    loss, grad = loss_and_gradient(student, topk, reduction="none")
    for wrong in (
        (loss * 0, grad),
        (loss, grad * 0),
        (loss, grad * 1.05),
        (loss * 1.05, grad),
        (loss, grad.roll(1, 0)),
    ):
        with pytest.raises(AssertionError):
            assert_near(wrong, (loss, grad), student, topk, hard=False, divergence="forward_kl")


# Bounds


@settings(max_examples=60)
@given(
    divergence=st.sampled_from(("forward_kl", "reverse_kl", "jsd")), dtype=st.sampled_from(DTYPES),
    classes=st.integers(2, 60), k=st.integers(1, 60), seed=st.integers(0, 2**31),
    scale=st.sampled_from((0.1, 1.0, 8.0)), temperature=st.sampled_from((0.5, 1.0, 4.0)), near=st.booleans(),
    masked=st.booleans(),
)  # fmt: skip
def test_bucketing_loses_information_and_never_more(
    native: str, divergence: str, dtype: torch.dtype, classes: int, k: int, seed: int, scale: float, temperature: float,
    near: bool, masked: bool,
) -> None:  # fmt: skip
    """A divergence cut to k classes and not renormalised goes negative, and pays a student for what is missing.

    0 <= the bucketed divergence <= the dense one.
    """
    teacher = logits(4, classes, seed) * scale
    student = teacher + 1e-3 * logits(4, classes, seed + 1) if near else logits(4, classes, seed + 1) * scale
    if masked:  # padding, on both sides
        teacher[:, classes // 2 + 1 :] = student[:, classes // 2 + 1 :] = -INF
    student, teacher = student.to(dtype), teacher.to(dtype)
    topk = tgt.topk_teacher(teacher, min(k, classes), temperature)
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    for backend in ("reference", native):
        bucketed = tgt.distillation_loss(student, topk, backend=backend, **options)
        dense = tgt.distillation_loss(student.double(), teacher.double(), backend="reference", **options)
        assert (bucketed >= 0).all()
        slack = 1e-5 * max(1.0, magnitude(student, teacher) / temperature / 10) * (dense + 1e-2 * temperature**2)
        assert (bucketed.double() <= dense + slack).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_zero_exactly_where_the_buckets_are_equal(backend: str, divergence: str) -> None:
    teacher = logits(6, 40, 0, dtype=torch.float64)
    topk = tgt.topk_teacher(teacher, 5, 2.0)
    student = teacher + 7.0  # the same distribution, and then another within the bucket
    others = teacher.scatter(1, topk.ids, INF).isfinite()
    shuffled = student.clone()
    for i in range(6):
        shuffled[i, others[i]] = student[i, others[i]].roll(3)
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "reduction": "none"}
    for same in (student, shuffled):
        loss, grad = loss_and_gradient(same, topk, **options)
        assert loss.max() < 1e-13
        assert grad.abs().max() < 1e-13
    moved = student.scatter_add(1, topk.ids[:, :1], torch.full((6, 1), 0.01, dtype=torch.float64))
    assert (loss_and_gradient(moved, topk, **options)[0] > 1e-7).all()


# Masks, rows that are no distribution, rows that do not count


@divergences
@tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(backend: str, divergence: str, tail: str, dtype: torch.dtype) -> None:
    student, teacher = logits(10, 37, 0, dtype=dtype), logits(10, 37, 1)
    student[1, 30:] = teacher[1, 30:] = -INF  # padding
    ids = tgt.topk_teacher(teacher, 5).ids
    student[2, ids[2, 3]] = -INF  # a listed class that the student cannot give
    others = torch.ones(10, 37, dtype=torch.bool).scatter(1, ids, False)
    student[3, others[3]] = -INF  # the student cannot give the tail
    teacher[4, others[4]] = -INF  # the teacher does not
    student[5, others[5]] = -INF
    teacher[5, others[5]] = -INF  # neither
    teacher[6, ids[6, 2:]] = -INF
    teacher[6, others[6]] = -INF  # two entries and three of padding
    student[7, others[7].nonzero()[0]] = -INF  # one class of the tail
    student[8, ids[8]] = -INF  # nothing but the tail
    topk = tgt.topk_teacher(teacher, 5, tail=tail)
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "reduction": "none"}
    loss, grad = check(student, topk, **options)
    assert grad[~grad.isnan()].isfinite().all()
    assert grad[student == -INF][~grad[student == -INF].isnan()].eq(0).all()
    assert grad[loss == INF].eq(0).all()
    infinite = {
        "bucket": {"forward_kl": [2, 3, 8], "cross_entropy": [2, 3, 8], "reverse_kl": [4, 6], "jsd": []},
        "uniform": {"forward_kl": [2, 3, 8], "cross_entropy": [2, 3, 8], "reverse_kl": [4, 6], "jsd": []},
        "renormalize": {"forward_kl": [2], "cross_entropy": [2], "reverse_kl": [], "jsd": []},
    }[tail][divergence]
    assert loss.isinf().nonzero().flatten().tolist() == infinite
    assert loss.isnan().nonzero().flatten().tolist() == ([8] if tail == "renormalize" else [])
    check(student, topk, targets(10, 37, 3), hard_weight=0.5, label_smoothing=0.1, **options)


@tails
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_no_distribution_is_nan_alone(backend: str, tail: str, dtype: torch.dtype) -> None:
    student, teacher = logits(9, 37, 0, dtype=dtype), logits(9, 37, 1)
    topk = tgt.topk_teacher(teacher, 4, tail=tail)
    target = targets(9, 37, 2)
    options: dict[str, Any] = {"backend": backend, "divergence": "jsd", "reduction": "none", "hard_weight": 0.5}
    clean = loss_and_gradient(student, topk, target, **options)
    student[1, topk.ids[1, 0]], student[2, 36], student[3, 0] = math.nan, math.nan, INF
    student[4] = -INF
    topk.log_probs[5, 1], topk.log_probs[6, 0] = math.nan, INF
    topk.log_probs[7] = -INF
    if topk.tail_log_prob is not None:
        topk.tail_log_prob[7] = -INF
    loss, grad = loss_and_gradient(student, topk, target, **options)
    bad = torch.tensor([False] + [True] * 7 + [False])
    assert loss[bad].isnan().all()
    assert grad[bad].isnan().all()
    assert torch.equal(loss[~bad], clean[0][~bad])
    assert torch.equal(grad[~bad], clean[1][~bad])
    weight = (~bad).float()  # dropped, whatever they hold
    loss, grad = loss_and_gradient(student, topk, target, sample_weight=weight, **options)
    assert loss[bad].eq(0).all()
    assert grad[bad].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reductions_weights_and_rows_that_do_not_count(backend: str, reduction: str, dtype: torch.dtype) -> None:
    student, topk = logits((2, 3), 20, 0, dtype=dtype), tgt.topk_teacher(logits((2, 3), 20, 1), 4, 2.0)
    target, weight = torch.tensor([[3, -100, -1], [19, 0, 5]]), torch.tensor([[1.0, 1.0, 0.5], [2.0, 0.0, 1.0]])
    options: dict[str, Any] = {
        "backend": backend, "reduction": reduction, "divergence": "forward_kl", "hard_weight": 0.5,
    }  # fmt: skip
    per_row = 1 / 4.5 if reduction == "mean" else 2.0
    loss, grad = check(student, topk, target, sample_weight=weight, per_row=per_row, **options)
    assert grad[0, 1].eq(0).all()
    assert grad[1, 1].eq(0).all()
    if reduction == "mean":
        for normalizer in (9.0, torch.tensor(9.0)):
            halved = check(student, topk, target, sample_weight=weight, normalizer=normalizer, per_row=0.2, **options)
            torch.testing.assert_close(halved[0], loss / 2)
        loss, grad = loss_and_gradient(student, topk, target, normalizer=0.0, **options)
        assert loss == 0
        assert grad.eq(0).all()
    if reduction == "none":
        check(student, topk, target, upstream=torch.rand(2, 3), **options)


def test_without_a_soft_term_the_record_is_not_read(backend: str) -> None:
    student, target = logits(4, 30, 0), targets(4, 30, 1)
    topk = TeacherTopK(torch.full((4, 3), 99), torch.full((4, 3), math.nan), None, 1.0, 30)
    loss, grad = loss_and_gradient(student, topk, target, soft_weight=0.0, hard_weight=1.0, backend=backend)
    leaf = student.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0])


def test_no_rows(backend: str) -> None:
    topk = tgt.topk_teacher(torch.zeros(0, 7), 3)
    loss, grad = loss_and_gradient(torch.zeros(0, 7), topk, backend=backend)
    assert loss == 0
    assert grad.shape == (0, 7)


def test_extreme_temperatures(backend: str) -> None:
    student, teacher = logits(6, 200, 0), logits(6, 200, 1)
    for temperature in (0.05, 100.0):
        for tail in TAILS:
            topk = tgt.topk_teacher(teacher, 9, temperature, tail=tail)
            for divergence in TOPK_DIVERGENCES:
                check(student, topk, backend=backend, divergence=divergence, reduction="none")
