"""The loss under autograd: upstream gradients, repeated backward, second derivatives, inplace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import assert_matches_truth, check, distillation_loss, evaluate, logits, targets, truth
from strategies import DTYPES
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.options import DIVERGENCES

OPTIONS: dict[str, Any] = {"hard_weight": 0.5, "temperature": 2.0}


def leaves(dtype: torch.dtype = torch.float32, rows: int = 6, classes: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (logits(rows, classes, seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    return student, teacher, targets(rows, classes, 2)


# Upstream gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 3.0, -0.25, 0.0])
def test_a_scalar_upstream_gradient_scales_the_gradient(backend: str, dtype: torch.dtype, upstream: float) -> None:
    student, teacher, target = leaves(dtype)
    per_row = (abs(upstream) or 1.0) / 6
    check(student, teacher, target, backend=backend, upstream=torch.tensor(upstream), per_row=per_row, **OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_upstream_gradient_a_row(backend: str, divergence: str, dtype: torch.dtype) -> None:
    student, teacher, target = leaves(dtype)
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5, 64.0, 2.0**-10])  # powers of 2 round nothing a second time
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none", **OPTIONS}
    check(student, teacher, target, backend=backend, upstream=upstream, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [2.0**-8, 2.0**16])
def test_loss_scaling_reaches_float16_gradients_before_they_are_rounded(
    backend: str, reduction: str, scale: float
) -> None:
    """A mean over 1024 rows has gradients near float16's smallest; times the loss scale they are ordinary."""
    rows = 1024
    student, teacher = (0.25 * logits(rows, 200, seed, dtype=torch.float16) for seed in (0, 1))
    a_row = scale if reduction == "mean" else scale / rows
    upstream = torch.full((rows,) if reduction == "none" else (), a_row)
    result = evaluate(student, teacher, backend=backend, upstream=upstream, reduction=reduction)
    best = truth(student, teacher, upstream=upstream, reduction=reduction).d_student
    assert result.d_student is not None
    assert best is not None
    rounding = (best.half().double() - best).norm()
    assert (result.d_student.double() - best).norm() <= 1.5 * rounding
    rounded_first = (best / scale).half().double() * scale
    assert scale < 1 or (rounded_first - best).norm() > 10 * rounding


