"""Logits at the ends of float32, where differences leave its range."""

from typing import Any

import pytest
import torch
from numerics import distillation_loss, evaluate, truth
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric", "jsd", "tvd", "cross_entropy", "mse")

ROWS = torch.tensor(
    [
        [[2e38, 0.0, -1e38], [0.0, 1.0, 2.0]],
        [[0.0, 1.0, 2.0], [-3e38, 1e38, 0.0]],
        [[2e38, -2e38, 5.0], [-1e38, 2e38, 5.0]],
        [[1.0, -3.4e38, 5.0], [1.0, 2.0, 3.0]],
        [[3e37, 1.0, 5.0], [1.0, 2e37, 3.0]],
        [[1.0, 2.0, 5.0], [1.0, 4.0, 3.0]],
    ]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_near_the_largest_number(backend: str, divergence: str, dtype: torch.dtype) -> None:
    student, teacher = ROWS.to(dtype).unbind(1)
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
    bar = 1e-2 if dtype == torch.bfloat16 else 1e-5
    with_labels: dict[str, Any] = {"target": torch.tensor([0, 1, 2, 2, 0, 1]), "hard_weight": 0.5}
    for hard in ({}, with_labels):
        for temperature in (1.0, 4.0):
            made = evaluate(student, teacher, backend=backend, temperature=temperature, **options, **hard)
            expected = truth(student, teacher, temperature=temperature, **options, **hard)
            torch.testing.assert_close(made.loss, expected.loss.float(), rtol=1e-5, atol=1e-6)
            if divergence == "symmetric":  # of its gradients' truth float64 leaves too little: 1 + (2e38 - 2e38)
                continue
            for out, want in ((made.d_student, expected.d_student), (made.d_teacher, expected.d_teacher)):
                assert out is not None
                assert want is not None
                torch.testing.assert_close(out, want.to(dtype), rtol=bar, atol=1e-5)


LOWEST = torch.finfo(torch.float32).min
MASKED = torch.tensor(
    [
        [[LOWEST, 1.0, 2.0, 0.0], [LOWEST, 2.0, 1.0, 0.5]],  # as attention masks its scores, on both sides
        [[LOWEST, 1.0, 2.0, 0.0], [-30.0, 2.0, 1.0, 0.5]],  # where little mass has far to go
        [[-3e38, 1.0, 2.0, 0.0], [-60.0, 2.0, 1.0, 0.5]],
        [[-30.0, 1.0, 2.0, 0.0], [LOWEST, 2.0, 1.0, 0.5]],
        [[3e38, 1.0, LOWEST, 0.0], [0.0, 0.0, 0.0, 0.0]],  # further apart than the largest number
        [[0.0, 0.0, 0.0, 0.0], [3e38, 1.0, LOWEST, 0.0]],
        [[1.0, 2.0, 3.0, 2e38], [-40.0, 2.0, 1.0, 2e38]],
    ]
)


def wide(rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The same rows with other classes before, between and behind theirs, all of little mass."""
    sides = torch.full((2, len(rows), classes), -7.0)
    for at, column in enumerate(torch.linspace(0, classes - 1, rows.shape[-1]).long().tolist()):
        sides[:, :, column] = rows[:, :, at].T
    return sides[0], sides[1]


@pytest.mark.parametrize("classes", [4, 1003, 9001, 17003])  # a warp, a block, clusters and tiles, rows read twice
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_differences_beyond_the_largest_number(backend: str, divergence: str, classes: int) -> None:
    student, teacher = wide(MASKED, classes)
    target = torch.tensor([1, 0, 0, 0, 0, classes - 1, 0])
    hard = {"target": target, "hard_weight": 0.5}
    cases: list[tuple[float, dict[str, Any]]] = [(1.0, {}), (0.25, hard), (4.0, {**hard, "label_smoothing": 0.1})]
    for temperature, options in cases:
        given: dict[str, Any] = {"divergence": divergence, "temperature": temperature, **options}
        shares = torch.full((len(student),), 1e-6)  # what they leave is in range
        given |= {"sample_weight": shares, "reduction": "none"}
        expected = truth(student, teacher, **given)
        made = evaluate(student, teacher, backend=backend, **given)
        torch.testing.assert_close(made.loss, expected.loss.float(), rtol=1e-5, atol=1e-9)
        for out, want in ((made.d_student, expected.d_student), (made.d_teacher, expected.d_teacher)):
            assert out is not None
            assert want is not None
            if divergence == "symmetric":  # of float64, too, a sum of 1 and 2e38 leaves too little
                out, want = out[:4], want[:4]
            # Of each row: of classes as far away as their mean differences from it leave four digits
            error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-9)
            assert float(error.max()) < 1e-4


@pytest.mark.parametrize("classes", [4, 9001])
def test_statistics_of_differences_beyond_the_largest_number(backend: str, classes: int) -> None:
    student, teacher = wide(MASKED, classes)
    for temperature in (0.25, 4.0):
        options: dict[str, Any] = {"temperature": temperature, "return_stats": True}
        stats = distillation_loss(student, teacher, backend=backend, **options)[1]
        expected = distillation_loss(student.double(), teacher.double(), backend="reference", **options)[1]
        for name, got, want in zip(stats._fields, stats, expected, strict=True):
            torch.testing.assert_close(
                got, want.to(got.dtype), rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
