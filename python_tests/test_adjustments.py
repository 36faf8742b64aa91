"""Biases, margins, standardised logits, decoupled, skewed and corrected divergences, and a temperature a row."""

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
from tgt_fast.kernels import composed
from tgt_fast.kernels.reference import distill as reference_distill
from tgt_fast.ops import distill as distill_op

ROWS, CLASSES = 7, 33
INF = math.inf
BIAS, OTHER_BIAS = (toys.normal(CLASSES, seed=seed) for seed in (5, 6))
MARGIN = toys.normal(CLASSES, seed=7).abs()
T_ROWS, TT_ROWS = torch.linspace(0.7, 4.0, ROWS), torch.linspace(3.0, 0.8, ROWS)
TARGET = torch.tensor([3, 0, -1, 8, -100, 32, 11])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.0, 0.0, 3.0])
HARD = {"hard_weight": 0.7, "soft_weight": 0.4}

CASES: dict[str, dict[str, Any]] = {
    "biases": {**HARD, "student_bias": BIAS, "teacher_bias": OTHER_BIAS, "temperature": 2.0},
    "one bias, jsd": {**HARD, "student_bias": BIAS, "divergence": "jsd", "beta": 0.3},
    "margin": {**HARD, "label_margin": MARGIN, "label_smoothing": 0.2, "divergence": "tvd"},
    "margin alone": {"soft_weight": 0.0, "hard_weight": 1.0, "label_margin": MARGIN, "student_bias": BIAS},
    "standardized": {**HARD, "standardize": True, "temperature": 2.0, "teacher_temperature": 3.0},
    "standardized mse": {"standardize": True, "divergence": "mse", "temperature": 0.5},
    "decoupled": {"decoupled": (1.0, 8.0), "temperature": 4.0},
    "decoupled, hard": {**HARD, "decoupled": (0.5, 2.0), "standardize": True, "teacher_bias": BIAS},
    "label's part": {"decoupled": (1.5, 0.0)},
    "others' part": {"decoupled": (0.0, 1.5)},
    "skewed": {**HARD, "skew": 0.1, "temperature": 2.0},
    "skewed back": {"skew": 0.3, "divergence": "reverse_kl", "student_bias": BIAS},
    "corrected": {**HARD, "correct_teacher": 0.2, "temperature": 2.0},
    "corrected, standardized": {"correct_teacher": 1.0, "standardize": True},
    "rows": {**HARD, "temperature": T_ROWS, "teacher_temperature": TT_ROWS},
    "rows of one side": {"temperature": 2.0, "teacher_temperature": TT_ROWS, "divergence": "symmetric"},
    "rows and all": {
        **HARD, "temperature": T_ROWS, "decoupled": (1.0, 2.0), "standardize": True, "student_bias": BIAS,
        "label_margin": MARGIN, "label_smoothing": 0.1,
    },
}  # fmt: skip


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two sides, a few classes of which are not there."""
    s, t = (toys.normal(ROWS, CLASSES, seed=seed) * 3 for seed in (0, 1))
    t[0] *= 6  # sure of itself
    t[3, 8] = 30.0  # and of the label
    for side in (s, t):
        side[1, 5:20] = -INF
        side[6, 30:] = -INF
    return s.to(dtype), t.to(dtype)


def row_loss(s: Tensor, t: Tensor, y: int, o: dict[str, Any], ts: float, tt: float) -> Tensor:
    """The loss of one row, from official code's formulas, on the classes that exist alone."""
    here = (s > -INF) & (t > -INF)
    names = [int(c) for c in here.nonzero()]
    labeled = y >= 0
    at = names.index(y) if labeled else -1

    def of(vector: Any) -> Any:
        return 0.0 if vector is None else vector.double()[here]

    s, t = s[here] + of(o.get("student_bias")), t[here] + of(o.get("teacher_bias"))
    hard = torch.zeros((), dtype=torch.float64)
    if o.get("hard_weight") and labeled:
        lowered = s.clone()
        if o.get("label_margin") is not None:
            lowered[at] = lowered[at] - o["label_margin"].double()[y]
        label = torch.tensor(at)
        hard = F.cross_entropy(lowered, label, label_smoothing=o.get("label_smoothing", 0.0)) * o["hard_weight"]
    if o.get("standardize"):
        s, t = ((x - x.mean()) / (1e-7 + x.std()) for x in (s, t))
    log_q, log_p = F.log_softmax(s / ts, 0), F.log_softmax(t / tt, 0)
    q, p = log_q.exp(), log_p.exp()
    kind, beta, skew = o.get("divergence", "forward_kl"), o.get("beta", 0.5), o.get("skew", 0.0)
    if o.get("decoupled") and labeled:
        rest = [c for c in range(len(names)) if c != at]
        two = [torch.stack([x[at], x[rest].sum()]) for x in (p, q)]
        others = [F.log_softmax(x[rest] / temperature, 0) for x, temperature in ((t, tt), (s, ts))]
        soft = o["decoupled"][0] * (two[0] * (two[0] / two[1]).log()).sum()
        soft = soft + o["decoupled"][1] * (others[0].exp() * (others[0] - others[1])).sum()
    elif o.get("correct_teacher") and labeled:
        lead, top = o["correct_teacher"], int(p.argmax())
        if top != at:
            m = (p[top] - p[at] + lead) / (1 + p[top] - p[at])
        else:
            m = ((p[at] + lead).clamp_max(1.0) - p[top]) / (1 - p[top])
        mixed = (1 - m) * p + m * F.one_hot(torch.tensor(at), len(names))
        soft = (mixed * torch.where(mixed > 0, mixed, 1.0).log() - mixed * log_q).sum()
    elif skew:
        a, b = (p, q) if kind == "forward_kl" else (q, p)
        soft = (a * (a.log() - (skew * a + (1 - skew) * b).log())).sum()
    else:
        m = beta * p + (1 - beta) * q
        forward, back = (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()
        soft = {
            "forward_kl": forward, "reverse_kl": back, "symmetric": forward + back, "tvd": (p - q).abs().sum() / 2,
            "jsd": beta * (p * (log_p - m.log())).sum() + (1 - beta) * (q * (log_q - m.log())).sum(),
            "mse": (s / ts - t / tt).square().sum(),
        }[kind]  # fmt: skip
    factor = 1.0 if kind == "mse" else ts * ts
    return o.get("soft_weight", 1.0) * factor * soft + hard


def truth(s: Tensor, t: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean of the rows, and its gradients, in float64."""
    s, t = (x.detach().double().requires_grad_() for x in (s, t))
    losses = []
    for i, y in enumerate(TARGET.tolist()):
        ts, tt = (o.get(name) for name in ("temperature", "teacher_temperature"))
        ts = 1.0 if ts is None else ts
        tt = ts if tt is None else tt
        ts, tt = (float(x[i]) if isinstance(x, Tensor) else x for x in (ts, tt))
        if y != -100 and WEIGHT[i]:
            losses.append(WEIGHT[i].double() * row_loss(s[i], t[i], y, o, ts, tt))
    loss = torch.stack(losses).sum() / WEIGHT[TARGET != -100].double().sum()
    grads = torch.autograd.grad(loss, (s, t), allow_unused=True)
    return loss.detach(), *(torch.zeros_like(s) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def computed(s: Tensor, t: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    loss: Any = tgt.distillation_loss(s, t, TARGET, sample_weight=WEIGHT, **options)
    grads = torch.autograd.grad(loss, (s, t), torch.ones_like(loss))
    return (loss.detach(), *grads)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_official_formulas(backend: str, dtype: torch.dtype, name: str) -> None:
    s, t = pair(dtype)
    out, expected = computed(s, t, backend=backend, **CASES[name]), truth(s, t, CASES[name])
    bar = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    numerics.assert_close("loss", out[0], expected[0], bar=min(bar, 3e-5), floor=0.1)
    for what, grad, true in zip(("d_student", "d_teacher"), out[1:], expected[1:], strict=True):
        assert grad.dtype == dtype
        numerics.assert_close(what, grad, true, bar=bar, floor=1e-2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_masks_on_the_compiled_kernel(
    native: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    """There the kernel adjusts them in its pass, and the formula does not run."""
    s, t = (side.masked_fill(side == -INF, -1.5) for side in pair(dtype))
    s[4] = t[5] = math.nan  # rows that do not count
    expected = computed(s.double(), t.double(), backend="reference", **CASES[name])
    monkeypatch.setattr(composed, "forward", None)
    out = computed(s, t, backend=native, **CASES[name])
    bar = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    for what, made, true in zip(("loss", "d_student", "d_teacher"), out, expected, strict=True):
        numerics.assert_close(what, made, true, bar=bar if what != "loss" else min(bar, 3e-5), floor=1e-2)


def test_decoupled_by_hand() -> None:
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2): the label's part and the others' are known."""
    t, s = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    own = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    rest = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    y = torch.tensor([0])
    for a, b in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        assert tgt.distillation_loss(s, t, y, decoupled=(a, b)).item() == pytest.approx(a * own + b * rest, abs=1e-6)


def test_the_others_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.2, 0.8]])
    s, t, y = q.log(), p.log(), torch.tensor([1])
    loss = tgt.distillation_loss(s, t, skew=0.5).item()
    assert loss == pytest.approx(0.5 * math.log(0.5 / 0.35) + 0.5 * math.log(0.5 / 0.65), abs=1e-6)
    # Of two equals the first is the teacher's choice: another label then leads it by 0.2, and its own gets 0.2 more.
    for label, its in ((1, 0.6), (0, 0.7)):
        loss = tgt.distillation_loss(s, t, torch.tensor([label]), correct_teacher=0.2).item()
        expected = its * math.log(its / q[0, label]) + (1 - its) * math.log((1 - its) / q[0, 1 - label])
        assert loss == pytest.approx(expected, abs=1e-6)
    loss = tgt.distillation_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 5.0]]), standardize=True).item()
    assert loss == pytest.approx(0.0, abs=1e-6)  # both are (-1, 1) / sqrt(2)
    margin = torch.tensor([9.0, 0.5])
    loss = tgt.distillation_loss(torch.zeros(1, 2), t, y, soft_weight=0.0, hard_weight=1.0, label_margin=margin).item()
    assert loss == pytest.approx(math.log(1 + math.exp(0.5)), abs=1e-6)


