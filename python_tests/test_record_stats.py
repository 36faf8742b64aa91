"""Statistics of a student beside a top-k record: mass and overlap on the classes that it lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toys

import tgt_fast as tgt


def test_by_hand() -> None:
    """q = (1/2, 1/4, 1/8, 1/8) and p = (0.4, 0.1, 0.4, 0.1): a record of two lists the first and the third."""
    s, t = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log(), torch.tensor([[4.0, 1.0, 4.0, 1.0]]).log()
    for tail, mass in (("bucket", 0.8), ("renormalize", 1.0), ("uniform", 0.8)):
        record = tgt.topk_teacher(t, 2)
        record = tgt.TeacherTopK(record.ids, record.log_probs, record.tail_log_prob, 1.0, 4, tail=tail)
        _, stats = tgt.distillation_loss(s, record, return_stats=True)
        assert isinstance(stats, tgt.RecordStats)
        assert stats.student_mass.item() == pytest.approx(0.625)
        assert stats.teacher_mass.item() == pytest.approx(mass)
        assert stats.overlap.item() == pytest.approx(min(0.5, mass / 2) + 0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(dtype: torch.dtype) -> None:
    """Against all classes, for rows that count; the loss and its gradient are what they are without."""
    s, t = (toys.normal(2, 5, 40, seed=seed).to(dtype) * 2 for seed in (0, 1))
    s[1, 4, 7] = math.nan
    y = torch.full((2, 5), 3)
    y[0, 1] = -100
    record = tgt.topk_teacher(t, 6, 2.0)
    s.requires_grad_()
    options: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.5}
    plain = tgt.distillation_loss(s, record, y, **options)
    loss, stats = tgt.distillation_loss(s, record, y, return_stats=True, **options)
    assert torch.equal(loss, plain) or bool(loss.isnan() & plain.isnan())
    p = record.log_probs.double().exp()
    q = torch.softmax(s.detach().double() / 2, -1).gather(-1, record.ids.long())
    counts = y != -100
    for found, expected in zip(stats, (q.sum(-1), p.sum(-1), torch.minimum(p, q).sum(-1)), strict=True):
        assert found.dtype == torch.float32
        assert found.shape == (2, 5)
        assert not found.requires_grad
        torch.testing.assert_close(
            found.double(), torch.where(counts, expected, 0.0), equal_nan=True, atol=1e-6, rtol=0
        )
    assert stats.student_mass[1, 4].isnan()
    assert (stats.overlap <= stats.teacher_mass + 1e-6).sum() == 9


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_from_hidden_states(tail: str, backend: str) -> None:
    """In chunks, of a smaller vocabulary than the record's, and inside a compiler: as from the logits."""
    hidden, weight, t = (
        toys.normal(rows, width, seed=seed) for seed, (rows, width) in enumerate([(7, 5), (9, 5), (7, 9)])
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    y = torch.tensor([1, -100, 3, -1, 0, 2, 4])
    record = tgt.topk_teacher(t[:, :8] if tail == "renormalize" else t, 4, 2.0, tail=tail)
    size: dict[str, Any] = {"vocab_size": 8} if tail == "renormalize" else {}
    options: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.5, "return_stats": True, "backend": backend}
    s = hidden @ weight.T
    _, expected = tgt.distillation_loss(s[:, :8] if size else s, record, y, **options)

    def step(**changed: Any) -> Any:
        return tgt.linear_distillation_loss(
            hidden, weight, None, None, y, teacher_logits=record, memory_budget=400, **{**size, **options, **changed}
        )

    made, plain = step(), step(return_stats=False)
    assert torch.equal(made[0], plain)
    made[0].backward()
    results = [made]
    if backend == "native":
        results.append(torch.compile(step, backend="aot_eager", fullgraph=True)())
        module = tgt.LinearDistillationLoss(memory_budget=400, **size, **options)
        results.append(module(hidden, weight, None, None, y, teacher_logits=record))
    for _, stats in results:
        assert isinstance(stats, tgt.RecordStats)
        for found, its in zip(stats, expected, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, its)


def test_what_has_none() -> None:
    empty = tgt.topk_teacher(torch.zeros(0, 8), 3)
    _, stats = tgt.distillation_loss(torch.zeros(0, 8), empty, return_stats=True)
    assert all(value.shape == (0,) for value in stats)
