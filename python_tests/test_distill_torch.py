"""The loss among other features of PyTorch: inplace on views, inference mode, negation, forward mode, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, BackendError


def test_inplace_refuses_rows_that_share_memory(native: str) -> None:
    base = torch.randn(7, requires_grad=True)
    logits = (base * 1.0).expand(5, 7)
    with pytest.raises(ArgumentError, match="apart from each other"):
        tgt.distillation_loss(logits, torch.randn(5, 7), inplace=True, backend=native)


@pytest.mark.parametrize("view", [lambda p: p.view(8, 5), lambda p: p[:, :5]], ids=["reshaped", "sliced"])
def test_inplace_refuses_a_view_of_a_leaf(native: str, view: Callable[[Tensor], Tensor]) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 10))
    before = parameter.detach().clone()
    logits = view(parameter)
    with pytest.raises(ArgumentError, match="a leaf that requires grad"):
        tgt.distillation_loss(logits, torch.randn(logits.shape), inplace=True, backend=native)
    assert torch.equal(parameter, before)


def test_inplace_has_no_second_derivative(native: str) -> None:
    base = torch.randn(4, 5, requires_grad=True)
    loss = (base**3).sum() + tgt.distillation_loss(base * 1.0, torch.randn(4, 5), inplace=True, backend=native)
    with pytest.raises(RuntimeError, match="inplace=True has no second derivative"):
        torch.autograd.grad(loss, base, create_graph=True)


def test_a_teachers_logits_may_come_from_inference_mode(native: str) -> None:
    student = torch.randn(4, 5, requires_grad=True)
    with torch.inference_mode():
        teacher = torch.randn(4, 5)
    loss = tgt.distillation_loss(student, teacher, backend=native)
    expected = tgt.distillation_loss(student, teacher.clone(), backend="reference")
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    (reference,) = torch.autograd.grad(expected, student)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, reference)


def test_lazily_negated_logits_are_read_as_negated(native: str) -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    lazy = tgt.distillation_loss(torch._neg_view(student), teacher, backend=native)
    assert torch.equal(lazy, tgt.distillation_loss(-student, teacher, backend=native))


def test_forward_mode_goes_to_the_reference(native: str) -> None:
    import torch.autograd.forward_ad as forward

    student, teacher, tangent = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    with forward.dual_level():
        dual = forward.make_dual(student, tangent)
        with pytest.raises(BackendError, match="backend='reference'"):
            tgt.distillation_loss(dual, teacher, backend=native)
        slope = forward.unpack_dual(tgt.distillation_loss(dual, teacher)).tangent
    leaf = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tgt.distillation_loss(leaf, teacher), leaf)
    torch.testing.assert_close(slope, (grad * tangent).sum())


def test_a_compiled_function_of_the_hard_weight(native: str) -> None:
    student, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])

    def loss(weight: float) -> Tensor:
        return tgt.distillation_loss(student, teacher, target, hard_weight=weight)

    compiled = torch.compile(loss, backend="eager")
    for weight in (1.0, 0.5, 0.25):
        torch.testing.assert_close(compiled(weight), loss(weight), rtol=0, atol=0)