def test_kl_is_the_label_part_and_the_others_by_their_probability(backend: str) -> None:
    s, t = pair()
    y = TARGET.clamp_min(0)
    y[4] = 1

    def rows(**options: Any) -> Tensor:
        made: Tensor = tgt.distillation_loss(s, t, y, temperature=2.0, reduction="none", backend=backend, **options)
        return made

    p = torch.softmax(t / 2, -1).gather(-1, y[:, None]).squeeze(-1)
    torch.testing.assert_close(
        rows(), rows(decoupled=(1.0, 0.0)) + (1 - p) * rows(decoupled=(0.0, 1.0)), rtol=1e-5, atol=1e-6
    )


def test_what_the_papers_state() -> None:
    s, t = pair(torch.float64)
    y = TARGET

    def loss(s: Tensor = s, t: Tensor = t, **options: Any) -> Tensor:
        made: Tensor = tgt.distillation_loss(s, t, y, reduction="none", **options)
        return made

    # Logit standardisation: neither side's shift nor its scale counts.
    torch.testing.assert_close(loss(standardize=True), loss(s * 3 + 1, t * 0.2 - 7, standardize=True))
    # Balanced softmax: CE(z + log n), whatever n adds up to.
    counts = torch.arange(1.0, CLASSES + 1, dtype=torch.float64)
    hard = {"soft_weight": 0.0, "hard_weight": 1.0}
    known = y >= 0
    balanced = F.cross_entropy(s + counts.log(), y.clamp_min(0), reduction="none")
    for bias in (counts.log(), (counts / counts.sum()).log()):
        torch.testing.assert_close(loss(student_bias=bias, **hard)[known], balanced[known])
    # Skewed: never above log(1 / l), and finite where one side has nothing.
    far = torch.where(torch.arange(CLASSES) % 2 == 0, 100.0, -100.0).double().expand(ROWS, -1)
    for kind in ("forward_kl", "reverse_kl"):
        assert (loss(far, -far, skew=0.1, divergence=kind) <= math.log(10) + 1e-9).all()
    assert loss(torch.where(far > 0, far, -INF), far, skew=0.1).isfinite().all()
    # Corrected: a student that says it has no loss.
    p = t.softmax(-1)
    for i in (0, 6):
        top, label = int(p[i].argmax()), int(y[i])
        m = (p[i, top] - p[i, label] + 0.2) / (1 + p[i, top] - p[i, label])
        q = (1 - m) * p[i] + m * F.one_hot(y[i], CLASSES)
        assert q[label] - q.index_select(0, torch.tensor([top]))[0] == pytest.approx(0.2)
        same = s.clone()
        same[i] = q.log()
        assert loss(same, correct_teacher=0.2)[i].item() == pytest.approx(0.0, abs=1e-12)


