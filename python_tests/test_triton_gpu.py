"""Triton's kernels on a real GPU: against the float64 truth, and what only a device can show. Skipped without one.

Their host side runs without one too, see dry_gpu_tests.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import Result, assert_close, assert_matches_truth, evaluate, logits, targets, truth
from strategies import DTYPES, lay_out
from test_tokens_soft import assert_like_truth, values
from test_tokens_soft import evaluate as embedded
from test_tokens_soft import truth as embedded_truth
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels import triton as backend_module
from tgt_fast.kernels.options import DIVERGENCES

pytestmark = pytest.mark.gpu

# rows of several a program, of one a program, and streamed ones
sizes = pytest.mark.parametrize("classes", [10, 1000, 4096, 33001])
MANY = 2**31


@pytest.fixture(scope="module")
def compiled() -> str:
    """The device of tests of the compiled kernels."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    reason = backend_module.refusal("distill", (torch.empty(0, device="cuda"),))
    if reason:
        pytest.skip(f"no Triton on this GPU: {reason}")
    return "cuda"


def run(device: str, student: Tensor, teacher: Tensor, target: Tensor | None, **options: Any) -> Result:
    """The loss and its gradients there, brought back. The tensors lie as they do here."""
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    made = evaluate(
        student.to(device), teacher.to(device), None if target is None else target.to(device), backend="triton",
        **there,
    )  # fmt: skip
    return Result(*(None if x is None else x.cpu() for x in (made.loss, made.d_student, made.d_teacher)))  # type: ignore[arg-type]


@sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_a_gpu_the_loss_agrees_with_the_truth(
    compiled: str, divergence: str, dtype: torch.dtype, classes: int
) -> None:
    student, teacher = logits(9, classes, 0, dtype=dtype), logits(9, classes, 1, dtype=dtype)
    target = targets(9, classes, 2)
    options: dict[str, Any] = {
        "divergence": divergence, "hard_weight": 0.7, "label_smoothing": 0.1, "reduction": "none",
    }  # fmt: skip
    one, two = (run(compiled, student, teacher, target, **options) for _ in range(2))
    expected = truth(student, teacher, target, **options)
    assert_matches_truth(one, expected, student, teacher, divergence=divergence, hard=True)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.d_student, two.d_student)  # type: ignore[arg-type]
    assert torch.equal(one.d_teacher, two.d_teacher)  # type: ignore[arg-type]


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [{}, {"decoupled": (1.0, 2.0)}, {"correct_teacher": 0.2}, {"skew": 0.1}], ids=str)
def test_on_a_gpu_adjusted_rows_agree_with_the_formula(
    compiled: str, form: dict[str, Any], dtype: torch.dtype, classes: int
) -> None:
    student, teacher = logits(9, classes, 0, dtype=dtype), logits(9, classes, 1, dtype=dtype)
    of_classes = logits(3, classes, 3).unbind(0)
    options: dict[str, Any] = {"standardize": True, "hard_weight": 0.5, "temperature": 2.0, "reduction": "none", **form}
    names = ("student_bias", "teacher_bias", "label_margin")

    def made(device: str, backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(device, dtype).requires_grad_() for x in (student, teacher)]
        given = {name: x.to(device) for name, x in zip(names, of_classes, strict=True)}
        loss = tgt.distillation_loss(*leaves, targets(9, classes, 2).to(device), backend=backend, **given, **options)
        return (loss.detach().cpu(), *(grad.cpu() for grad in torch.autograd.grad(loss.sum(), leaves)))

    bar = {torch.float32: 5e-5, torch.float64: 1e-9, torch.bfloat16: 8e-3}[dtype]
    expected = made("cpu", "reference", torch.float64)
    for name, mine, true in zip(
        ("loss", "d_student", "d_teacher"), made(compiled, "triton", dtype), expected, strict=True
    ):
        assert_close(name, mine, true, bar=bar, floor=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_a_gpu_a_reduction_agrees_with_the_truth(compiled: str, divergence: str, reduction: str) -> None:
    """Over labels of which some are left out, weights, a normalizer, and more rows than a program adds up."""
    rows, classes = 3000, 100
    student, teacher = logits(rows, classes, 0), logits(rows, classes, 1)
    target = targets(rows, classes, 2)
    target[::7] = -100
    weight = torch.linspace(0.0, 2.0, rows)
    shared: dict[str, Any] = {
        "divergence": divergence, "reduction": reduction, "hard_weight": 0.5, "temperature": 2.0,
        "upstream": torch.tensor(1.5),
    }  # fmt: skip
    kinds: list[dict[str, Any]] = [{}, {"sample_weight": weight}]
    if reduction == "mean":
        kinds += [{"normalizer": 17.0}, {"sample_weight": weight, "normalizer": torch.tensor(17.0)}]
    for options in kinds:
        divisor = 1.0 if reduction == "sum" else 17.0 if "normalizer" in options else float(rows)
        assert_matches_truth(
            run(compiled, student, teacher, target, **shared, **options),
            truth(student, teacher, target, **shared, **options),
            student, teacher, divergence=divergence, temperature=2.0, hard=True, per_row=1.0 / divisor,
        )  # fmt: skip


@sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_a_gpu_a_gradient_in_place_equals_one_apart(
    compiled: str, divergence: str, dtype: torch.dtype, classes: int
) -> None:
    """Many rows and several times, for a warp that is ahead of the others may not write what they have yet to read."""
    rows = 2000 if classes < 10_000 else 300
    student, teacher = (logits(rows, classes, seed, dtype=dtype).to(compiled) for seed in (0, 1))
    target = targets(rows, classes, 2).to(compiled)

    def once(inplace: bool) -> tuple[Tensor, ...]:
        leaf, other = student.clone().requires_grad_(), teacher.detach().requires_grad_()
        loss = tgt.distillation_loss(
            leaf * 1, other, target, divergence=divergence, hard_weight=0.7, label_smoothing=0.1, inplace=inplace,
            backend="triton",
        )  # fmt: skip
        return (loss.detach(), *torch.autograd.grad(loss, (leaf, other)))

    apart = once(inplace=False)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(once(inplace=True), apart, strict=True))


