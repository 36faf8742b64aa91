"""The loss against a top-k record: values, gradients, bounds, masks, errors, autograd, every layout on a device."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated_gpu import tensors_on_an_emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import arithmetic_bar, assert_close, floors, gradient_bar, logits, magnitude, targets
from strategies import DTYPES, lay_out
from torch import Tensor
from torch.utils import _pytree as pytree

import tgt_fast as tgt
from tgt_fast import TeacherTopK
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.kernels.native import cuda, cuda_sparse
from tgt_fast.kernels.options import SPARSE_DIVERGENCES, TAILS, DistillOptions, Listed

INF = math.inf
divergences = pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES)
tails = pytest.mark.parametrize("tail", TAILS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _compiled_for_records(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "triton":
        pytest.skip("Triton has no kernels for records")


def loss_and_gradient(
    student: Tensor, record: TeacherTopK, target: Tensor | None = None, *, upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    student = student.detach().requires_grad_()
    options.setdefault("temperature", record.temperature)
    loss = tgt.distillation_loss(student, record, target, **options)
    assert isinstance(loss, Tensor)
    grad = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, grad)[0]


def in_double(record: TeacherTopK) -> TeacherTopK:
    tail = record.tail_log_prob
    return dataclasses.replace(
        record, log_probs=record.log_probs.double(), tail_log_prob=None if tail is None else tail.double()
    )


def check(
    student: Tensor, record: TeacherTopK, target: Tensor | None = None, *, per_row: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient within the bars of their dtypes of the float64 truth."""
    out = loss_and_gradient(student, record, target, **options)
    truth = loss_and_gradient(
        student.double(), in_double(record), target, **{**options, "backend": "reference"}
    )  # fmt: skip
    assert_near(out, truth, student, record, hard=target is not None, divergence=options["divergence"], per_row=per_row)
    return out


def assert_near(
    out: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], student: Tensor, record: TeacherTopK, *, hard: bool,
    divergence: str, per_row: float = 1.0,
) -> None:  # fmt: skip
    t = record.temperature
    small = floors(divergence, t, t, hard)
    whole = per_row * math.sqrt(max(1, student.shape[:-1].numel()))
    wide = torch.float64 in (student.dtype, record.log_probs.dtype)
    result = torch.float64 if wide else torch.float32
    largest = magnitude(student / t, record.log_probs, *([student] if hard else []))
    assert out[0].dtype == result
    assert out[1].dtype == student.dtype
    assert_close("loss", out[0], truth[0], bar=arithmetic_bar(result, largest), floor=small.loss * whole)
    floor = small.d_student * whole
    bar = gradient_bar(student.dtype, result, largest, truth[1], floor)
    assert_close("d_student", out[1], truth[1], bar=bar, floor=floor)


def peaked(rows: int, classes: int, margin: float, seed: int) -> Tensor:
    """Rows whose largest class has all but exp(-margin) of the mass, or so."""
    values = logits(rows, classes, seed)
    values[torch.arange(rows), targets(rows, classes, seed)] += margin
    return values


# Making a record


def test_a_record_of_logits_is_their_log_softmax() -> None:
    t = logits((2, 3), 40, 0, dtype=torch.float64)
    record = tgt.topk_teacher(t, 7, 2.0)
    full = (t / 2.0).log_softmax(-1)
    torch.testing.assert_close(record.log_probs, full.gather(-1, record.ids))
    others = full.scatter(-1, record.ids, -INF)
    torch.testing.assert_close(record.tail_log_prob, others.logsumexp(-1))
    assert (full.topk(7).indices == record.ids).all()
    assert (record.shape, record.k, record.num_classes, len(record)) == ((2, 3), 7, 40, 2)


@dtypes
def test_the_tail_of_a_sure_teacher_keeps_its_digits(dtype: torch.dtype) -> None:
    t = peaked(8, 1000, 40.0, 0).to(dtype)
    record = tgt.topk_teacher(t, 4, 1.0)
    full = t.double().log_softmax(-1)
    expected = full.scatter(-1, record.ids, -INF).logsumexp(-1)
    assert expected.max() < -15  # one minus the listed mass would be rounding, or 0
    assert record.tail_log_prob is not None
    torch.testing.assert_close(record.tail_log_prob.double(), expected, rtol=1e-6, atol=1e-5)


