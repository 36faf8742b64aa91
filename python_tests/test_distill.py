"""The distillation loss against the float64 truth: values, gradients, sizes, dtypes and layouts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from numerics import (
    arithmetic_bar,
    assert_close,
    check,
    distillation_loss,
    evaluate,
    logits,
    magnitude,
    targets,
    truth,
)
from strategies import DTYPES, DistillCase, distill_cases, lay_out

from tgt_fast.errors import ShapeError
from tgt_fast.kernels.options import DIVERGENCES

# What each size is there for. The compiled core reads rows in blocks of 2048, by vectors of 4, 8 or 16 floats.
CLASSES = (
    1,  # a regression: a distribution over one class is constant, and refused
    2,
    10,  # the digits; no full vector of AVX-512, one of AVX2 and a tail
    17,  # a full vector and a tail of one, whatever the width
    1000,  # ImageNet: whole vectors and a tail in one block
    4099,  # two blocks and a last one of 3: the running maxima and sums are restated between blocks
    33000,  # a vocabulary: 17 blocks, and a row a thread
)
ROWS = (
    1,  # nothing to spread over threads
    3,
    128,  # 33 rows of 1000 classes are a thread's least share: here there are four, the last one smaller
)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_number_of_classes(backend: str, divergence: str, classes: int) -> None:
    rows = 128 if classes <= 17 else 3
    student, teacher, target = logits(rows, classes, 0), logits(rows, classes, 1), targets(rows, classes, 2)
    options: dict[str, Any] = {"divergence": divergence, "beta": 0.3, "reduction": "none", "temperature": 2.0}
    if classes == 1 and divergence != "mse":
        with pytest.raises(ShapeError, match="one class"):
            check(student, teacher, backend=backend, **options)
        return
    check(student, teacher, backend=backend, **options)
    if classes > 1:
        check(student, teacher, target, backend=backend, hard_weight=0.7, label_smoothing=0.1, **options)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_number_of_rows(backend: str, divergence: str, rows: int) -> None:
    check(logits(rows, 1000, 0), logits(rows, 1000, 1), backend=backend, divergence=divergence, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 7), (0, 3, 7), (2, 0, 7)])
def test_an_empty_batch_gives_zero_and_empty_gradients(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    student, teacher = torch.empty(shape), torch.empty(shape)
    result = evaluate(student, teacher, backend=backend, reduction=reduction)
    assert result.loss.shape == (shape[:-1] if reduction == "none" else ())
    assert result.loss.sum() == 0
    assert result.d_student is not None
    assert result.d_student.shape == shape
    assert result.d_teacher is not None
    assert result.d_teacher.shape == shape


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("pair", list(itertools.product(DTYPES, DTYPES)), ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_every_pair_of_dtypes(backend: str, pair: tuple[torch.dtype, torch.dtype], divergence: str) -> None:
    student, teacher = logits(33, 100, 0, dtype=pair[0]), logits(33, 100, 1, dtype=pair[1])
    target = targets(33, 100, 2)
    check(
        student, teacher, target, backend=backend, divergence=divergence, hard_weight=0.5, temperature=2.0,
        reduction="none",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_gradients_are_as_good_as_rounding_the_truth(backend: str, divergence: str, dtype: torch.dtype) -> None:
    """Logits are never rounded before the softmax: a vocabulary in half precision keeps the bar."""
    rows = 2 if backend == "triton" else 8  # an interpreter takes its time
    student, teacher = logits(rows, 33000, 0, dtype=dtype), logits(rows, 33000, 1, dtype=dtype)
    check(student, teacher, backend=backend, divergence=divergence, reduction="none")


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_subset_of_gradients(backend: str, divergence: str, dtype: torch.dtype, needs: tuple[bool, bool]) -> None:
    student, teacher, target = logits(5, 21, 0, dtype=dtype), logits(5, 21, 1, dtype=dtype), targets(5, 21, 2)
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "reduction": "none"}
    result = check(student, teacher, target, backend=backend, needs=needs, **options)
    whole = evaluate(student, teacher, target, backend=backend, **options)
    assert torch.equal(result.loss, whole.loss)
    for got, want in ((result.d_student, whole.d_student), (result.d_teacher, whole.d_teacher)):
        assert got is None or torch.equal(got, want)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperatures_from_a_twentieth_to_a_hundred(backend: str, divergence: str, temperature: float) -> None:
    student, teacher = logits(16, 257, 0), logits(16, 257, 1)
    check(student, teacher, backend=backend, divergence=divergence, temperature=temperature, reduction="none")


@pytest.mark.parametrize(("ts", "tt"), [(1.0, 4.0), (4.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_student_and_teacher_may_differ_in_temperature(backend: str, divergence: str, ts: float, tt: float) -> None:
    student, teacher = logits(16, 257, 0), logits(16, 257, 1)
    options: dict[str, Any] = {
        "divergence": divergence,
        "temperature": ts,
        "teacher_temperature": tt,
        "reduction": "none",
    }
    check(student, teacher, targets(16, 257, 2), backend=backend, hard_weight=1.0, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_flat_and_peaked_rows_side_by_side(backend: str, divergence: str) -> None:
    """Rows of every spread; some agree with the teacher, some contradict it."""
    base = logits(6, 50, 0)
    student = base * torch.tensor([0.0, 0.01, 1.0, 1.0, 20.0, 20.0])[:, None]
    teacher = torch.where(torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.bool)[:, None], student * 1.01, student.flip(-1))
    check(student, teacher, backend=backend, divergence=divergence, reduction="none")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equal_logits_give_no_loss_and_no_gradient(backend: str, dtype: torch.dtype, divergence: str) -> None:
    both = logits(9, 130, 0, dtype=dtype)
    result = check(both, both.clone(), backend=backend, divergence=divergence, temperature=2.0, reduction="none")
    assert result.loss.ge(0).all()
    assert divergence == "cross_entropy" or result.loss.le(1e-5).all()


# Layouts


@pytest.mark.parametrize("layout", ["row-strided", "column-strided", "transposed"])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 33), (33,), (2, 1, 3, 9)], ids=str)
def test_shapes_and_strides_do_not_change_the_result(backend: str, shape: tuple[int, ...], layout: str) -> None:
    student, teacher = logits(shape[:-1], shape[-1], 0), logits(shape[:-1], shape[-1], 1)
    target = targets(math.prod(shape[:-1]), shape[-1], 2).view(shape[:-1])
    options: dict[str, Any] = {"hard_weight": 0.5, "reduction": "none", "backend": backend}
    plain = evaluate(student, teacher, target, **options)
    placed = evaluate(lay_out(student, layout), lay_out(teacher, layout), target, **options)
    assert placed.loss.shape == shape[:-1]
    assert torch.equal(placed.loss, plain.loss)
    assert placed.d_student is not None
    assert placed.d_student.shape == shape
    assert torch.equal(placed.d_student, plain.d_student)  # type: ignore[arg-type]
    assert torch.equal(placed.d_teacher, plain.d_teacher)  # type: ignore[arg-type]


def test_expanded_logits_and_a_broadcast_teacher(backend: str) -> None:
    student, row = logits(6, 20, 0), logits(1, 20, 1)
    result = evaluate(student, row.expand(6, 20), backend=backend, reduction="none")
    copied = evaluate(student, row.repeat(6, 1), backend=backend, reduction="none")
    assert torch.equal(result.loss, copied.loss)
    assert torch.equal(result.d_student, copied.d_student)  # type: ignore[arg-type]


# Everything at once


@settings(max_examples=80)
@given(case=distill_cases())
def test_any_legal_call_agrees_with_the_truth(backend: str, case: DistillCase) -> None:
    check(
        case.student,
        case.teacher,
        case.target,
        backend=backend,
        needs=case.needs,
        per_row=_smallest_upstream(case),
        **case.options,
    )


def _smallest_upstream(case: DistillCase) -> float:
    """The upstream gradient of a row: 1, or 1 over the divisor of a mean."""
    if case.options["reduction"] != "mean":
        return 1.0
    rows = math.prod(case.student.shape[:-1])
    return 1.0 / max(1.0, float(case.options.get("normalizer") or rows))


# Three ways: the truth, torch's own functions in float32, and ours


@pytest.mark.parametrize("classes", [10, 1000, 33000])
def test_no_worse_than_eager_torch_in_float32(backend: str, classes: int) -> None:
    student, teacher, target = logits(16, classes, 0), logits(16, classes, 1), targets(16, classes, 2)
    expected = truth(student, teacher, target, hard_weight=1.0, reduction="none", needs=(True, False))
    leaf = student.clone().requires_grad_()
    log_q, log_p = torch.log_softmax(leaf, -1), torch.log_softmax(teacher, -1)
    eager = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    eager = eager + torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    (d_eager,) = torch.autograd.grad(eager.sum(), leaf)
    ours = evaluate(student, teacher, target, backend=backend, hard_weight=1.0, reduction="none", needs=(True, False))
    for mine, theirs, best in (
        (ours.loss, eager.detach(), expected.loss),
        (ours.d_student, d_eager, expected.d_student),
    ):
        assert mine is not None
        assert best is not None
        margin = max(2.0 * float((theirs.double() - best).norm() / best.norm()), 2e-7)
        assert float((mine.double() - best).norm() / best.norm()) <= margin


# Statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_statistics_describe_both_distributions(backend: str, divergence: str, dtype: torch.dtype) -> None:
    student, teacher = logits((3, 4), 57, 0, dtype=dtype), logits((3, 4), 57, 1, dtype=dtype)
    teacher[0] = student[0]
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "teacher_temperature": 0.5}
    plain = evaluate(student, teacher, backend=backend, **options)
    result = evaluate(student, teacher, backend=backend, return_stats=True, **options)
    stats = result.stats
    assert stats is not None
    assert torch.equal(result.loss, plain.loss)
    assert torch.equal(result.d_student, plain.d_student)  # type: ignore[arg-type]
    q = torch.distributions.Categorical(logits=student.double() / 2.0)
    p = torch.distributions.Categorical(logits=teacher.double() / 0.5)
    expected = {
        "student_entropy": q.entropy(),
        "teacher_entropy": p.entropy(),
        "kl": torch.distributions.kl_divergence(p, q),
        "student_lse": torch.logsumexp(student.double() / 2.0, -1),
        "teacher_lse": torch.logsumexp(teacher.double() / 0.5, -1),
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bar = arithmetic_bar(wide, magnitude(student / 2.0, teacher / 0.5))
    for name, want in expected.items():
        got = getattr(stats, name)
        assert got.dtype == wide
        assert got.shape == (3, 4)
        assert not got.requires_grad
        assert_close(name, got, want, bar=bar, floor=1e-1)
    assert stats.agreement.dtype == torch.bool
    assert torch.equal(stats.agreement, student.argmax(-1) == teacher.argmax(-1))
    assert stats.agreement[0].all()
    assert not stats.agreement.all()


def test_statistics_need_no_gradient(backend: str) -> None:
    loss, stats = distillation_loss(logits(4, 9, 0), logits(4, 9, 1), return_stats=True, backend=backend)
    assert not loss.requires_grad
    assert all(not value.requires_grad and value.shape == (4,) for value in stats)