def test_classes_that_are_not_there(backend: str) -> None:
    """The label alone, the label missing, everything but the label missing on one side: no NaN anywhere."""
    s, t = torch.zeros(5, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(5, 1)
    s[0, 1:] = t[0, 1:] = -INF  # the label alone
    s[1, 0] = t[1, 0] = -INF  # a label that neither side has
    s[2, 1:] = -INF  # the student has the label alone
    t[3, 1:] = -INF  # the teacher
    s[4, 0] = -INF  # the label is the teacher's alone
    y = torch.zeros(5, dtype=torch.int64)

    def rows(**options: Any) -> list[float]:
        a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
        made: Tensor = tgt.distillation_loss(a, b, y, reduction="none", backend=backend, **options)
        made[made.isfinite()].sum().backward()
        for grad, logits in ((a.grad, s), (b.grad, t)):
            assert grad is not None
            assert grad.isfinite().all()
            assert not grad[logits == -INF].any()
        return made.detach().tolist()  # type: ignore[no-any-return]

    p = torch.softmax(torch.tensor([2.0, 3.0, 4.0]), 0)
    others = float((p * (p * 3).log()).sum())
    own, rest = rows(decoupled=(1.0, 0.0)), rows(decoupled=(0.0, 1.0))
    assert own[:3] == [0.0, 0.0, INF]
    assert own[3] == pytest.approx(math.log(4))
    assert own[4] == INF
    assert [rest[0], rest[2], rest[3]] == [0.0, INF, 0.0]
    assert rest[1] == pytest.approx(others, abs=1e-6)
    assert rest[4] == pytest.approx(others, abs=1e-6)
    corrected = rows(correct_teacher=0.2)
    assert corrected[0] == 0.0
    assert corrected[1] == corrected[2] == corrected[4] == INF
    standardized = rows(standardize=True)
    assert standardized[0] == 0.0
    assert all(math.isfinite(value) for value in rows(skew=0.2))


def test_temperatures_of_rows(backend: str) -> None:
    s, t = pair()
    together, d_s, d_t = computed(s, t, temperature=T_ROWS, reduction="none", backend=backend)
    for i in range(ROWS):
        a, b = s[i : i + 1].clone().requires_grad_(), t[i : i + 1].clone().requires_grad_()
        alone = tgt.distillation_loss(
            a, b, TARGET[i : i + 1], temperature=float(T_ROWS[i]), sample_weight=WEIGHT[i : i + 1], reduction="sum"
        )
        grads = torch.autograd.grad(alone, (a, b))
        torch.testing.assert_close(together[i], alone.detach(), rtol=1e-5, atol=1e-6)
        for mine, theirs in zip((d_s[i], d_t[i]), grads, strict=True):
            torch.testing.assert_close(mine, theirs[0], rtol=1e-4, atol=1e-6)
    (_, stats) = tgt.distillation_loss(s, t, temperature=T_ROWS, return_stats=True, backend=backend)
    torch.testing.assert_close(stats.student_lse, (s / T_ROWS[:, None]).logsumexp(-1), rtol=1e-5, atol=1e-5)


ALL = {**HARD, "student_bias": BIAS, "label_margin": MARGIN, "standardize": True, "decoupled": (1.0, 2.0)}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_autograd(reduction: str) -> None:
    """Backward twice, in place, gradients per row, fp16 under a loss scale, half of the gradients."""
    s, t = pair()
    s.requires_grad_()
    loss: Any = tgt.distillation_loss(s, t, TARGET, reduction=reduction, **ALL)
    up = torch.linspace(0.5, 2.0, ROWS) if reduction == "none" else torch.tensor(1.7)
    first, second = (torch.autograd.grad(loss, s, up, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    made = s.detach().clone().requires_grad_() * 1.0
    made.retain_grad()
    loss = tgt.distillation_loss(made, t, TARGET, reduction=reduction, inplace=True, **ALL)
    loss.backward(up)
    torch.testing.assert_close(made.grad, first)
    tiny = s.detach().half().requires_grad_()
    scaled = tgt.distillation_loss(tiny, t.half(), TARGET, normalizer=2.0**24, **ALL) * 2.0**24
    (grad,) = torch.autograd.grad(scaled, tiny)
    assert (grad != 0).sum() > ROWS * CLASSES // 2


def test_second_derivatives_of_the_reference() -> None:
    s, t = (toys.normal(3, 5, seed=seed).double().requires_grad_() for seed in (3, 4))
    y = torch.tensor([1, 4, -1])
    ts = torch.tensor([1.0, 2.0, 0.5])
    for options in (
        {"decoupled": (1.0, 3.0), "standardize": True, "temperature": ts},
        {"correct_teacher": 0.2, "student_bias": BIAS[:5].double()},
        {"skew": 0.2, "hard_weight": 1.0, "label_margin": MARGIN[:5].double()},
    ):

        def loss(s: Tensor, t: Tensor, options: dict[str, Any] = options) -> Any:
            return tgt.distillation_loss(s, t, y, backend="reference", **options)

        assert torch.autograd.gradcheck(loss, (s, t), fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, (s, t), fast_mode=True)


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("form", [{"decoupled": (1.0, 2.0)}, {"skew": 0.2}, {"correct_teacher": 0.3}], ids=str)
def test_compiled_and_under_autocast(native: str, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]) -> None:
    """The kernel runs there, too: the formula is not asked, and float64 is not seen."""
    s, t = pair()
    s.requires_grad_()
    t.requires_grad_()
    options = {
        **form, "student_bias": BIAS, "label_margin": MARGIN, "temperature": T_ROWS, "standardize": True,
        "hard_weight": 0.5, "backend": native,
    }  # fmt: skip
    eager = tgt.distillation_loss(s, t, TARGET, **options)
    expected = torch.autograd.grad(eager, (s, t))
    monkeypatch.setattr(reference_distill, "distillation_loss", None)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(s: Tensor, t: Tensor) -> Tensor:
        return tgt.distillation_loss(s, t, TARGET, **options)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(s, t)
        again = tgt.distillation_loss(s, t, TARGET, **options)
    made = torch.autograd.grad(loss, (s, t))
    for found, its in zip((loss, again, *made), (eager, eager, *expected), strict=True):
        assert torch.equal(found, its)


@pytest.mark.once("torch.compile")
def test_late_numbers_keep_the_labels() -> None:
    """A weight of 0 of the hard term, which a compiled program learns when it runs, leaves the labels to the others."""
    s, t = pair()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(s: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return tgt.distillation_loss(s, t, TARGET, hard_weight=weight, decoupled=(1.0, 3.0))

    for weight in (0.0, 0.7):
        plain = tgt.distillation_loss(s, t, TARGET, hard_weight=weight, decoupled=(1.0, 3.0))
        torch.testing.assert_close(step(s, t, torch.tensor(weight)), plain)


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"decoupled": (1.0, 8.0), "divergence": "jsd"}, r"decoupled=\(1.0, 8.0\) replaces .*'jsd'", ArgumentError),
        ({"decoupled": 8.0}, "decoupled must be two weights.*8.0", ArgumentError),
        ({"decoupled": (1.0, -1.0)}, r"decoupled\[1\].*-1", ArgumentError),
        ({"decoupled": (1.0, 8.0), "target": None}, "decoupled.*target is missing", ArgumentError),
        ({"decoupled": (1.0, 8.0), "skew": 0.1}, "decoupled.* and skew=0.1 each replace", ArgumentError),
        ({"skew": 0.1, "divergence": "tvd"}, "skew mixes.*'tvd'", ArgumentError),
        ({"skew": 1.0}, "skew.*1", ArgumentError),
        ({"correct_teacher": 0.0}, "correct_teacher.*0", ArgumentError),
        ({"correct_teacher": 0.2, "divergence": "reverse_kl"}, "correct_teacher=0.2.*'reverse_kl'", ArgumentError),
        ({"standardize": 2}, "standardize must be True or False", ArgumentError),
        ({"student_bias": BIAS[:-1]}, r"student_bias.*\(33,\), got \(32,\)", ShapeError),
        ({"student_bias": BIAS.long()}, "student_bias must be float64", DTypeError),
        ({"teacher_bias": BIAS.clone().requires_grad_()}, "teacher_bias requires grad", ArgumentError),
        ({"teacher_bias": torch.full((CLASSES,), -INF)}, "teacher_bias must be finite, got -inf", ArgumentError),
        ({"label_margin": MARGIN[None]}, r"label_margin.*\(1, 33\)", ShapeError),
        ({"temperature": T_ROWS[:-1]}, r"temperature must be a number, or one a row, \(7,\)", ShapeError),
        ({"temperature": T_ROWS - 1}, "temperature must be in", ArgumentError),
        ({"teacher_temperature": T_ROWS.clone().requires_grad_()}, "teacher_temperature requires grad", ArgumentError),
        ({"decoupled": (1.0, 1.0), "target": torch.ones(ROWS, CLASSES)}, "decoupled goes by the label", ArgumentError),
    ],
)
def test_refused(options: dict[str, Any], message: str, error: type[Exception]) -> None:
    s, t = pair()
    with pytest.raises(error, match=message):
        tgt.distillation_loss(s, t, **{"target": TARGET, **options})


def test_labels_are_looked_at() -> None:
    s, t = pair()
    with pytest.raises(ArgumentError, match="33"):
        tgt.distillation_loss(s, t, torch.full((ROWS,), CLASSES), decoupled=(1.0, 1.0))


def test_refused_beside_records_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = pair()
    record = tgt.topk_teacher(t, 4)
    with pytest.raises(ArgumentError, match="standardize, temperature a row cannot be used with a top-k record"):
        tgt.distillation_loss(s, record, TARGET, standardize=True, temperature=T_ROWS)
    monkeypatch.setattr(distill_op, "shards_of", lambda *_: object())
    with pytest.raises(ArgumentError, match="skew cannot be used with classes in several processes"):
        tgt.distillation_loss(s, t, TARGET, skew=0.1, vocab_group="world")
    monkeypatch.setattr(distill_op, "is_dtensor", lambda _: True)
    s, t = (x.as_subclass(_Odd) for x in (s, t))
    with pytest.raises(ArgumentError, match="label_margin cannot be used with DTensors"):
        tgt.distillation_loss(s, t, TARGET, label_margin=MARGIN)


class _Odd(Tensor):
    pass