def test_rows_that_are_short_or_no_distribution() -> None:
    t = logits(5, 6, 0)
    t[1, 1:] = -INF
    t[2], t[3, 2], t[4, 0] = -INF, math.nan, INF
    record = tgt.topk_teacher(t, 3)
    assert record.log_probs[1].tolist() == [0.0, -INF, -INF]
    assert record.tail_log_prob is not None
    assert record.tail_log_prob[1] == -INF
    assert record.log_probs[2:].isnan().any(-1).all()
    everything = tgt.topk_teacher(t[:1], 6)
    assert everything.tail_log_prob is not None
    assert everything.tail_log_prob.tolist() == [-INF]


def test_a_record_from_elsewhere_derives_its_tail() -> None:
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    log_probs = torch.tensor([[0.5, 0.25], [0.6, 0.4], [1.0, 1e-3]]).log()  # the last two are all, or over
    record = TeacherTopK(ids, log_probs, None, 1.0, 10)
    rest = record.rest()
    assert rest is not None
    assert rest[0].item() == pytest.approx(math.log(0.25), rel=1e-5)
    assert rest[1:].isfinite().all()
    assert (rest[1:] < -14).all()
    assert TeacherTopK(ids[:1], log_probs[:1], None, 1.0, 2).rest().item() == -INF  # type: ignore[union-attr]
    assert TeacherTopK(ids, log_probs, None, 1.0, 10, "renormalize").rest() is None
    for divergence in SPARSE_DIVERGENCES:
        loss = tgt.distillation_loss(logits(3, 10, 0), record, divergence=divergence)
        assert loss.isfinite()
        assert loss > 0


# The meaning


@divergences
@tails
def test_the_reference_has_the_right_gradients(divergence: str, tail: str) -> None:
    student = logits(3, 9, 0, dtype=torch.float64).requires_grad_()
    record = tgt.topk_teacher(logits(3, 9, 1, dtype=torch.float64), 4, 2.0, tail=tail)
    assert torch.autograd.gradcheck(
        lambda s: tgt.distillation_loss(
            s, record, targets(3, 9, 2), divergence=divergence, temperature=2.0, hard_weight=0.5, label_smoothing=0.1,
            backend="reference",
        ),
        student,
    )  # fmt: skip


