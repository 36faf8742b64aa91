"""Masks, rows that are not numbers, rows that do not count, and extreme logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import Result, check, distillation_loss, evaluate, logits, targets, truth
from strategies import DTYPES
from torch import Tensor

from tgt_fast.errors import ShapeError
from tgt_fast.kernels.options import DIVERGENCES

INF = math.inf
CLASSES = (5, 33, 1000)  # less than a vector; a vector and its tail; many vectors

# Whether a divergence is +inf where only the student, or only the teacher, gives a class probability 0.
INFINITE = {
    "forward_kl": (True, False),
    "reverse_kl": (False, True),
    "symmetric": (True, True),
    "jsd": (False, False),
    "tvd": (False, False),
    "cross_entropy": (True, False),
    "mse": (True, True),
}


def gradients(result: Result) -> tuple[Tensor, Tensor]:
    assert result.d_student is not None
    assert result.d_teacher is not None
    return result.d_student, result.d_teacher


def same_rows(result: Result, other: Result, rows: slice | Tensor) -> bool:
    """True if losses and gradients of these rows have the same bits."""
    pairs = zip((result.loss, *gradients(result)), (other.loss, *gradients(other)), strict=True)
    return all(torch.equal(a[rows], b[rows]) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_class_masked_on_both_sides_is_padding(
    backend: str, divergence: str, classes: int, dtype: torch.dtype
) -> None:
    """Its gradient is exactly 0 and the rest is as if it were not there: -inf adds no mass."""
    narrow = [logits(4, classes, seed, dtype=dtype) for seed in (0, 1)]
    target = targets(4, classes, 2)
    padding = torch.full((4, 7), -INF, dtype=dtype)
    wide = [torch.cat([x, padding], -1) for x in narrow]
    options: dict[str, Any] = {
        "divergence": divergence, "reduction": "none", "hard_weight": 0.5, "label_smoothing": 0.1,
    }  # fmt: skip
    result = check(wide[0], wide[1], target, backend=backend, **options)
    plain = evaluate(narrow[0], narrow[1], target, backend=backend, **options)
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-5, atol=1e-5)
    for grad in gradients(result):
        assert grad[:, classes:].eq(0).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_class_masked_on_one_side(backend: str, divergence: str, classes: int, side: str) -> None:
    """The row's loss is the formula's, +inf with gradients of 0 included. Other rows are untouched."""
    student, teacher = logits(6, classes, 0), logits(6, classes, 1)
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "reduction": "none"}
    clean = evaluate(student, teacher, **options)
    masked = student if side == "student" else teacher
    masked[2, classes // 2] = -INF
    masked[4, :-1] = -INF
    result = check(student, teacher, **options)
    hit, spared = torch.tensor([2, 4]), torch.tensor([0, 1, 3, 5])
    assert same_rows(result, clean, spared)
    infinite = INFINITE[divergence][side == "teacher"]
    assert bool(result.loss[hit].isinf().all()) == infinite
    for grad in gradients(result):
        assert grad.isfinite().all()
        assert not infinite or grad[hit].eq(0).all()
    own = gradients(result)[side == "teacher"]
    assert own[masked == -INF].eq(0).all()


@pytest.mark.parametrize("divergence", [d for d, sides in INFINITE.items() if sides[0]])
def test_a_row_of_infinite_soft_loss_keeps_its_hard_gradient(backend: str, divergence: str) -> None:
    student, teacher, target = logits(3, 20, 0), logits(3, 20, 1), torch.tensor([4, 5, 6])
    student[1, 0] = -INF
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none", "hard_weight": 0.5}
    result = check(student, teacher, target, backend=backend, **options)
    alone = evaluate(student, teacher, target, backend=backend, soft_weight=0.0, **options)
    assert result.loss[1] == INF
    d_student, d_teacher = gradients(result)
    torch.testing.assert_close(d_student[1], gradients(alone)[0][1], rtol=1e-6, atol=1e-8)
    assert d_student[1].ne(0).any()
    assert d_teacher[1].eq(0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_label_that_is_masked_gives_an_infinite_loss_and_no_hard_gradient(backend: str, divergence: str) -> None:
    student, teacher, target = logits(3, 20, 0), logits(3, 20, 1), torch.tensor([4, 5, 6])
    student[1, 5] = teacher[1, 5] = -INF
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
    result = check(student, teacher, target, backend=backend, hard_weight=0.5, **options)
    soft = evaluate(student, teacher, backend=backend, **options)
    assert result.loss[1] == INF
    assert result.loss[[0, 2]].isfinite().all()
    torch.testing.assert_close(gradients(result)[0][1], gradients(soft)[0][1], rtol=1e-6, atol=1e-8)
    # With all the weight on the other classes, the label's own logit does not matter.
    smooth = check(student, teacher, target, backend=backend, hard_weight=0.5, label_smoothing=1.0, **options)
    assert smooth.loss.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_infinite_row_spoils_the_sum_but_no_gradient(backend: str, reduction: str) -> None:
    student, teacher = logits(4, 20, 0), logits(4, 20, 1)
    student[1, 3] = -INF
    result = evaluate(student, teacher, backend=backend, reduction=reduction)
    assert result.loss == INF
    for grad in gradients(result):
        assert grad.isfinite().all()
        assert grad[1].eq(0).all()
        assert grad[[0, 2, 3]].ne(0).any()


# Rows that are not numbers


@pytest.mark.parametrize("kind", ["nan", "+inf", "all -inf", "nan and -inf", "both infinities"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_that_is_no_distribution_is_nan_alone(
    backend: str, divergence: str, dtype: torch.dtype, side: str, kind: str
) -> None:
    student, teacher = logits(5, 37, 0, dtype=dtype), logits(5, 37, 1, dtype=dtype)
    target = targets(5, 37, 2)
    options: dict[str, Any] = {
        "backend": backend, "divergence": divergence, "reduction": "none", "hard_weight": 0.5,
    }  # fmt: skip
    clean = evaluate(student, teacher, target, **options)
    bad = student if side == "student" else teacher
    if kind == "nan":
        bad[2, 36] = math.nan
    elif kind == "+inf":
        bad[2, 20] = INF
    elif kind == "all -inf":
        bad[2] = -INF
    elif kind == "nan and -inf":
        bad[2], bad[2, 0] = -INF, math.nan
    else:
        bad[2, 0], bad[2, 1] = INF, -INF
    result = evaluate(student, teacher, target, **options)
    spared = torch.tensor([0, 1, 3, 4])
    assert same_rows(result, clean, spared)
    assert result.loss[2].isnan()
    for grad in gradients(result):
        assert grad[2].isnan().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_minus_infinity_on_both_sides_are_nan(backend: str, divergence: str) -> None:
    student, teacher = logits(3, 20, 0), logits(3, 20, 1)
    student[1] = teacher[1] = -INF
    result = evaluate(student, teacher, backend=backend, divergence=divergence, reduction="none")
    assert result.loss.isnan().tolist() == [False, True, False]


def test_a_term_of_weight_zero_is_not_looked_at(backend: str) -> None:
    """Hard labels alone: the teacher may hold anything. Soft labels alone: so may the label's class."""
    student, teacher, target = logits(3, 20, 0), logits(3, 20, 1), targets(3, 20, 2)
    hard: dict[str, Any] = {"backend": backend, "soft_weight": 0.0, "hard_weight": 1.0, "reduction": "none"}
    clean = evaluate(student, teacher, target, **hard)
    result = evaluate(student, torch.full_like(teacher, math.nan), target, **hard)
    assert torch.equal(result.loss, clean.loss)
    assert torch.equal(gradients(result)[0], gradients(clean)[0])
    assert gradients(result)[1].eq(0).all()


