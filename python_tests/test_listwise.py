"""The listwise loss: its value and gradient against formulas row by row, order, records, masks, reductions, the op."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError

loss_of = tgt.listwise_distillation_loss
EVERY = ("reference", "native", "triton")


@pytest.fixture(params=EVERY)
def engine(request: pytest.FixtureRequest) -> str:
    """The backends that have a kernel on a CPU."""
    if request.param == "reference":
        return "reference"
    return str(request.getfixturevalue("interpreted" if request.param == "triton" else "native"))


def normal(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(s: Any, order: Any, weights: Any) -> tuple[float, Any]:
    """Loss and gradient of a row from its classes in their order, in the widest floats there are."""
    s, grad, total = s.astype(np.longdouble), np.zeros(len(s), np.longdouble), np.longdouble(0)
    for k, (place, a) in enumerate(zip(order, weights, strict=True)):
        x = s[order[k:]]
        peak = x.max()
        e = np.exp(x - peak)
        total += a * (peak + np.log(e.sum()) - s[place])
        grad[order[k:]] += a * e / e.sum()
        grad[place] -= a
    return float(total), grad.astype(np.float64)


def expected(s: Tensor, t: Tensor, y: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    losses, grads = [], []
    for i in range(s.shape[0]):
        teacher = t[i].double().numpy()
        live = [c for c in range(len(teacher)) if teacher[c] > -math.inf]
        label = -1 if y is None else int(y[i])
        order = sorted(live, key=lambda c: (c != label, -teacher[c], c))
        p = np.exp((teacher[live] - teacher[live].max()) / temperature)
        weights = dict(zip(live, p / p.sum(), strict=True))
        loss, grad = by_hand(s[i].double().numpy(), np.array(order), [weights[c] for c in order])
        losses.append(loss)
        grads.append(torch.from_numpy(grad))
    return torch.tensor(losses, dtype=torch.float64), torch.stack(grads)


def measured(s: Tensor, t: Any, y: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    student = s.clone().requires_grad_()
    loss = loss_of(student, t, y, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.dtype == s.dtype
    return loss.detach(), grad


@pytest.mark.parametrize(
    ("rows", "classes", "temperature", "dtype"),
    [
        (3, 1, 1.0, torch.float64),
        (5, 7, 1.0, torch.float64),  # sorted by insertion
        (4, 70, 1.5, torch.float32),  # by digits, of which float32 has three
        (3, 67, 0.5, torch.float64),  # and float64 six
        (3, 50, 4.0, torch.bfloat16),
        (3, 33, 1.0, torch.float16),
    ],
)
@pytest.mark.parametrize("labeled", [True, False])
def test_the_formula(
    engine: str, rows: int, classes: int, temperature: float, dtype: torch.dtype, labeled: bool
) -> None:
    s, t = normal(1, rows, classes).to(dtype), normal(2, rows, classes).to(dtype)
    y = torch.arange(rows) % classes if labeled else None
    losses, grads = expected(s, t, y, temperature)
    loss, grad = measured(s, t, y, teacher_temperature=temperature, reduction="none", backend=engine)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bar = 1e-9 if dtype == torch.float64 else 1e-5
    scale = 1e-2 + losses.abs()
    assert ((loss - losses).abs() <= bar * scale).all()
    rounded = 1.5 * (grads - grads.to(dtype).double()).norm() if dtype.itemsize == 2 else 0.0
    assert (grad - grads).norm() <= rounded + bar * (grads.norm() + 1e-2)
    if classes > 1:  # the comparison can fail
        assert (0.95 * grads - grads).norm() > rounded + bar * (grads.norm() + 1e-2)
        assert ((0.95 * losses - losses).abs() > bar * scale).all()


def test_several_tiles_of_the_triton_kernel(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgt_fast.kernels.triton import listwise

    monkeypatch.setattr(listwise, "LISTWISE_BLOCK", 16)
    s, t = normal(1, 2, 37), normal(2, 2, 37)
    losses, grads = expected(s, t, None, 1.0)
    loss, grad = measured(s, t, reduction="none", backend=interpreted)
    torch.testing.assert_close(loss, losses)
    torch.testing.assert_close(grad, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_apart(engine: str, dtype: torch.dtype) -> None:
    """Suffix sums of which a few classes hold nearly nothing: by sums, and by logarithms beyond a spread of 600."""
    s = torch.tensor([[0.0, 80.0, -300.0, 5.0, -80.0], [0.0, 900.0, -900.0, 3.0, -2000.0]], dtype=dtype)
    t = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5], [3.0, -3.0, 0.0, 2.0, 1.0]], dtype=dtype)
    for y in (None, torch.tensor([2, 4])):
        losses, grads = expected(s, t, y, 1.0)
        loss, grad = measured(s, t, y, reduction="none", backend=engine)
        # As for every loss: exp magnifies the rounding of its argument.
        bar = 1e-9 if dtype == torch.float64 else 1e-5 * float(s.abs().max()) / 10
        assert ((loss - losses).abs() <= bar * losses.abs()).all()
        assert ((grad - grads).norm(dim=-1) <= bar * (grads.norm(dim=-1) + 1e-2)).all()


def test_equal_logits_are_ranked_by_id(engine: str) -> None:
    s = normal(3, 2, 60)
    t = torch.zeros(2, 60, dtype=torch.float64)
    t[:, 1::2] = -0.0
    t[1, 30:] = 1.0
    losses, grads = expected(s, t, None, 1.0)
    loss, grad = measured(s, t, reduction="none", backend=engine)
    torch.testing.assert_close(loss, losses)
    torch.testing.assert_close(grad, grads)
    order = list(range(60))
    assert losses[0] == pytest.approx(by_hand(s[0].numpy(), np.array(order), [1 / 60] * 60)[0])


def test_classes_that_the_teacher_masks_are_left_out(engine: str) -> None:
    s, t = normal(4, 3, 60), normal(5, 3, 60)
    t[:, 10:15] = -math.inf
    s[0, 12] = -math.inf
    y = torch.tensor([12, 3, -1])  # the first is masked: as if there were none
    losses, grads = expected(s.nan_to_num(neginf=0.0), t, torch.tensor([-1, 3, -1]), 1.0)
    loss, grad = measured(s, t, y, reduction="none", backend=engine)
    torch.testing.assert_close(loss, losses)
    torch.testing.assert_close(grad, grads)
    assert (grad[:, 10:15] == 0).all()


def test_rows_that_are_odd_and_rows_that_do_not_count(engine: str) -> None:
    s, t = normal(6, 6, 8), normal(7, 6, 8)
    s[0, 3] = -math.inf  # the loss is infinite
    s[1, 2] = math.nan
    t[2, 2] = math.inf
    s[3], t[4] = -math.inf, math.nan
    y = torch.tensor([1, 1, 1, 1, -100, 1])
    loss, grad = measured(s, t, y, reduction="none", backend=engine)
    assert loss[0] == math.inf
    assert loss[1:4].isnan().all()
    assert loss[4] == 0
    assert loss[5].isfinite()
    assert (grad[[0, 4]] == 0).all()
    assert grad[5].isfinite().all()
    weight = torch.tensor([0.0, 0, 0, 0, 1, 2])
    mean, grad = measured(s, t, y, sample_weight=weight, backend=engine)
    torch.testing.assert_close(mean, loss[5])
    assert (grad[:5] == 0).all()


def test_reductions_and_divisors(engine: str) -> None:
    s, t = normal(8, 2, 3, 5), normal(9, 2, 3, 5)
    y = torch.tensor([[0, 1, -100], [-1, 2, 4]])
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 1.0]])
    rows = loss_of(s, t, y, sample_weight=weight, reduction="none", backend=engine)
    assert rows.shape == (2, 3)
    assert rows[0, 2] == rows[1, 1] == 0
    total = loss_of(s, t, y, sample_weight=weight, reduction="sum", backend=engine)
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(loss_of(s, t, y, sample_weight=weight, backend=engine), total / 4.5)
    torch.testing.assert_close(loss_of(s, t, y, sample_weight=weight, normalizer=3, backend=engine), total / 3)
    at = torch.tensor(0.0)
    assert loss_of(s, t, y, normalizer=at, backend=engine) == 0
    assert loss_of(s, t, torch.full((2, 3), -100), backend=engine) == 0
    empty, grad = measured(s[:0], t[:0], backend=engine)
    assert empty == 0
    assert grad.shape == (0, 3, 5)


def test_upstream_gradients_and_a_second_backward(engine: str) -> None:
    for dtype in (torch.float32, torch.float16):
        student, t = normal(10, 4, 6).to(dtype).requires_grad_(), normal(11, 4, 6)
        rows = loss_of(student, t, reduction="none", backend=engine)
        upstream = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
        (first,) = torch.autograd.grad(rows, student, upstream.to(rows.dtype), retain_graph=True)
        (second,) = torch.autograd.grad(rows, student, upstream.to(rows.dtype))
        _, unit = expected(student.detach(), t, None, 1.0)
        bar = 2e-3 if dtype == torch.float16 else 1e-5
        for found in (first, second):
            torch.testing.assert_close(found.double(), upstream[:, None] * unit, rtol=bar, atol=bar / 10)
    if engine != "reference":
        (grad,) = torch.autograd.grad(loss_of(student, t, backend=engine), student, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), student)


def test_gradients_of_a_mean_over_many_rows_do_not_underflow_in_float16(engine: str) -> None:
    s, t = normal(12, 4, 6).half(), normal(13, 4, 6)
    (wide,) = torch.autograd.grad(loss_of(x := s.float().requires_grad_(), t, normalizer=1e6, backend=engine), x)
    (grad,) = torch.autograd.grad(65536 * loss_of(x := s.requires_grad_(), t, normalizer=1e6, backend=engine), x)
    torch.testing.assert_close(grad.float(), 65536 * wide, rtol=2e-3, atol=1e-5)


def test_by_hand(engine: str) -> None:
    """Three equal logits: log 3 for the first place, log 2 for the second, by the teacher's weights 1/2, 1/4, 1/4."""
    s = torch.zeros(1, 3, dtype=torch.float64)
    t = torch.tensor([[math.log(2.0), 0.0, 0.0]], dtype=torch.float64)
    assert loss_of(s, t, backend=engine).item() == pytest.approx(math.log(3) / 2 + math.log(2) / 4)
    found = loss_of(s, t, torch.tensor([2]), backend=engine).item()  # the label first: weights 1/4, 1/2, 1/4
    assert found == pytest.approx(math.log(3) / 4 + math.log(2) / 2)
    s[0, 0] = math.log(2.0)  # then 2 of 4 for the first place
    assert loss_of(s, t, backend=engine).item() == pytest.approx(3 * math.log(2) / 4)


