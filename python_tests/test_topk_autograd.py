"""The loss against a top-k record in autograd: backward twice, in place, both paths, compiled steps, the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import logits, targets
from topk_kit import in_double, loss_and_gradient, tails
from torch import Tensor

import tgt_fast as tgt
from tgt_fast import TeacherTopK

pytestmark = pytest.mark.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_runs_as_often_as_it_is_asked(backend: str, dtype: torch.dtype) -> None:
    """A buffer scaled in place and handed out again would give the second caller a gradient scaled twice."""
    student, topk = logits(4, 30, 0, dtype=dtype).requires_grad_(), tgt.topk_teacher(logits(4, 30, 1), 5, 2.0)
    loss = tgt.distillation_loss(student, topk, targets(4, 30, 2), temperature=2.0, hard_weight=1.0, backend=backend)
    grads = [torch.autograd.grad(3.0 * loss, student, retain_graph=True)[0] for _ in range(3)]
    torch.testing.assert_close(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])
    (once,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grads[0], 3 * once)


def test_a_record_that_changed_before_a_second_backward_is_an_error(native: str) -> None:
    student, topk = logits(4, 30, 0).requires_grad_(), tgt.topk_teacher(logits(4, 30, 1), 5)
    loss = tgt.distillation_loss(student, topk)
    torch.autograd.grad(loss, student, retain_graph=True)
    topk.ids[0, 0] = 29
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student)


def test_a_second_derivative_is_refused(native: str) -> None:
    student, topk = logits(4, 30, 0).requires_grad_(), tgt.topk_teacher(logits(4, 30, 1), 5)
    (grad,) = torch.autograd.grad(tgt.distillation_loss(student, topk), student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_place(backend: str, dtype: torch.dtype, tail: str) -> None:
    student = logits(4, 5000, 0, dtype=dtype)
    topk = tgt.topk_teacher(logits(4, 5000, 1), 40, tail=tail)
    options: dict[str, Any] = {"backend": backend, "divergence": "jsd", "hard_weight": 1.0}
    loss, grad = loss_and_gradient(student, topk, targets(4, 5000, 2), **options)
    copy = student.clone()
    leaf = student.clone().requires_grad_()
    logits_of_a_layer = leaf * 1.0
    placed = tgt.distillation_loss(
        logits_of_a_layer, topk, targets(4, 5000, 2), inplace=backend != "reference", **options
    )
    assert torch.equal(placed.detach(), loss)
    placed.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, grad)
    assert torch.equal(student, copy)


def test_float16_gradients_of_many_rows_do_not_underflow(backend: str) -> None:
    student, topk = logits(64, 50, 0, dtype=torch.float16), tgt.topk_teacher(logits(64, 50, 1), 5)
    scale, rows = 2.0**14, 2.0**20
    _, grad = loss_and_gradient(
        student, topk, backend=backend, normalizer=rows, upstream=torch.tensor(scale)
    )  # fmt: skip
    _, one = loss_and_gradient(student.double(), in_double(topk), backend="reference", reduction="sum")
    torch.testing.assert_close(grad.double(), one * scale / rows, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@tails
def test_both_doors_give_the_same_bits(native: str, dtype: torch.dtype, tail: str) -> None:
    student, topk = logits((3, 2), 57, 0, dtype=dtype), tgt.topk_teacher(logits((3, 2), 57, 1), 6, 2.0, tail=tail)
    target = targets(6, 57, 2).reshape(3, 2)
    options: dict[str, Any] = {"hard_weight": 0.5, "reduction": "none", "upstream": torch.rand(3, 2)}
    direct = loss_and_gradient(student, topk, target, **options)
    with torch.device("cpu"):  # a function mode sends the call through the dispatcher
        dispatched = loss_and_gradient(student, topk, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


def test_the_result_does_not_depend_on_the_number_of_threads(native: str) -> None:
    student, topk = logits(64, 4000, 0), tgt.topk_teacher(logits(64, 4000, 1), 32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(loss_and_gradient(student, topk, targets(64, 4000, 2), hard_weight=1.0))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.once("torch.compile")
def test_compiled_steps() -> None:
    student, teacher, target = logits(6, 40, 0), logits(6, 40, 1), targets(6, 40, 2)
    topk = tgt.topk_teacher(teacher, 5, 2.0)

    def given(s: Tensor, r: TeacherTopK, y: Tensor) -> Tensor:
        return tgt.distillation_loss(s * 1.5, r, y, temperature=2.0, hard_weight=0.5)

    def made(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return given(s, tgt.topk_teacher(t, 5, 2.0), y)

    for function, other in ((given, topk), (made, teacher)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = []
        for run in (function, compiled):
            leaf = student.clone().requires_grad_()
            loss = run(leaf, other, target)  # type: ignore[arg-type]
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_the_module_takes_a_record() -> None:
    student, topk, target = logits(4, 30, 0), tgt.topk_teacher(logits(4, 30, 1), 5, 2.0), targets(4, 30, 2)
    module = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0)
    expected = tgt.distillation_loss(student, topk, target, temperature=2.0, hard_weight=1.0)
    assert torch.equal(module(student, topk, target), expected)  # type: ignore[arg-type]
    assert torch.equal(module.soft(student, topk), tgt.distillation_loss(student, topk, temperature=2.0))  # type: ignore[arg-type]
