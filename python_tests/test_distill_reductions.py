"""Reductions: which rows count, what the sum is divided by, and that micro-batches add up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import check, distillation_loss, evaluate, logits, targets
from strategies import DTYPES
from torch import Tensor

from tgt_fast.kernels.options import DIVERGENCES


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """12 rows of 20 classes, with dropped and unlabeled rows and a row of weight 0."""
    target = targets(12, 20, 2)
    target[3], target[7], target[8] = -100, -1, -100
    weight = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 0.5
    weight[5] = 0.0
    return logits(12, 20, 0), logits(12, 20, 1), target, weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_reductions_with_weights_and_dropped_rows(
    backend: str, divergence: str, reduction: str, weighted: bool, dtype: torch.dtype
) -> None:
    student, teacher, target, weight = batch()
    student, teacher = student.to(dtype), teacher.to(dtype)
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "reduction": reduction}
    if weighted:
        options["sample_weight"] = weight
    per_row = 1.0 / 10.0 if reduction == "mean" else 1.0
    check(student, teacher, target, backend=backend, per_row=per_row, **options)


@pytest.mark.parametrize(
    "normalizer", [3.0, 7, torch.tensor(5.0), torch.tensor(4), torch.tensor(2.5, dtype=torch.float64)]
)
def test_normalizer_replaces_the_divisor(backend: str, normalizer: float | Tensor) -> None:
    student, teacher, target, _ = batch()
    options: dict[str, Any] = {"hard_weight": 1.0, "backend": backend}
    total = evaluate(student, teacher, target, reduction="sum", **options)
    ours = evaluate(student, teacher, target, normalizer=normalizer, **options)
    torch.testing.assert_close(ours.loss, total.loss / float(normalizer))
    torch.testing.assert_close(ours.d_student, total.d_student / float(normalizer))  # type: ignore[operator]


@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0.0)])
def test_a_normalizer_of_zero_gives_zero(backend: str, normalizer: float | Tensor) -> None:
    student, teacher, target, _ = batch()
    student[0, 0] = math.nan
    result = evaluate(student, teacher, target, backend=backend, hard_weight=1.0, normalizer=normalizer)
    assert result.loss == 0
    assert result.d_student is not None
    assert result.d_student.eq(0).all()
    assert result.d_teacher is not None
    assert result.d_teacher.eq(0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_counted_is_zero_not_nan(backend: str, divergence: str) -> None:
    student, teacher, _, _ = batch()
    options: dict[str, Any] = {"backend": backend, "divergence": divergence}
    for result in (
        evaluate(student, teacher, torch.full((12,), -100), hard_weight=1.0, **options),
        evaluate(student, teacher, sample_weight=torch.zeros(12), **options),
    ):
        assert result.loss == 0
        assert result.d_student is not None
        assert result.d_student.eq(0).all()
        assert result.d_teacher is not None
        assert result.d_teacher.eq(0).all()


def test_accumulation_1x32_equals_4x8_with_unequal_valid_rows(backend: str) -> None:
    """With the global count as normalizer, micro-batches add up to the batch whatever rows they drop."""
    student, teacher, target = logits(32, 50, 0), logits(32, 50, 1), targets(32, 50, 2)
    target[:7], target[9], target[17] = -100, -100, -1  # 1, 7, 8 and 8 valid rows
    count = int((target != -100).sum())
    options: dict[str, Any] = {"backend": backend, "hard_weight": 0.5, "temperature": 2.0}
    whole = evaluate(student, teacher, target, **options)
    parts = [
        evaluate(s, t, y, normalizer=count, **options)
        for s, t, y in zip(student.split(8), teacher.split(8), target.split(8), strict=True)
    ]
    torch.testing.assert_close(torch.stack([p.loss for p in parts]).sum(), whole.loss, rtol=1e-6, atol=0)
    for name in ("d_student", "d_teacher"):
        torch.testing.assert_close(
            torch.cat([getattr(p, name) for p in parts]), getattr(whole, name), rtol=1e-6, atol=1e-9
        )
    naive = torch.stack([evaluate(s, t, y, **options).loss for s, t, y in zip(
        student.split(8), teacher.split(8), target.split(8), strict=True)]).mean()  # fmt: skip
    assert not torch.allclose(naive, whole.loss, rtol=1e-3)  # the mean of means is something else


@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_size_of_the_soft_term_does_not_depend_on_the_number_of_classes(backend: str, classes: int) -> None:
    """Only two classes have mass, q = (3/4, 1/4), p = (1/2, 1/2): the loss and its ratio to CE are fixed."""
    student = torch.full((4, classes), -math.inf)
    teacher = student.clone()
    student[:, 0], student[:, 1] = math.log(3.0), 0.0
    teacher[:, :2] = 0.0
    soft = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    hard = -math.log(0.75)
    value = distillation_loss(student, teacher, backend=backend)
    assert float(value) == pytest.approx(soft, rel=1e-5)
    mixed = distillation_loss(student, teacher, torch.zeros(4, dtype=torch.int64), hard_weight=1.0, backend=backend)
    assert float(mixed) == pytest.approx(soft + hard, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e300])
def test_weights_may_be_of_any_size(backend: str, scale: float) -> None:
    """A mean is made of shares, which stay in the range of float32 where the weights and their products do not."""
    student, teacher, target, weight = batch()
    weight = weight.double()
    for options in ({}, {"target": target, "hard_weight": 0.5}):
        expected = evaluate(student, teacher, backend=backend, sample_weight=weight, **options)
        out = evaluate(student, teacher, backend=backend, sample_weight=weight * scale, **options)
        given = evaluate(
            student, teacher, backend=backend, sample_weight=weight * scale, normalizer=3 * scale, **options
        ) if scale < 1e30 else out  # fmt: skip
        for made in (out, given):
            assert made.loss.isfinite()
            assert made.loss > 0
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(out.d_student, expected.d_student)