@sizes
@pytest.mark.parametrize("layout", ["row-strided", "column-strided", "transposed"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_a_gpu_rows_may_lie_in_any_way(compiled: str, divergence: str, layout: str, classes: int) -> None:
    student, teacher, target = (
        logits(9, classes, 0),
        logits(9, classes, 1, dtype=torch.bfloat16),
        targets(9, classes, 2),
    )
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.7, "reduction": "none"}
    there = [lay_out(x.to(compiled), layout) for x in (student, teacher)]
    assert_matches_truth(
        run(compiled, *there, target, **options), truth(student, teacher, target, **options), student, teacher,
        divergence=divergence, hard=True,
    )  # fmt: skip


@pytest.mark.parametrize("size", [7, 4096, 20001])
def test_on_a_gpu_latents_agree_with_the_reference(compiled: str, size: int) -> None:
    z, grad = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    seed, step = torch.tensor(7), torch.tensor(5)
    for options in ({}, {"truncation": 2.0}, {"sphere_radius": "keep"}):
        best = tgt.perturb_latents(z, 0.7, seed=seed, step=step, backend="reference", **options)  # type: ignore[arg-type]
        got = tgt.perturb_latents(
            z.to(compiled), 0.7, seed=seed.to(compiled), step=step.to(compiled), backend="triton",
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
        torch.testing.assert_close(got.cpu(), best, rtol=1e-5, atol=1e-5)
    move: dict[str, Any] = {"step_size": 0.7, "radius": 0.5, "sigma": 0.1, "seed": 7}
    best = tgt.ascend_latents(z, grad, anchor=z, backend="reference", **move)
    there = z.to(compiled)
    got = tgt.ascend_latents(there, grad.to(compiled), anchor=there, backend="triton", **move)
    torch.testing.assert_close(got.cpu(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [5, 1100, 33001])
def test_on_a_gpu_a_soft_embedding_agrees_with_the_truth(
    compiled: str, classes: int, dtype: torch.dtype, hard: bool, gumbel: bool
) -> None:
    x, table = values(70, classes, dtype=dtype), values(classes, 96, seed=1, dtype=dtype)
    upstream = values(70, 96, seed=2, dtype=dtype)
    options: dict[str, Any] = {"gumbel": gumbel, "hard": hard, "tau": 0.7, "seed": 3, "step": 2}
    there = [each.to(compiled) for each in (x, table, upstream)]
    found = tuple(each.cpu() for each in embedded(*there, **options, backend="triton"))  # type: ignore[arg-type]
    assert_like_truth(found, embedded_truth(x, table, upstream, **options))


# Beyond what 32 bits index: the last rows equal the same rows alone


def halves(rows: int, size: int, device: str) -> Tensor:
    return torch.empty(rows, size, dtype=torch.bfloat16, device=device).normal_()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("classes", [1000, 128256])
def test_on_a_gpu_more_than_two_to_the_31_logits(
    compiled: str, room: Callable[[int], None], classes: int, inplace: bool
) -> None:
    """About 22 GB."""
    room(24)
    rows = MANY // classes + 10
    teacher, leaf = (halves(rows, classes, compiled) for _ in range(2))
    target = torch.full((rows,), classes - 1, device=compiled)
    tail = slice(rows - 3, rows)

    def graded(leaf: Tensor, teacher: Tensor, target: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
        leaf.requires_grad_()
        loss = tgt.distillation_loss(
            leaf * 1, teacher, target, hard_weight=0.5, reduction="none", inplace=inplace, backend="triton"
        )
        return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]

    want = graded(leaf[tail].clone(), teacher[tail].clone(), target[tail])
    loss, d_leaf = graded(leaf, teacher, target, inplace)
    assert torch.equal(loss[tail], want[0])
    assert torch.equal(d_leaf[tail], want[1])


def test_on_a_gpu_rows_that_lie_far_apart(compiled: str, room: Callable[[int], None]) -> None:
    """Few elements, of which the last lie beyond 2^31. About 10 GB."""
    room(12)
    wide = torch.empty(5, MANY // 4 + 1000, dtype=torch.bfloat16, device=compiled)
    for classes in (1000, 33001):
        student, teacher = wide[:, :classes].normal_(), wide[:, classes : 2 * classes].normal_()
        one, two = (
            evaluate(*(x.clone() if dense else x for x in (student, teacher)), backend="triton", reduction="none")
            for dense in (False, True)
        )
        assert torch.equal(one.loss, two.loss)
        assert torch.equal(one.d_student, two.d_student)  # type: ignore[arg-type]
        assert torch.equal(one.d_teacher, two.d_teacher)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1000, 100_000])
def test_on_a_gpu_more_than_two_to_the_31_latents(compiled: str, room: Callable[[int], None], size: int) -> None:
    """About 18 GB."""
    room(20)
    samples = MANY // size + 10
    z, grad = torch.zeros(samples, size, dtype=torch.bfloat16, device=compiled), halves(samples, size, compiled)
    ids = torch.arange(samples, device=compiled)
    tail = slice(samples - 3, samples)
    for options in ({}, {"sphere_radius": 2.0}):
        moved, want = (
            tgt.perturb_latents(z[part], 1.0, seed=1, sample_ids=ids[part], backend="triton", **options)  # type: ignore[arg-type]
            for part in (slice(None), tail)
        )
        assert torch.equal(moved[tail], want)
        del moved
    moved, want = (
        tgt.ascend_latents(
            z[part], grad[part], step_size=1.0, sigma=0.1, anchor=z[part], radius=0.5, seed=1, sample_ids=ids[part],
            backend="triton",
        )
        for part in (slice(None), tail)
    )  # fmt: skip
    assert torch.equal(moved[tail], want)


def test_on_a_gpu_more_than_two_to_the_31_logits_of_a_soft_embedding(
    compiled: str, room: Callable[[int], None]
) -> None:
    """Only the last rows have a gradient. They are cut otherwise when alone, so their sums are rounded otherwise.

    About 10 GB.
    """
    room(12)
    rows, classes = MANY // 32000 + 10, 32000
    x, table = halves(rows, classes, compiled), halves(classes, 32, compiled)
    upstream = torch.zeros(rows, 32, dtype=torch.bfloat16, device=compiled)
    tail = slice(rows - 3, rows)
    upstream[tail].normal_()
    ids = torch.arange(rows, device=compiled)

    def graded(part: slice) -> tuple[Tensor, ...]:
        leaves = x[part].requires_grad_(), table.detach().requires_grad_()
        out = tgt.soft_embedding(*leaves, gumbel=True, seed=1, sample_ids=ids[part], backend="triton")
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream[part]))

    want, got = graded(tail), graded(slice(None))
    for whole, alone in zip((got[0][tail], got[1][tail], got[2]), want, strict=True):
        scale = alone.float().abs().amax()
        torch.testing.assert_close(whole / scale, alone / scale, rtol=0.02, atol=1e-3)