def test_the_bucket_form_is_torchs_divergence_of_k_plus_1_classes(backend: str) -> None:
    student, teacher = logits(6, 50, 0), logits(6, 50, 1)
    record = tgt.topk_teacher(teacher, 8, 2.0)

    def bucketed(x: Tensor) -> Tensor:
        full = (x / 2.0).log_softmax(-1)
        rest = full.scatter(-1, record.ids, -INF).logsumexp(-1, keepdim=True)
        return torch.cat([full.gather(-1, record.ids), rest], -1)

    expected = 4.0 * F.kl_div(bucketed(student), bucketed(teacher), log_target=True, reduction="batchmean")
    loss = tgt.distillation_loss(student, record, temperature=2.0, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@divergences
def test_the_other_forms_are_dense_losses(backend: str, divergence: str) -> None:
    student, teacher = logits(6, 50, 0), logits(6, 50, 1)
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    dense = tgt.distillation_loss(student, teacher, **options)
    for tail in TAILS:
        every = tgt.distillation_loss(student, tgt.topk_teacher(teacher, 50, 2.0, tail=tail), **options)
        torch.testing.assert_close(every, dense, rtol=1e-5, atol=1e-6)
    record = tgt.topk_teacher(teacher, 8, 2.0, tail="uniform")
    assert record.tail_log_prob is not None
    spread = (record.tail_log_prob - math.log(42.0))[:, None].expand(6, 50).scatter(-1, record.ids, record.log_probs)
    torch.testing.assert_close(
        tgt.distillation_loss(student, record, **options),
        tgt.distillation_loss(student, 2.0 * spread, **options), rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    torch.testing.assert_close(
        tgt.distillation_loss(student, dataclasses.replace(record, tail="renormalize"), **options),
        tgt.distillation_loss(student.gather(-1, record.ids), 2.0 * record.log_probs, **options), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


# Against the float64 truth


@dtypes
@divergences
@tails
# 5: less than a vector; 33: a vector and its end; 2100: more than a block of the CPU kernels
@pytest.mark.parametrize(("classes", "k"), [(5, 2), (33, 33), (2100, 64)])
def test_against_the_truth(backend: str, classes: int, k: int, tail: str, divergence: str, dtype: torch.dtype) -> None:
    student = lay_out(logits(2, classes, 0, dtype=dtype), "row-strided")
    source = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "reduction": "none"}
    teacher = logits(2, classes, 1, dtype=source)
    check(student, tgt.topk_teacher(teacher, k, 3.0, tail=tail), **options)
    record = tgt.topk_teacher(teacher, k, 2.0, tail=tail)
    check(student, record, targets(2, classes, 2), hard_weight=0.5, label_smoothing=0.1, beta=0.3, **options)
    record = tgt.topk_teacher(teacher, k, 1.0, tail=tail)
    check(student, record, record.ids[:, -1], hard_weight=2.0, **options)


@dtypes
@divergences
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_peaked_rows(backend: str, divergence: str, tail: str, dtype: torch.dtype) -> None:
    """The listed classes have all of the mass but 1e-9 and less, on either side or on both."""
    for ours, theirs in ((0.0, 25.0), (25.0, 0.0), (60.0, 60.0)):
        student, teacher = peaked(4, 70, ours, 0).to(dtype), peaked(4, 70, theirs, 0)
        teacher = teacher.double() if dtype == torch.float64 else teacher
        record = tgt.topk_teacher(teacher, 8, tail=tail)
        check(student, record, backend=backend, divergence=divergence, reduction="none")


def test_a_share_of_1e_9_still_teaches(backend: str) -> None:
    """q and p of the tail differ by far less than float32 resolves beside 1, and the gradient knows it."""
    student = peaked(4, 100, 30.0, 0)
    record = tgt.topk_teacher(student, 8)
    student.scatter_add_(1, record.ids, torch.full((4, 8), -1.0))  # e times as much in the tail
    _, grad = loss_and_gradient(student, record, backend=backend, reduction="none")
    assert record.tail_log_prob is not None
    wanted = (math.e - 1.0) * record.tail_log_prob.exp()
    torch.testing.assert_close(grad.scatter(1, record.ids, 0.0).sum(-1), wanted, rtol=1e-4, atol=0.0)


@tails
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_record_of_16_bits_does_no_harm(backend: str, tail: str, dtype: torch.dtype) -> None:
    student = logits(6, 60, 0)
    record = tgt.topk_teacher(student, 5, tail=tail)
    assert record.tail_log_prob is not None
    record = dataclasses.replace(
        record, log_probs=record.log_probs.to(dtype), tail_log_prob=record.tail_log_prob.to(dtype),
        ids=record.ids.to(torch.int32),
    )  # fmt: skip
    for divergence in SPARSE_DIVERGENCES:
        loss, _ = check(student, record, backend=backend, divergence=divergence, reduction="none")
        assert (loss >= 0).all()


def test_the_comparison_fails_for_wrong_results() -> None:
    student, record = logits(4, 30, 0), tgt.topk_teacher(logits(4, 30, 1), 5)
    loss, grad = loss_and_gradient(student, record, reduction="none")
    for wrong in (
        (loss * 0, grad),
        (loss, grad * 0),
        (loss, grad * 1.05),
        (loss * 1.05, grad),
        (loss, grad.roll(1, 0)),
    ):
        with pytest.raises(AssertionError):
            assert_near(wrong, (loss, grad), student, record, hard=False, divergence="forward_kl")


# Bounds


@settings(max_examples=60)
@given(
    divergence=st.sampled_from(("forward_kl", "reverse_kl", "jsd")), dtype=st.sampled_from(DTYPES),
    classes=st.integers(1, 60), k=st.integers(1, 60), seed=st.integers(0, 2**31),
    scale=st.sampled_from((0.1, 1.0, 8.0)), temperature=st.sampled_from((0.5, 1.0, 4.0)), near=st.booleans(),
    masked=st.booleans(),
)  # fmt: skip
def test_bucketing_loses_information_and_never_more(
    native: str, divergence: str, dtype: torch.dtype, classes: int, k: int, seed: int, scale: float, temperature: float,
    near: bool, masked: bool,
) -> None:  # fmt: skip
    """0 <= the bucketed divergence <= the dense one."""
    teacher = logits(4, classes, seed) * scale
    student = teacher + 1e-3 * logits(4, classes, seed + 1) if near else logits(4, classes, seed + 1) * scale
    if masked:  # padding, on both sides
        teacher[:, classes // 2 + 1 :] = student[:, classes // 2 + 1 :] = -INF
    student, teacher = student.to(dtype), teacher.to(dtype)
    record = tgt.topk_teacher(teacher, min(k, classes), temperature)
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    for backend in ("reference", native):
        bucketed = tgt.distillation_loss(student, record, backend=backend, **options)
        dense = tgt.distillation_loss(student.double(), teacher.double(), backend="reference", **options)
        assert (bucketed >= 0).all()
        slack = 1e-5 * max(1.0, magnitude(student, teacher) / temperature / 10) * (dense + 1e-2 * temperature**2)
        assert (bucketed.double() <= dense + slack).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_zero_exactly_where_the_buckets_are_equal(backend: str, divergence: str) -> None:
    teacher = logits(6, 40, 0, dtype=torch.float64)
    record = tgt.topk_teacher(teacher, 5, 2.0)
    student = teacher + 7.0  # the same distribution, and then another within the bucket
    others = teacher.scatter(1, record.ids, INF).isfinite()
    shuffled = student.clone()
    for i in range(6):
        shuffled[i, others[i]] = student[i, others[i]].roll(3)
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "reduction": "none"}
    for same in (student, shuffled):
        loss, grad = loss_and_gradient(same, record, **options)
        assert loss.max() < 1e-13
        assert grad.abs().max() < 1e-13
    moved = student.scatter_add(1, record.ids[:, :1], torch.full((6, 1), 0.01, dtype=torch.float64))
    assert (loss_and_gradient(moved, record, **options)[0] > 1e-7).all()


# Masks, rows that are no distribution, rows that do not count


@divergences
@tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(backend: str, divergence: str, tail: str, dtype: torch.dtype) -> None:
    student, teacher = logits(10, 37, 0, dtype=dtype), logits(10, 37, 1)
    student[1, 30:] = teacher[1, 30:] = -INF  # padding
    listed = tgt.topk_teacher(teacher, 5).ids
    student[2, listed[2, 3]] = -INF  # a listed class that the student cannot give
    others = torch.ones(10, 37, dtype=torch.bool).scatter(1, listed, False)
    student[3, others[3]] = -INF  # the student cannot give the tail
    teacher[4, others[4]] = -INF  # the teacher does not
    student[5, others[5]] = -INF
    teacher[5, others[5]] = -INF  # neither
    teacher[6, listed[6, 2:]] = -INF
    teacher[6, others[6]] = -INF  # two entries and three of padding
    student[7, others[7].nonzero()[0]] = -INF  # one class of the tail
    student[8, listed[8]] = -INF  # nothing but the tail
    record = tgt.topk_teacher(teacher, 5, tail=tail)
    options: dict[str, Any] = {"backend": backend, "divergence": divergence, "reduction": "none"}
    loss, grad = check(student, record, **options)
    assert grad[~grad.isnan()].isfinite().all()
    assert grad[student == -INF][~grad[student == -INF].isnan()].eq(0).all()
    assert grad[loss == INF].eq(0).all()
    infinite = {
        "bucket": {"forward_kl": [2, 3, 8], "cross_entropy": [2, 3, 8], "reverse_kl": [4, 6], "jsd": []},
        "uniform": {"forward_kl": [2, 3, 8], "cross_entropy": [2, 3, 8], "reverse_kl": [4, 6], "jsd": []},
        "renormalize": {"forward_kl": [2], "cross_entropy": [2], "reverse_kl": [], "jsd": []},
    }[tail][divergence]
    assert loss.isinf().nonzero().flatten().tolist() == infinite
    assert loss.isnan().nonzero().flatten().tolist() == ([8] if tail == "renormalize" else [])
    check(student, record, targets(10, 37, 3), hard_weight=0.5, label_smoothing=0.1, **options)


@tails
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_no_distribution_is_nan_alone(backend: str, tail: str, dtype: torch.dtype) -> None:
    student, teacher = logits(9, 37, 0, dtype=dtype), logits(9, 37, 1)
    record = tgt.topk_teacher(teacher, 4, tail=tail)
    target = targets(9, 37, 2)
    options: dict[str, Any] = {"backend": backend, "divergence": "jsd", "reduction": "none", "hard_weight": 0.5}
    clean = loss_and_gradient(student, record, target, **options)
    student[1, record.ids[1, 0]], student[2, 36], student[3, 0] = math.nan, math.nan, INF
    student[4] = -INF
    record.log_probs[5, 1], record.log_probs[6, 0] = math.nan, INF
    record.log_probs[7] = -INF
    if record.tail_log_prob is not None:
        record.tail_log_prob[7] = -INF
    loss, grad = loss_and_gradient(student, record, target, **options)
    bad = torch.tensor([False] + [True] * 7 + [False])
    assert loss[bad].isnan().all()
    assert grad[bad].isnan().all()
    assert torch.equal(loss[~bad], clean[0][~bad])
    assert torch.equal(grad[~bad], clean[1][~bad])
    weight = (~bad).float()  # dropped, whatever they hold
    loss, grad = loss_and_gradient(student, record, target, sample_weight=weight, **options)
    assert loss[bad].eq(0).all()
    assert grad[bad].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reductions_weights_and_rows_that_do_not_count(backend: str, reduction: str, dtype: torch.dtype) -> None:
    student, record = logits((2, 3), 20, 0, dtype=dtype), tgt.topk_teacher(logits((2, 3), 20, 1), 4, 2.0)
    target, weight = torch.tensor([[3, -100, -1], [19, 0, 5]]), torch.tensor([[1.0, 1.0, 0.5], [2.0, 0.0, 1.0]])
    options: dict[str, Any] = {
        "backend": backend, "reduction": reduction, "divergence": "forward_kl", "hard_weight": 0.5,
    }  # fmt: skip
    per_row = 1 / 4.5 if reduction == "mean" else 2.0
    loss, grad = check(student, record, target, sample_weight=weight, per_row=per_row, **options)
    assert grad[0, 1].eq(0).all()
    assert grad[1, 1].eq(0).all()
    if reduction == "mean":
        for normalizer in (9.0, torch.tensor(9.0)):
            halved = check(student, record, target, sample_weight=weight, normalizer=normalizer, per_row=0.2, **options)
            torch.testing.assert_close(halved[0], loss / 2)
        loss, grad = loss_and_gradient(student, record, target, normalizer=0.0, **options)
        assert loss == 0
        assert grad.eq(0).all()
    if reduction == "none":
        check(student, record, target, upstream=torch.rand(2, 3), **options)


def test_without_a_soft_term_the_record_is_not_read(backend: str) -> None:
    student, target = logits(4, 30, 0), targets(4, 30, 1)
    record = TeacherTopK(torch.full((4, 3), 99), torch.full((4, 3), math.nan), None, 1.0, 30)
    loss, grad = loss_and_gradient(student, record, target, soft_weight=0.0, hard_weight=1.0, backend=backend)
    leaf = student.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0])


