"""Shares of the classes (soft labels, one-hot rows, mixup) in the place of labels, in the hard term of the losses."""

from __future__ import annotations

import math
from typing import Any

import numerics
import pytest
import torch
import toys
from torch import Tensor
from torch.nn import functional as F

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError

ROWS, CLASSES = 6, 37
BARS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def logits(seed: int, dtype: torch.dtype = torch.float32, classes: int = CLASSES) -> Tensor:
    made = toys.normal(ROWS, classes, seed=seed) * 3
    made[1] *= 6  # peaked
    return made.to(dtype)


def shares(seed: int = 2, classes: int = CLASSES) -> Tensor:
    """Mixup of two labels, a soft row, one-hot rows, a row of nothing and one of more than 1."""
    made = torch.zeros(ROWS, classes)
    made[0, 3], made[0, 5] = 0.3, 0.7
    made[1] = toys.normal(classes, seed=seed).softmax(0)
    made[2, classes - 1] = made[3, 0] = 1.0
    made[5] = toys.normal(classes, seed=seed + 1).softmax(0) * 2.5
    return made


def truth(s: Tensor, t: Tensor, y: Tensor, upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """PyTorch's own cross-entropy with probabilities, in float64, beside the soft term."""
    s, t, y = s.detach().double().requires_grad_(), t.detach().double(), y.double()
    hard, reduction = options.pop("hard_weight"), options.pop("reduction", "mean")
    weight, divisor = options.pop("sample_weight", None), options.pop("normalizer", None)
    rows = hard * F.cross_entropy(s, y, reduction="none")
    if options.get("soft_weight", 1.0):
        rows = rows + tgt.distillation_loss(s, t, reduction="none", backend="reference", **options)
    weight = torch.ones(len(s), dtype=torch.float64) if weight is None else weight.double()
    loss = rows * weight
    if reduction != "none":
        loss = loss.sum() / ((weight.sum() if divisor is None else divisor) if reduction == "mean" else 1.0)
    (grad,) = torch.autograd.grad(loss, s, torch.ones_like(loss) if upstream is None else upstream.double())
    return loss.detach(), grad


def assert_same(out: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    # A float32 row whose likeliest class has 1 - 1e-7 of the probability is wrong in all digits without care.
    numerics.assert_close("loss", out[0], expected[0], bar=min(BARS[dtype], 1e-5), floor=0.1)
    numerics.assert_close("d_student", out[1], expected[1], bar=BARS[dtype], floor=1e-2 * ROWS**-0.5)


def computed(s: Tensor, t: Any, y: Tensor, upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    loss: Tensor = tgt.distillation_loss(s, t, y, **options)
    (grad,) = torch.autograd.grad(loss, s, torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), grad


OPTIONS: list[dict[str, Any]] = [
    {},
    {"soft_weight": 0.0},
    {"temperature": 2.0, "divergence": "reverse_kl", "reduction": "sum"},
    {"temperature": 4.0, "divergence": "jsd", "reduction": "none"},
    {"temperature": 3.0, "divergence": "tvd", "sample_weight": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0])},
    {"divergence": "mse", "normalizer": 11.0},
    {"divergence": "cross_entropy", "sample_weight": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0]), "reduction": "sum"},
]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradient(backend: str, dtype: torch.dtype, number: int) -> None:
    options = {"hard_weight": 0.7, **OPTIONS[number]}
    s, t, y = logits(0, dtype), logits(1, dtype), shares()
    upstream = torch.linspace(0.5, 2, ROWS) if options.get("reduction") == "none" else None
    assert_same(computed(s, t, y, upstream, backend=backend, **options), truth(s, t, y, upstream, **options), dtype)