def test_gradients_add_up_through_a_larger_graph(backend: str) -> None:
    """The loss as a part of another one, its logits made by a layer: as if torch had computed it."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 33), torch.randn(6, 8)
    teacher, target = logits(6, 33, 1), targets(6, 33, 2)

    def objective(name: str) -> Tensor:
        out: Tensor = layer(x)
        soft = distillation_loss(out, teacher, backend=name, temperature=2.0)
        rows = distillation_loss(out, teacher, target, hard_weight=1.0, reduction="none", backend=name)
        total: Tensor = 3.0 * soft + (rows * torch.arange(6.0)).mean() + 0.1 * out.square().mean()
        return total

    ours = torch.autograd.grad(objective(backend), list(layer.parameters()))
    best = torch.autograd.grad(objective("reference"), list(layer.parameters()))
    torch.testing.assert_close(ours, best, rtol=1e-5, atol=1e-6)


def test_backward_accumulates_into_grad(backend: str) -> None:
    student, teacher, target = leaves()
    (d_student,) = torch.autograd.grad(distillation_loss(student, teacher, target, backend=backend, **OPTIONS), student)
    for times in (1, 2):
        distillation_loss(student, teacher, target, backend=backend, **OPTIONS).backward()
        assert student.grad is not None
        torch.testing.assert_close(student.grad, times * d_student)


# The same graph, more than once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_backward_twice_with_retain_graph_gives_the_same_gradient(
    backend: str, divergence: str, reduction: str, dtype: torch.dtype
) -> None:
    """A buffer scaled in place and handed out again would give the second caller a gradient scaled twice."""
    student, teacher, target = leaves(dtype)
    loss = distillation_loss(
        student, teacher, target, divergence=divergence, reduction=reduction, backend=backend, **OPTIONS
    )
    upstream = 3.0 * torch.ones_like(loss)
    first = torch.autograd.grad(loss, (student, teacher), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(1000.0)  # what a caller does with a gradient is no concern of the next backward
    second = torch.autograd.grad(loss, (student, teacher), upstream, retain_graph=True)
    third = torch.autograd.grad(loss, (student, teacher), upstream)
    for one, two, three in zip(kept, second, third, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-7)
        assert torch.equal(two, three)
    options: dict[str, Any] = {"divergence": divergence, "reduction": reduction, **OPTIONS}
    expected = truth(student, teacher, target, upstream=upstream, **options)
    result = evaluate(student, teacher, target, backend=backend, upstream=upstream, **options)
    again = type(result)(loss.detach(), second[0], second[1])
    assert_matches_truth(
        again, expected, student, teacher, divergence=divergence, temperature=2.0, hard=True, per_row=0.5
    )


def test_backward_without_retain_graph_frees_the_graph(backend: str) -> None:
    student, teacher, target = leaves()
    loss = distillation_loss(student, teacher, target, backend=backend, **OPTIONS)
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_one_side_at_a_time_on_a_retained_graph(backend: str) -> None:
    student, teacher, target = leaves()
    loss = distillation_loss(student, teacher, target, backend=backend, **OPTIONS)
    (d_student,) = torch.autograd.grad(loss, student, retain_graph=True)
    (d_teacher,) = torch.autograd.grad(loss, teacher)
    whole = evaluate(student, teacher, target, backend=backend, **OPTIONS)
    torch.testing.assert_close(d_student, whole.d_student)
    torch.testing.assert_close(d_teacher, whole.d_teacher)


# Second derivatives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_backward_is_a_clear_error_on_the_compiled_core(native: str, dtype: torch.dtype) -> None:
    student, teacher, target = leaves(dtype)
    loss = distillation_loss(student, teacher, target, backend=native, **OPTIONS)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"distillation_loss.*reference"):
        grad.float().square().sum().backward()


def test_double_backward_works_on_the_reference() -> None:
    student, teacher, target = leaves(torch.float64)
    loss = distillation_loss(student, teacher, target, backend="reference", **OPTIONS)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    curvature, cross = torch.autograd.grad(grad.square().sum(), (student, teacher))
    step = 1e-5 * torch.ones(6, 33, dtype=torch.float64).tril()

    def squared(s: Tensor) -> Tensor:
        value = distillation_loss(s, teacher.detach(), target, backend="reference", **OPTIONS)
        return torch.autograd.grad(value, s)[0].square().sum()

    up, down = (squared((student.detach() + sign * step).requires_grad_()) for sign in (1, -1))
    torch.testing.assert_close((curvature * step).sum(), (up - down) / 2, rtol=1e-5, atol=1e-12)
    assert cross.ne(0).any()


# What is and is not touched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inputs_are_never_modified(backend: str, divergence: str, dtype: torch.dtype) -> None:
    student, teacher, target = leaves(dtype)
    weight, normalizer = torch.rand(6), torch.tensor(4.0)
    inputs = (student, teacher, target, weight, normalizer)
    before = [x.detach().clone() for x in inputs]
    versions = [x._version for x in inputs]
    loss = distillation_loss(
        student, teacher, target, sample_weight=weight, normalizer=normalizer, divergence=divergence,
        backend=backend, **OPTIONS,
    )  # fmt: skip
    torch.autograd.grad(loss, (student, teacher), torch.tensor(0.5), retain_graph=True)
    torch.autograd.grad(loss, (student, teacher))
    assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


def test_no_graph_where_none_is_wanted(backend: str) -> None:
    student, teacher, target = leaves()
    with torch.no_grad():
        quiet = distillation_loss(student, teacher, target, backend=backend, **OPTIONS)
    with torch.inference_mode():
        inference = distillation_loss(student, teacher, target, backend=backend, **OPTIONS)
    loud = distillation_loss(student, teacher, target, backend=backend, **OPTIONS)
    assert loud.requires_grad
    assert not quiet.requires_grad
    assert not inference.requires_grad
    assert torch.equal(quiet, loud.detach())
    assert torch.equal(inference, loud.detach())


def test_logits_changed_after_forward_are_noticed(native: str) -> None:
    """A backward that needs the logits again must not silently use others."""
    for dtype in (torch.float16, torch.float32):
        leaf = logits(4, 9, 0, dtype=dtype).requires_grad_()
        student = leaf * 1
        loss = distillation_loss(student, logits(4, 9, 1, dtype=dtype), backend=native)
        if dtype == torch.float32:
            torch.autograd.grad(loss, leaf, retain_graph=True)
        student.detach().add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)


# inplace=True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inplace_gives_the_same_gradients_over_the_logits(
    native: str, divergence: str, upstream: float, dtype: torch.dtype
) -> None:
    leaf, teacher, target = leaves(dtype)
    options: dict[str, Any] = {"divergence": divergence, "backend": native, **OPTIONS}
    want = torch.autograd.grad(distillation_loss(leaf, teacher, target, **options) * upstream, (leaf, teacher))
    student = leaf * 1  # what a model returns: not a leaf
    version = student._version
    loss = distillation_loss(student, teacher, target, inplace=True, **options)
    got = torch.autograd.grad(loss * upstream, (student, teacher))
    assert student._version > version
    assert got[0].data_ptr() == student.data_ptr()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inplace_allows_one_backward(native: str, dtype: torch.dtype) -> None:
    leaf, teacher, target = leaves(dtype)
    student = leaf * 1
    loss = distillation_loss(student, teacher, target, backend=native, inplace=True, **OPTIONS)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss, leaf)


def test_inplace_is_seen_by_others_who_saved_the_logits(native: str) -> None:
    """The version counter knows: an op that needs the overwritten logits says so instead of using them."""
    leaf, teacher, _ = leaves()
    student = leaf * 1
    other = student.square().sum()  # its backward needs the logits
    loss = distillation_loss(student, teacher, backend=native, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss + other, leaf)


def test_inplace_refuses_a_leaf_and_scattered_rows(native: str) -> None:
    leaf, teacher, _ = leaves()
    before = leaf.detach().clone()
    with pytest.raises(ArgumentError, match="leaf"):
        distillation_loss(leaf, teacher, backend=native, inplace=True)
    scattered = (leaf * 1).t().contiguous().t()
    with pytest.raises(ArgumentError, match="strides"):
        distillation_loss(scattered, teacher, backend=native, inplace=True)
    assert torch.equal(leaf.detach(), before)


def test_inplace_writes_nothing_without_a_graph(native: str) -> None:
    leaf, teacher, _ = leaves()
    student = (leaf * 1).detach()
    before = student.clone()
    with torch.no_grad():
        distillation_loss(student, teacher, backend=native, inplace=True)
    assert torch.equal(student, before)
    assert math.isfinite(float(student.sum()))


def test_inplace_with_rows_of_a_wider_buffer(native: str) -> None:
    """Only the rows' own elements are overwritten."""
    leaf, teacher = logits(6, 40, 0).requires_grad_(), logits(6, 33, 1)
    buffer = leaf * 1
    (want,) = torch.autograd.grad(distillation_loss(leaf[:, 3:36], teacher, backend=native), leaf)
    loss = distillation_loss(buffer[:, 3:36], teacher, backend=native, inplace=True)
    (got,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(got, want)
    outside = torch.cat([buffer[:, :3], buffer[:, 36:]], -1)
    assert torch.equal(outside, torch.cat([leaf[:, :3], leaf[:, 36:]], -1))