# What the paper states


def test_all_weight_on_the_label_is_the_cross_entropy_and_equal_weights_are_listmle(engine: str) -> None:
    s, y = normal(14, 4, 9), torch.tensor([3, 0, 8, 2])
    sure = torch.where(F.one_hot(y, 9) > 0, 0.0, -800.0).double()
    torch.testing.assert_close(loss_of(s, sure, y, backend=engine), F.cross_entropy(s, y))
    t = normal(15, 4, 9)
    order = t.argsort(dim=-1, descending=True)
    ranked = s.gather(1, order)
    likelihood = sum(ranked[:, k] - ranked[:, k:].logsumexp(-1) for k in range(9))
    flat = loss_of(s, t, teacher_temperature=100.0, backend=engine)
    exact = loss_of(s, t * 1e-9, teacher_temperature=100.0, backend=engine)
    torch.testing.assert_close(exact, -torch.as_tensor(likelihood).mean() / 9)
    assert (flat - exact).abs() < 0.1 * exact


def test_convex_and_without_a_place(engine: str) -> None:
    a, b, t = normal(16, 4, 9), normal(17, 4, 9), normal(18, 4, 9)
    both = [loss_of(x, t, reduction="none", backend=engine) for x in (a, b, (a + b) / 2)]
    assert (both[2] <= (both[0] + both[1]) / 2 + 1e-12).all()
    torch.testing.assert_close(loss_of(a + 50, t, reduction="none", backend=engine), both[0])
    _, grad = measured(a, t, backend=engine)
    assert grad.sum(-1).abs().max() < 1e-12