def test_no_rows(backend: str) -> None:
    record = tgt.topk_teacher(torch.zeros(0, 7), 3)
    loss, grad = loss_and_gradient(torch.zeros(0, 7), record, backend=backend)
    assert loss == 0
    assert grad.shape == (0, 7)


def test_extreme_temperatures(backend: str) -> None:
    student, teacher = logits(6, 200, 0), logits(6, 200, 1)
    for temperature in (0.05, 100.0):
        for tail in TAILS:
            record = tgt.topk_teacher(teacher, 9, temperature, tail=tail)
            for divergence in SPARSE_DIVERGENCES:
                check(student, record, backend=backend, divergence=divergence, reduction="none")


# What is refused


def test_a_record_cannot_be_brought_to_another_temperature() -> None:
    student, record = logits(2, 9, 0), tgt.topk_teacher(logits(2, 9, 1), 3, 2.0)
    with pytest.raises(ArgumentError, match=r"temperature is 1, but the record was taken at 2.*cannot be brought"):
        tgt.distillation_loss(student, record)
    with pytest.raises(ArgumentError, match=r"teacher_temperature is 3, but the record was taken at 2"):
        tgt.distillation_loss(student, record, temperature=2.0, teacher_temperature=3.0)


def test_arguments() -> None:
    student, record = logits(2, 9, 0), tgt.topk_teacher(logits(2, 9, 1), 3)
    for divergence in ("symmetric", "tvd", "mse"):
        with pytest.raises(ArgumentError, match=f"with a top-k record, got '{divergence}'"):
            tgt.distillation_loss(student, record, divergence=divergence)
    with pytest.raises(ArgumentError, match="return_stats"):
        tgt.distillation_loss(student, record, return_stats=True)
    with pytest.raises(ShapeError, match=r"student_logits have 8 classes, the record's ids point into 9"):
        tgt.distillation_loss(student[:, :8], record)
    with pytest.raises(ShapeError, match=r"student_logits \(1, 9\) and the record's rows \(2,\)"):
        tgt.distillation_loss(student[:1], record)
    with pytest.raises(ArgumentError, match="hard_weight is 1 but target is missing"):
        tgt.distillation_loss(student, record, hard_weight=1.0)
    ids, log_probs = record.ids, record.log_probs
    for error, message, arguments in (
        (DTypeError, "integer class indices", (log_probs, log_probs, None, 1.0, 9)),
        (DTypeError, "log_probs must be float64", (ids, ids, None, 1.0, 9)),
        (ShapeError, r"\(2, 3\) and \(2, 2\)", (ids, log_probs[:, :2], None, 1.0, 9)),
        (ShapeError, "num_classes = 2 classes, got k = 3", (ids, log_probs, None, 1.0, 2)),
        (ShapeError, r"tail_log_prob \(3,\) does not match", (ids, log_probs, torch.zeros(3), 1.0, 9)),
        (ArgumentError, "temperature must be finite", (ids, log_probs, None, 0.0, 9)),
        (ArgumentError, "tail must be one of", (ids, log_probs, None, 1.0, 9, "ghost")),
        (ArgumentError, "log_probs requires grad", (ids, log_probs.clone().requires_grad_(), None, 1.0, 9)),
    ):
        with pytest.raises(error, match=message):
            TeacherTopK(*arguments)  # type: ignore[arg-type]
    for arguments in ((torch.zeros(2, 3), 4), (torch.zeros(2, 3), 0)):
        with pytest.raises(ArgumentError, match="topk_teacher: k must be in"):
            tgt.topk_teacher(*arguments)