def test_many_classes_and_a_second_backward(backend: str) -> None:
    """More than a block of the kernels; and gradients that are made anew."""
    classes = 4500
    s, t, y = logits(0, classes=classes), logits(1, classes=classes), shares(classes=classes)
    expected = truth(s, t, y, hard_weight=0.7)
    s.requires_grad_()
    loss = tgt.distillation_loss(s, t, y, hard_weight=0.7, backend=backend)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, s, retain_graph=True)
        assert_same((loss.detach(), grad), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.bfloat16], ids=str)
def test_one_hot_rows_of_any_dtype_are_labels(backend: str, dtype: torch.dtype) -> None:
    labels = torch.tensor([3, 0, 36, 7, 7, 1])
    rows = F.one_hot(labels, CLASSES).to(dtype)
    options = {"temperature": 2.0, "hard_weight": 0.5, "backend": backend}
    assert_same(computed(logits(0), logits(1), rows, **options), computed(logits(0), logits(1), labels, **options),
                torch.float32)  # fmt: skip


def test_masked_classes(backend: str) -> None:
    """A class that the student cannot give: nothing where it has no share, +inf and no hard gradient where it has."""
    s, t, y = logits(0), logits(1), shares()
    s[:, 3] = t[:, 3] = s[5, 8] = t[5, 8] = -math.inf
    y[5, 8] = y[5, 3] = 0.0
    loss, grad = computed(s, t, y, hard_weight=1.0, reduction="none", backend=backend)
    assert loss[0] == math.inf
    assert loss[1] == math.inf
    assert bool(loss[2:].isfinite().all())
    assert bool(grad.isfinite().all())
    y[:, 3] = 0.0
    expected = truth(s.clamp_min(-1e4), t.clamp_min(-1e4), y, hard_weight=1.0, reduction="none")
    assert_same(computed(s, t, y, hard_weight=1.0, reduction="none", backend=backend), expected, torch.float32)


def test_in_place(backend: str) -> None:
    expected = truth(logits(0), logits(1), shares(), hard_weight=0.7)
    leaf = logits(0).requires_grad_()
    loss = tgt.distillation_loss(leaf * 1.0, logits(1), shares(), hard_weight=0.7, backend=backend,
                                 inplace=backend != "reference")  # fmt: skip
    (grad,) = torch.autograd.grad(loss, leaf)
    assert_same((loss.detach(), grad), expected, torch.float32)


@pytest.mark.records
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_beside_a_record(backend: str, tail: str) -> None:
    record = tgt.topk_teacher(logits(1), 5, 2.0, tail=tail)
    options = {"temperature": 2.0, "backend": backend}
    loss, grad = computed(logits(0), record, shares(), hard_weight=0.7, **options)
    s = logits(0).double().requires_grad_()
    soft = tgt.distillation_loss(s, record, temperature=2.0, backend="reference")
    expected = soft + 0.7 * F.cross_entropy(s, shares().double())
    assert_same((loss, grad), (expected.detach(), torch.autograd.grad(expected, s)[0]), torch.float32)


@pytest.mark.parametrize("vocab_size", [None, 30])
def test_from_hidden_states(backend: str, vocab_size: int | None) -> None:
    """A chunk of a row or two at a time, also of half-known vocabularies, equal to the loss of all logits."""
    hidden, weight = toys.normal(ROWS, 4, seed=3), toys.normal(CLASSES, 4, seed=4)
    classes = vocab_size or CLASSES
    y, teacher = shares(classes=classes), logits(1)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.5])
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = tgt.linear_distillation_loss(
        leaves[0], leaves[1], target=y, teacher_logits=teacher, vocab_size=vocab_size, hard_weight=0.7,
        sample_weight=weights, memory_budget=1024, backend=backend,
    )  # fmt: skip
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    made = (exact[0] @ exact[1].T)[:, :classes]
    rows = tgt.distillation_loss(made, teacher[:, :classes].double(), reduction="none", backend="reference")
    rows = rows + 0.7 * F.cross_entropy(made, y.double(), reduction="none")
    expected = (rows * weights).sum() / weights.sum()
    numerics.assert_close("loss", loss.detach(), expected.detach(), bar=1e-5, floor=0.1)
    for name, a, b in zip("hw", torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        numerics.assert_close(name, a, b, bar=1e-5, floor=1e-2)


def test_what_is_refused(none_chosen: None) -> None:
    s, t, y = logits(0), logits(1), shares()
    hidden = toys.normal(ROWS, 4), toys.normal(CLASSES, 4)
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda y, **o: tgt.distillation_loss(s, t, y, hard_weight=1.0, **o), ArgumentError, "label_smoothing"),
        (lambda y, **o: tgt.linear_distillation_loss(*hidden, teacher_logits=t, target=y, hard_weight=1.0, **o),
         ArgumentError, "label_smoothing"),
    ]  # fmt: skip
    for call, error, match in calls:
        with pytest.raises(error, match=match):
            call(y, label_smoothing=0.1)
        with pytest.raises(ShapeError, match="as many as there are, got 36"):
            call(y[:, 1:])
        with pytest.raises(DTypeError, match="integer class indices, or shares"):
            call(y[:, 0])


