"""The assertions of ``numerics.py`` must be able to fail."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import (
    Result,
    assert_close,
    assert_matches_truth,
    evaluate,
    logits,
    relative_error,
    truth,
)
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def scaled(x: Tensor) -> Tensor:
    return x * 1.05


def swapped(x: Tensor) -> Tensor:
    return x[torch.tensor([1, 0, *range(2, x.shape[0])])]


def poisoned(x: Tensor) -> Tensor:
    out = x.clone()
    out.view(-1)[-1] = math.nan
    return out


def one_element_off(x: Tensor) -> Tensor:
    """The largest element of the smallest row is 10 % off: invisible in the norm of the whole."""
    out = x.clone()
    rows = out.view(out.shape[0], -1)
    row = rows[rows.double().norm(dim=-1).argmin()]
    row[row.abs().argmax()] *= 1.1
    return out


CORRUPTIONS = [zeros, scaled, swapped, poisoned]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_loss_and_gradient_assertion_can_fail(
    divergence: str, dtype: torch.dtype, corrupt: Callable[[Tensor], Tensor]
) -> None:
    student, teacher = logits(6, 17, 0, dtype=dtype), logits(6, 17, 1, dtype=dtype)
    result = evaluate(student, teacher, backend="reference", divergence=divergence, reduction="none")
    expected = truth(student, teacher, divergence=divergence, reduction="none")
    assert_matches_truth(result, expected, student, teacher)
    for field in ("loss", "d_student", "d_teacher"):
        value = getattr(result, field)
        changes: dict[str, Any] = {field: corrupt(value)}
        wrong = dataclasses.replace(result, **changes)
        with pytest.raises(AssertionError, match=field):
            assert_matches_truth(wrong, expected, student, teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_in_a_small_row_is_seen(dtype: torch.dtype) -> None:
    student, teacher = logits(40, 17, 0, dtype=dtype), logits(40, 17, 1, dtype=dtype)
    result = evaluate(student, teacher, backend="reference", reduction="none")
    expected = truth(student, teacher, reduction="none")
    assert result.d_student is not None
    wrong = dataclasses.replace(result, d_student=one_element_off(result.d_student))
    with pytest.raises(AssertionError, match="d_student"):
        assert_matches_truth(wrong, expected, student, teacher)


def test_probabilities_rounded_to_bf16_exceed_the_bar() -> None:
    """The error of a softmax in bf16 is far above the bar, though the loss looks right."""
    student, teacher = logits(64, 1000, 0, dtype=torch.bfloat16), logits(64, 1000, 1, dtype=torch.bfloat16)
    expected = truth(student, teacher, reduction="none", needs=(True, False))
    leaf = student.clone().requires_grad_()
    log_q, log_p = torch.log_softmax(leaf, -1), torch.log_softmax(teacher, -1)
    loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    naive = Result(expected.loss.float(), torch.autograd.grad(loss.sum(), leaf)[0], None)
    with pytest.raises(AssertionError, match="d_student"):
        assert_matches_truth(naive, expected, student, teacher)


def test_wrong_dtypes_and_missing_gradients_are_seen() -> None:
    student, teacher = logits(4, 10, 0), logits(4, 10, 1)
    result, expected = evaluate(student, teacher, backend="reference"), truth(student, teacher)
    assert result.d_teacher is not None
    for wrong in (
        dataclasses.replace(result, loss=result.loss.double()),
        dataclasses.replace(result, d_student=None),
        dataclasses.replace(result, d_teacher=result.d_teacher.double()),
    ):
        with pytest.raises(AssertionError):
            assert_matches_truth(wrong, expected, student, teacher)


def test_infinities_must_be_at_the_same_places() -> None:
    reference = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert_close("x", reference.clone(), reference, bar=1e-6, floor=1e-2)
    for wrong in (
        [1.0, -math.inf, -math.inf, math.nan],
        [1.0, 3e38, -math.inf, math.nan],
        [1.0, math.inf, -math.inf, 0.0],
    ):
        with pytest.raises(AssertionError):
            assert_close("x", torch.tensor(wrong), reference, bar=1e-6, floor=1e-2)


def test_relative_error_uses_the_floor_and_refuses_other_shapes() -> None:
    assert relative_error(torch.tensor([1e-3]), torch.tensor([0.0]), 1e-2) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="shape"):
        relative_error(torch.zeros(2), torch.zeros(1, 2), 1.0)