def broken(kind: str) -> tuple[TeacherTopK, str]:
    record = tgt.topk_teacher(logits(5, 70, 1), 4)
    if kind == "twice":
        record.ids[3, 2] = record.ids[3, 0]
        return record, rf"ids\[3, 2\] = {int(record.ids[3, 0])} is listed twice in its row"
    value = {"low": -1, "high": 70, "far": 1 << 40}[kind]
    record.ids[3, 2] = value
    return record, rf"ids\[3, 2\] = {value} is not in \[0, 70\)"


@pytest.mark.parametrize("kind", ["twice", "low", "high", "far"])
def test_ids_are_checked_on_a_cpu(host_backend: str, kind: str) -> None:
    student = logits(5, 70, 0)
    record, message = broken(kind)
    with pytest.raises(ArgumentError, match=f"distillation_loss: {message}"):
        tgt.distillation_loss(student, record, backend=host_backend)
    with pytest.raises(ArgumentError, match=f"TeacherTopK: {message}"):
        record.check()
    target = torch.tensor([0, 0, 0, -100, 0])  # a dropped row may hold anything
    assert tgt.distillation_loss(student, record, target, hard_weight=1.0, backend=host_backend).isfinite()
    record.log_probs[3, 2] = -INF  # and so may padding
    assert tgt.distillation_loss(student, record.check(), backend=host_backend).isfinite()