def test_the_reference_is_differentiable_twice() -> None:
    s = normal(19, 2, 5).requires_grad_()
    t, y = normal(20, 2, 5), torch.tensor([4, -1])
    assert torch.autograd.gradcheck(lambda x: loss_of(x, t, y, backend="reference"), s)
    assert torch.autograd.gradgradcheck(lambda x: loss_of(x, t, y, backend="reference"), s)


# Records


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_record_ranks_what_it_lists(engine: str, tail: str) -> None:
    s, t, y = normal(21, 3, 60), normal(22, 3, 60), torch.tensor([0, -1, 7])
    record = tgt.topk_teacher(t, 5, temperature=1.5, tail=tail)
    y[0] = record.ids[0, 2]  # listed; the last is not
    assert 7 not in record.ids[2]
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    record = tgt.TeacherTopK(
        record.ids[:, shuffled], record.log_probs[:, shuffled], record.tail_log_prob, 1.5, 60, tail
    )
    p = (t / 1.5).softmax(-1)
    losses, grads = [], []
    for i in range(3):
        listed = sorted(record.ids[i].tolist(), key=lambda c: -t[i, c])
        weights = dict.fromkeys(range(60), 0.0) | {c: float(p[i, c]) for c in listed}
        rest = 1 - sum(weights.values())
        label = int(y[i])
        if label >= 0 and label not in listed:
            weights[label] = rest / 55
        if tail == "renormalize":
            weights = {c: weights[c] / (1 - rest) if c in listed else 0.0 for c in weights}
        order = [c for c in listed if c != label] + [c for c in range(60) if c not in listed and c != label]
        order = ([label] if label >= 0 else []) + order
        one, slope = by_hand(s[i].numpy(), np.array(order), [weights[c] for c in order])
        losses.append(one)
        grads.append(torch.from_numpy(slope))
    loss, grad = measured(s, record, y, teacher_temperature=1.5, reduction="none", backend=engine)
    torch.testing.assert_close(loss, torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, torch.stack(grads), rtol=1e-5, atol=1e-7)


