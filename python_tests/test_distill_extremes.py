"""Logits at the ends of float32, where differences leave its range."""

from typing import Any

import pytest
import torch
from numerics import evaluate, truth

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
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric", "jsd", "tvd", "cross_entropy", "mse"])
def test_logits_near_the_largest_number(host_backend: str, divergence: str, dtype: torch.dtype) -> None:
    student, teacher = ROWS.to(dtype).unbind(1)
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
    bar = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for hard in ({}, {"target": torch.tensor([0, 1, 2, 2, 0, 1]), "hard_weight": 0.5}):
        for temperature in (1.0, 4.0):
            made = evaluate(student, teacher, backend=host_backend, temperature=temperature, **options, **hard)
            expected = truth(student, teacher, temperature=temperature, **options, **hard)
            torch.testing.assert_close(made.loss, expected.loss.float(), rtol=1e-5, atol=1e-6)
            if divergence == "symmetric":  # of its gradients' truth float64 leaves too little: 1 + (2e38 - 2e38)
                continue
            for out, want in ((made.d_student, expected.d_student), (made.d_teacher, expected.d_teacher)):
                assert out is not None
                assert want is not None
                torch.testing.assert_close(out, want.to(dtype), rtol=bar, atol=1e-5)