@tails
@pytest.mark.parametrize("kind", ["twice", "low", "high", "far"])
def test_on_a_device_such_an_entry_is_dropped(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, tail: str
) -> None:
    for dtype in (torch.float32, torch.float64):
        student = logits(5, 70, 0, dtype=dtype)
        record, message = broken(kind)
        record = dataclasses.replace(record, tail=tail)
        without = dataclasses.replace(record, log_probs=record.log_probs.clone())
        without.log_probs[3, 2] = -INF
        with tensors_on_an_emulated_gpu(emulated):
            out = loss_and_gradient(student, record, divergence="forward_kl", reduction="none")
            wanted = loss_and_gradient(student, without, divergence="forward_kl", reduction="none")
            assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
            monkeypatch.setenv("TGT_FAST_CHECK_RECORDS", "1")
            with pytest.raises(ArgumentError, match=message):
                tgt.distillation_loss(student, record)
            monkeypatch.delenv("TGT_FAST_CHECK_RECORDS")


# Autograd, doors, compilation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_runs_as_often_as_it_is_asked(backend: str, dtype: torch.dtype) -> None:
    student, record = logits(4, 30, 0, dtype=dtype).requires_grad_(), tgt.topk_teacher(logits(4, 30, 1), 5, 2.0)
    loss = tgt.distillation_loss(student, record, targets(4, 30, 2), temperature=2.0, hard_weight=1.0, backend=backend)
    grads = [torch.autograd.grad(3.0 * loss, student, retain_graph=True)[0] for _ in range(3)]
    torch.testing.assert_close(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])
    (once,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grads[0], 3 * once)