def test_a_record_of_all_classes_is_the_teacher(engine: str) -> None:
    s, t, y = normal(23, 3, 7), normal(24, 3, 7), torch.tensor([6, -1, 0])
    record = tgt.topk_teacher(t, 7)
    for ours, theirs in zip(measured(s, record, y, backend=engine), measured(s, t, y, backend=engine), strict=True):
        torch.testing.assert_close(ours, theirs)


# The op and the module


def test_the_same_bits_on_any_number_of_threads_and_from_strided_rows(native: str) -> None:
    s, t = normal(25, 300, 120).float(), normal(26, 300, 120).float()
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(measured(s, t, backend=native))
    finally:
        torch.set_num_threads(before)
    wide = torch.stack([s, t], 1)
    found.append(measured(wide[:, 0], wide[:, 1], backend=native))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.once("torch.compile")
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the compiler of the oldest PyTorch does not know this Python")
def test_compiled(native: str) -> None:
    s, t, y = normal(27, 4, 9).float(), normal(28, 4, 9).float(), torch.tensor([1, 2, -1, -100])

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(x, t, y, backend=native)
        return loss, 2 * loss

    compiled: Any = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for function in (both, compiled):
        x = s.clone().requires_grad_()
        loss, twice = function(x)
        twice.backward()
        results.append((loss.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_is_refused(none_chosen: Any) -> None:
    s, t = normal(29, 3, 5), normal(30, 3, 5)
    for bad, error, match in (
        ({"teacher_temperature": 0}, ArgumentError, "teacher_temperature"),
        ({"reduction": "batchmean"}, ArgumentError, "reduction"),
        ({"student": s[:2]}, ShapeError, "differ"),
        ({"student": s.long()}, DTypeError, "student"),
        ({"teacher": t.clone().requires_grad_()}, ArgumentError, "detach"),
        ({"target": torch.tensor([0, 1])}, ShapeError, "target"),
        ({"target": t.softmax(-1)}, DTypeError, "target"),
        ({"target": torch.tensor([0, 1, 5])}, ArgumentError, "target"),
        ({"sample_weight": -torch.ones(3)}, ArgumentError, "weight"),
        ({"normalizer": 2.0, "reduction": "sum"}, ArgumentError, "normalizer"),
        ({"teacher": tgt.topk_teacher(t, 2, 2.0)}, ArgumentError, "teacher_temperature is 1"),
    ):
        arguments: dict[str, Any] = {"student": s, "teacher": t, "backend": none_chosen, **bad}
        with pytest.raises(error, match=match):
            loss_of(**arguments)


def test_the_module_keeps_options_and_is_a_term() -> None:
    s, t, y = normal(31, 3, 5), normal(32, 3, 5), torch.tensor([1, -1, 2])
    loss = tgt.ListwiseDistillationLoss(2.0, reduction="sum")
    assert repr(loss) == "ListwiseDistillationLoss(teacher_temperature=2.0, reduction='sum')"
    torch.testing.assert_close(loss(s, t, y), loss_of(s, t, y, teacher_temperature=2.0, reduction="sum"))
    loss.reduction = "mean"
    torch.testing.assert_close(loss(s, t, y, sample_weight=torch.ones(3)), loss_of(s, t, y, teacher_temperature=2.0))
    with pytest.raises(ArgumentError, match="teacher_temperature"):
        tgt.ListwiseDistillationLoss(-1.0)
    torch.testing.assert_close(tgt.Term(loss).mean(s, t, y, torch.ones(3)), loss(s, t, y))