# Rows that do not count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("content", [math.nan, INF, -INF])
@pytest.mark.parametrize("how", ["ignore_index", "own ignore_index", "weight"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_a_dropped_row_gives_zero_whatever_it_holds(
    backend: str, divergence: str, how: str, content: float, dtype: torch.dtype
) -> None:
    student, teacher, target = logits(4, 37, 0, dtype=dtype), logits(4, 37, 1, dtype=dtype), targets(4, 37, 2)
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "hard_weight": 0.5}
    if how == "weight":
        options["sample_weight"] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    else:
        ignored = -100 if how == "ignore_index" else 7
        options["ignore_index"] = ignored
        target[[0, 2]], target[[1, 3]] = 8, ignored
    kept = torch.tensor([0, 2])
    student[1, 3:], teacher[3] = content, content
    for reduction in ("none", "mean", "sum"):
        result = evaluate(student, teacher, target, reduction=reduction, **options)
        small: dict[str, Any] = {k: v[kept] if isinstance(v, Tensor) else v for k, v in options.items()}
        alone = evaluate(student[kept], teacher[kept], target[kept], reduction=reduction, **small)
        loss = result.loss[kept] if reduction == "none" else result.loss
        assert torch.equal(loss, alone.loss)
        for grad, want in zip(gradients(result), gradients(alone), strict=True):
            assert grad[[1, 3]].eq(0).all()
            assert torch.equal(grad[kept], want)
        assert reduction != "none" or result.loss[[1, 3]].eq(0).all()


def test_an_unlabeled_row_keeps_its_soft_term_and_counts(backend: str) -> None:
    student, teacher, target = logits(4, 20, 0), logits(4, 20, 1), torch.tensor([3, -1, 5, -7])
    options: dict[str, Any] = {"backend": backend, "hard_weight": 0.5}
    soft = evaluate(student, teacher, backend=backend, reduction="none")
    for unlabeled, row in ((-1, 1), (-7, 3)):
        labels = torch.where(target == unlabeled, target, target.clamp_min(0))
        result = evaluate(student, teacher, labels, unlabeled_index=unlabeled, reduction="none", **options)
        assert torch.equal(result.loss[row], soft.loss[row])
        assert torch.equal(gradients(result)[0][row], gradients(soft)[0][row])
        mean = evaluate(student, teacher, labels, unlabeled_index=unlabeled, **options)
        torch.testing.assert_close(mean.loss, result.loss.sum() / 4.0)


def test_statistics_of_rows_that_do_not_count_or_are_no_distribution(backend: str) -> None:
    student, teacher, target = logits(4, 20, 0), logits(4, 20, 1), torch.tensor([3, -100, 5, 6])
    student[1, 0] = math.nan
    student[2, 0] = math.nan
    student[3, 1] = -INF
    loss, stats = distillation_loss(
        student, teacher, target, hard_weight=1.0, reduction="none", return_stats=True, backend=backend
    )
    assert all(value[1] == 0 for value in (loss, *stats))
    assert stats.kl[2].isnan()
    assert stats.student_entropy[2].isnan()
    assert not stats.agreement[2]
    assert stats.kl[3] == INF
    assert stats.student_entropy[3].isfinite()
    assert all(value[0].isfinite() for value in stats)


def test_statistics_of_a_side_that_is_a_distribution_beside_one_that_is_none(backend: str) -> None:
    student, teacher = logits(6, 20, 0), logits(6, 20, 1)
    student[0, 3] = teacher[1, 19] = math.nan
    student[2, 0] = teacher[3, 1] = INF
    student[4] = -INF
    student[5, 2] = math.nan
    teacher[5, 2] = -INF
    options: dict[str, Any] = {"temperature": 2.0, "teacher_temperature": 3.0, "return_stats": True}
    for soft_weight in (1.0, 0.0):
        target = targets(6, 20, 2)
        calls = {"soft_weight": soft_weight, "hard_weight": 1.0, **options}
        stats = distillation_loss(student, teacher, target, backend=backend, **calls)[1]
        expected = distillation_loss(student.double(), teacher.double(), target, backend="reference", **calls)[1]
        for name, got, want in zip(stats._fields, stats, expected, strict=True):
            torch.testing.assert_close(
                got, want.to(got.dtype), rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert stats.teacher_entropy.isnan().tolist() == [False, True, False, True, False, False]
        assert stats.student_lse.isnan().tolist() == [True, False, True, False, True, True]
        assert stats.kl.isnan().all()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_normalizer_of_0_leaves_no_statistics(backend: str, on_device: bool) -> None:
    normalizer = torch.tensor(0.0) if on_device else 0.0
    student = logits(3, 20, 0)
    student[1, 1] = math.nan
    loss, stats = distillation_loss(
        student, logits(3, 20, 1), normalizer=normalizer, return_stats=True, backend=backend
    )
    assert loss == 0
    assert all(value.eq(0).all() for value in stats)


# Padding a narrower vocabulary


def test_mismatched_class_counts_are_named_and_minus_infinity_pads_without_adding_mass(backend: str) -> None:
    """A vocabulary padded with logits of 0 gives mass to tokens that do not exist, and every other one less."""
    student, teacher = logits(4, 12, 0), logits(4, 10, 1)
    with pytest.raises(ShapeError, match=r"12.*10(.|\n)*-inf"):
        distillation_loss(student, teacher, backend=backend)
    padded = torch.cat([teacher, torch.full((4, 2), -INF)], dim=-1)
    for divergence in ("reverse_kl", "forward_kl", "jsd", "tvd", "cross_entropy"):
        check(student, padded, backend=backend, divergence=divergence, reduction="none")
    ours = distillation_loss(student, padded, backend=backend, reduction="none")
    zeros = distillation_loss(student, torch.nn.functional.pad(teacher, (0, 2)), backend=backend, reduction="none")
    p, log_q = torch.softmax(teacher, -1), torch.log_softmax(student, -1)[:, :10]
    expected = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(zeros, expected, rtol=1e-2)


# Extreme logits


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_and_temperatures_stay_finite_and_right(
    backend: str, divergence: str, temperature: float
) -> None:
    """Probabilities underflow on either side, or both: no NaN, and the truth within the bar."""
    base = logits(8, 65, 0)
    spread = torch.tensor([1.0, 30.0, 1.0, 30.0, 100.0, 100.0, 1000.0, 0.0])[:, None]
    other = torch.tensor([1.0, 1.0, 30.0, 30.0, 100.0, 1.0, 1000.0, 1000.0])[:, None]
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    result = check(base * spread, logits(8, 65, 1) * other, backend=backend, **options)
    assert result.loss.isfinite().all()
    assert result.loss.ge(0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric", "jsd"])
def test_the_largest_temperature_leaves_the_loss_two_digits(backend: str, divergence: str) -> None:
    student, teacher = logits(4, 100, 0), logits(4, 100, 1)
    options: dict[str, Any] = {"divergence": divergence, "temperature": 100.0, "reduction": "none"}
    out, expected = evaluate(student, teacher, backend=backend, **options), truth(student, teacher, **options)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=5e-3, atol=0)
    assert out.d_student is not None
    assert expected.d_student is not None
    torch.testing.assert_close(out.d_student.double(), expected.d_student, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [-1e30, -3e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "mse"])
def test_a_class_of_very_low_logit_is_as_good_as_absent(
    backend: str, divergence: str, dtype: torch.dtype, value: float
) -> None:
    """The finite stand-ins for -inf that code in the wild uses: same loss and gradients as -inf."""
    student, teacher = logits(4, 40, 0, dtype=dtype), logits(4, 40, 1, dtype=dtype)
    target = targets(4, 3, 2)
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "reduction": "none"}
    results = []
    for stand_in in (max(value, torch.finfo(dtype).min), -INF):  # float32's least is none of bfloat16's
        student[:, 3::5] = teacher[:, 3::5] = stand_in
        results.append(evaluate(student, teacher, target, backend=backend, **options))
    low, absent = results
    torch.testing.assert_close(low.loss, absent.loss, rtol=1e-6, atol=1e-6)
    for got, want in zip(gradients(low), gradients(absent), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_at_the_end_of_their_dtype_make_no_nan(backend: str, divergence: str, dtype: torch.dtype) -> None:
    """Differences of such logits overflow float32: losses may be inf, gradients of a distribution not."""
    largest = torch.finfo(dtype).max
    student = torch.tensor([[largest, 0.0, -largest], [1.0, 2.0, -largest], [largest, largest, 1.0]], dtype=dtype)
    teacher = torch.tensor([[largest, -largest, 0.0], [1.0, -largest, 0.5], [0.0, 1.0, -largest]], dtype=dtype)
    result = evaluate(student, teacher, backend=backend, divergence=divergence, reduction="none")
    assert not result.loss.isnan().any()
    assert result.loss.ge(0).all()
    for grad in gradients(result):
        assert not grad.isnan().any()
    if divergence != "mse":
        assert gradients(result)[0].isfinite().all()


@settings(max_examples=30)
@given(data=st.data())
def test_any_mixture_of_ordinary_and_special_values_poisons_no_other_row(backend: str, data: st.DataObject) -> None:
    """Each row's result is, bit for bit, what it would be on its own."""
    rows, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 20))
    special = st.sampled_from((0.0, 1.0, -3.0, 50.0, -1e30, 3e38, -INF, -INF, INF, math.nan))
    values = st.lists(
        st.one_of(st.floats(-10, 10, width=32), special), min_size=rows * classes, max_size=rows * classes
    )
    student, teacher = (torch.tensor(data.draw(values)).view(rows, classes) for _ in range(2))
    options: dict[str, Any] = {
        "backend": backend, "divergence": data.draw(st.sampled_from(DIVERGENCES)), "reduction": "none",
    }  # fmt: skip
    together = evaluate(student, teacher, **options)
    for row in range(rows):
        alone = evaluate(student[row : row + 1], teacher[row : row + 1], **options)
        for got, want in zip((together.loss, *gradients(together)), (alone.loss, *gradients(alone)), strict=True):
            torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=0, equal_nan=True)