def test_a_record_that_changed_before_a_second_backward_is_an_error(native: str) -> None:
    student, record = logits(4, 30, 0).requires_grad_(), tgt.topk_teacher(logits(4, 30, 1), 5)
    loss = tgt.distillation_loss(student, record)
    torch.autograd.grad(loss, student, retain_graph=True)
    record.ids[0, 0] = 29
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student)


def test_a_second_derivative_is_refused(native: str) -> None:
    student, record = logits(4, 30, 0).requires_grad_(), tgt.topk_teacher(logits(4, 30, 1), 5)
    (grad,) = torch.autograd.grad(tgt.distillation_loss(student, record), student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_place(backend: str, dtype: torch.dtype, tail: str) -> None:
    student = logits(4, 5000, 0, dtype=dtype)
    record = tgt.topk_teacher(logits(4, 5000, 1), 40, tail=tail)
    options: dict[str, Any] = {"backend": backend, "divergence": "jsd", "hard_weight": 1.0}
    loss, grad = loss_and_gradient(student, record, targets(4, 5000, 2), **options)
    copy = student.clone()
    leaf = student.clone().requires_grad_()
    logits_of_a_layer = leaf * 1.0
    placed = tgt.distillation_loss(
        logits_of_a_layer, record, targets(4, 5000, 2), inplace=backend != "reference", **options
    )
    assert torch.equal(placed.detach(), loss)
    placed.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, grad)
    assert torch.equal(student, copy)