def test_a_share_below_0_is_found_on_a_cpu(host_backend: str) -> None:
    y, weight = shares(), torch.ones(ROWS)
    y[4, 2], y[2, 1] = math.nan, -0.5
    with pytest.raises(ArgumentError, match=r"target\[2, 1\] = -0.5 is no share of a class"):
        computed(logits(0), logits(1), y, hard_weight=1.0, backend=host_backend)
    weight[2] = weight[4] = 0.0  # rows that are dropped are not looked at
    loss, _ = computed(logits(0), logits(1), y, hard_weight=1.0, sample_weight=weight, backend=host_backend)
    assert bool(loss.isfinite())


def test_beside_a_hard_weight_of_0_they_say_nothing(backend: str) -> None:
    options = {"backend": backend, "temperature": 2.0}
    out = computed(logits(0), logits(1), shares(), **options)
    expected = computed(logits(0), logits(1), None, **options)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_a_second_derivative_and_gradcheck_of_the_reference() -> None:
    s, t, y = logits(0, torch.float64)[:3, :5], logits(1, torch.float64)[:3, :5], shares()[:3, :5]
    call = lambda s: tgt.distillation_loss(s, t, y, hard_weight=0.7, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(call, s.clone().requires_grad_())


def test_compiled_whole() -> None:
    t = logits(1)
    call = lambda s, y: tgt.distillation_loss(s, t, y, hard_weight=0.7)  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    grads = []
    for one in (call, compiled):
        s = logits(0).requires_grad_()
        loss = one(s, shares())
        grads.append((loss.detach(), *torch.autograd.grad(loss, s)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_mixup_in_training() -> None:
    """In the objective, over micro-batches of a step, and in fit by the columns of a batch."""
    teacher, student = toys.vector_teacher(), toys.student().eval()
    x, y = toys.normal(8, toys.FEATURES), toys.normal(8, toys.CLASSES, seed=5).softmax(-1)
    objective = tgt.TGTObjective(teacher, loss=tgt.DistillationLoss(temperature=2.0, hard_weight=1.0))
    out = objective(student, x, y)
    hard = F.cross_entropy(student(x), y)
    assert float(out["parts"]["hard"]) == pytest.approx(float(hard.detach()), rel=1e-5)
    n, _ = objective.normalizers([(x[:2], y[:2]), (x[2:], y[2:])], columns=(None, 0, 1))
    assert float(n) == 8
    parts = [objective(student, x[a:b], y[a:b], normalizer=n)["loss"] for a, b in ((0, 2), (2, 8))]
    assert float(sum(parts).detach()) == pytest.approx(float(out["loss"].detach()), rel=1e-5)  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    assert tgt.fit(student, objective, [(x, y)], steps=1, optimizer=optimizer, columns=(None, 0, 1),
                   progress=False).steps == 1  # fmt: skip