def test_float16_gradients_of_many_rows_do_not_underflow(backend: str) -> None:
    student, record = logits(64, 50, 0, dtype=torch.float16), tgt.topk_teacher(logits(64, 50, 1), 5)
    scale, rows = 2.0**14, 2.0**20
    _, grad = loss_and_gradient(
        student, record, backend=backend, normalizer=rows, upstream=torch.tensor(scale)
    )  # fmt: skip
    _, one = loss_and_gradient(student.double(), in_double(record), backend="reference", reduction="sum")
    torch.testing.assert_close(grad.double(), one * scale / rows, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@tails
def test_both_doors_give_the_same_bits(native: str, dtype: torch.dtype, tail: str) -> None:
    student, record = logits((3, 2), 57, 0, dtype=dtype), tgt.topk_teacher(logits((3, 2), 57, 1), 6, 2.0, tail=tail)
    target = targets(6, 57, 2).reshape(3, 2)
    options: dict[str, Any] = {"hard_weight": 0.5, "reduction": "none", "upstream": torch.rand(3, 2)}
    direct = loss_and_gradient(student, record, target, **options)
    with torch.device("cpu"):  # a function mode sends the call through the dispatcher
        dispatched = loss_and_gradient(student, record, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


def test_the_result_does_not_depend_on_the_number_of_threads(native: str) -> None:
    student, record = logits(64, 4000, 0), tgt.topk_teacher(logits(64, 4000, 1), 32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(loss_and_gradient(student, record, targets(64, 4000, 2), hard_weight=1.0))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_compiled_steps() -> None:
    student, teacher, target = logits(6, 40, 0), logits(6, 40, 1), targets(6, 40, 2)
    record = tgt.topk_teacher(teacher, 5, 2.0)

    def given(s: Tensor, r: TeacherTopK, y: Tensor) -> Tensor:
        return tgt.distillation_loss(s * 1.5, r, y, temperature=2.0, hard_weight=0.5)

    def made(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return given(s, tgt.topk_teacher(t, 5, 2.0), y)

    for function, other in ((given, record), (made, teacher)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = []
        for run in (function, compiled):
            leaf = student.clone().requires_grad_()
            loss = run(leaf, other, target)  # type: ignore[arg-type]
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_the_module_takes_a_record() -> None:
    student, record, target = logits(4, 30, 0), tgt.topk_teacher(logits(4, 30, 1), 5, 2.0), targets(4, 30, 2)
    module = tgt.DistillationLoss(temperature=2.0, hard_weight=1.0)
    expected = tgt.distillation_loss(student, record, target, temperature=2.0, hard_weight=1.0)
    assert torch.equal(module(student, record, target), expected)  # type: ignore[arg-type]
    assert torch.equal(module.soft(student, record), tgt.distillation_loss(student, record, temperature=2.0))  # type: ignore[arg-type]


# The record as an object


def test_a_record_is_a_tree_of_rows() -> None:
    record = tgt.topk_teacher(logits((4, 3), 30, 1), 5, 2.0)
    part = record[1:3]
    assert (part.shape, part.temperature, part.num_classes) == ((2, 3), 2.0, 30)
    assert torch.equal(part.ids, record.ids[1:3])
    assert record[torch.tensor([True, False, True, False])].shape == (2, 3)
    assert record[0, 1].shape == ()
    with pytest.raises(ShapeError, match="selects rows"):
        record[..., :2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.tail = "uniform"  # type: ignore[misc]
    assert record.to("meta").device.type == "meta"
    leaves, spec = pytree.tree_flatten(record)
    assert [leaf.shape for leaf in leaves] == [(4, 3, 5), (4, 3, 5), (4, 3)]
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, TeacherTopK)
    assert again.tail == "bucket"
    doubled = pytree.tree_map(lambda x: x + x, {"a": record})["a"]
    assert torch.equal(doubled.ids, 2 * record.ids)


# Every way to lay a row on the chip

PLANS = {
    "a block": (2, 1, False),
    "a block, bulk copies": (2, 1, True),
    "2 blocks, bulk copies": (2, 2, True),
    "4 blocks": (2, 4, False),
    "8 blocks, bulk copies": (2, 8, True),
    "streamed": (3, 0, True),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
# 1: seven blocks of eight have nothing; 67: an end; 1033: blocks of unequal shares
@pytest.mark.parametrize(("classes", "k"), [(1, 1), (67, 9), (1033, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(
    emulated: ModuleType, plan: tuple[int, int, bool], classes: int, k: int, dtype: torch.dtype
) -> None:
    student, target = logits(3, classes, 0, dtype=dtype), torch.tensor([0, classes // 2, classes - 1])
    for divergence, tail in (("forward_kl", "bucket"), ("jsd", "uniform"), ("reverse_kl", "renormalize")):
        record = tgt.topk_teacher(logits(3, classes, 1), k, 2.0, tail=tail)
        options = DistillOptions(
            divergence, temperature=2.0, teacher_temperature=2.0, hard_weight=0.5, label_smoothing=0.1, reduction="none"
        )
        with tensors_on_an_emulated_gpu(emulated):
            engine = cuda.engine(student)
            assert engine is not None
            listed = Listed(record.ids, record.log_probs, record.rest(), tail)
            out = cuda_sparse.forward(
                engine, student, listed, target, None, None, options, wanted=True, keep_rows=True, plan=plan
            )
            assert out.rows is not None
            again = cuda_sparse.backward(engine, student, listed, target, out.rows, torch.ones(()), options)
        truth = loss_and_gradient(
            student.double(), in_double(record), target, backend="reference", divergence=divergence, hard_weight=0.5,
            label_smoothing=0.1, reduction="none",
        )  # fmt: skip
        for grad in (out.d_student, again):
            assert grad is not None
            assert_near((out.loss, grad), truth, student, record, hard=True, divergence=divergence)
