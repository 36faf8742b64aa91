"""Adjusted rows in the compiled kernel's pass on a CPU, beside the formula: long rows, labels that stand out, masks."""

from __future__ import annotations

import math
from typing import Any

import numerics
import pytest
import torch
import toys
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels import composed

INF = math.inf
CLASSES = 2100  # two blocks of the kernel's, and a vector's tail
TARGET = torch.tensor([2047, 2048, 2099, 5, 7, 0, -1, -100, 1900])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.5, 1.0, 1.0, 1.0, 3.0])
ROWS = len(TARGET)
BIAS, OTHER_BIAS, MARGIN = (toys.normal(CLASSES, seed=seed) for seed in (5, 6, 7))
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "mse": {"divergence": "mse"},
    "decoupled": {"decoupled": (1.0, 4.0)},
    "the others' part": {"decoupled": (0.0, 2.0)},
    "the label's part": {"decoupled": (1.5, 0.0)},
    "corrected": {"correct_teacher": 0.2},
    "skewed": {"skew": 0.05},
    "skewed back": {"skew": 0.4, "divergence": "reverse_kl"},
    "hard": {"soft_weight": 0.0},
}
LABELS: dict[str, dict[str, Any]] = {
    "no hard term": {},
    "hard": {"hard_weight": 0.6},
    "margin": {"hard_weight": 0.6, "label_margin": MARGIN},
    "large margin": {"hard_weight": 0.6, "label_margin": MARGIN.abs() + 15},
    "negative margin, smoothed": {"hard_weight": 0.6, "label_margin": -20 * MARGIN.abs(), "label_smoothing": 0.2},
}


def sides(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    s, t = (toys.normal(ROWS, CLASSES, seed=seed) * 2 for seed in (0, 1))
    s[1, 2048] = 18.0  # sure of the label: with a large margin the others are what is left
    t[1, 2048] = t[2, 2099] = 25.0
    s[2, 100] = 20.0  # of another
    s[3, 1000:1500] = t[3, 1000:1500] = -INF
    s[4, 1900:] = t[4, 1900:] = -INF
    s[5] = s[5] + 300.0  # far from 0
    s[7] = math.nan  # dropped
    return s.to(dtype), t.to(dtype)


def made(backend: str, s: Tensor, t: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, ...]:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    loss, stats = tgt.distillation_loss(
        s, t, TARGET, sample_weight=WEIGHT, reduction="none", return_stats=True, backend=backend, **options
    )
    d_s, d_t = torch.autograd.grad(loss, (s, t), upstream.to(loss.dtype))
    return loss.detach(), d_s, d_t, *(value.double() for value in stats)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0, "a row's"], ids=str)
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardized"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rows_beside_the_formula(
    native: str, monkeypatch: pytest.MonkeyPatch, form: str, label: str, temperature: Any, standardize: bool,
    biased: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    options = {**FORMS[form], **LABELS[label], "standardize": standardize}
    if biased:
        options |= {"student_bias": BIAS, "teacher_bias": OTHER_BIAS}
    options["temperature"] = torch.linspace(0.8, 4.0, ROWS) if temperature == "a row's" else temperature
    if options.get("soft_weight") == 0 and "hard_weight" not in options:
        options["hard_weight"] = 1.0
    s, t = sides(dtype)
    upstream = 2.0 ** (torch.arange(ROWS) % 3 - 1)  # scales a rounded gradient without rounding
    expected = made("reference", s.double(), t.double(), upstream, **options)
    monkeypatch.setattr(composed, "forward", None)
    monkeypatch.setattr(composed, "backward", None)
    out = made(native, s, t, upstream, **options)
    bar = numerics.arithmetic_bar(out[0].dtype, 0.0 if standardize and not options.get("hard_weight") else 30.0)
    largest = 4.0 if temperature == "a row's" else float(temperature)
    for k, (found, true) in enumerate(zip(out, expected, strict=True)):
        floor = 1e-2 * largest**2 * math.sqrt(ROWS)
        this = bar
        if k in (1, 2) and dtype.itemsize == 2:
            this = max(bar, numerics.HALF_FACTOR * numerics.relative_error(true.to(dtype), true, floor))
        numerics.assert_close(("loss", "d_student", "d_teacher", *out_names())[k], found, true, bar=this, floor=floor)


def out_names() -> tuple[str, ...]:
    return ("student_entropy", "teacher_entropy", "kl", "agreement", "student_lse", "teacher_lse")


@pytest.mark.parametrize("form", ["plain", "decoupled", "skewed", "corrected"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardized"])
def test_in_place_and_from_strided_rows(native: str, form: str, standardize: bool) -> None:
    """The same bits as of dense rows beside their gradient."""
    s, t = sides(torch.float32)
    options = {**FORMS[form], **LABELS["large margin"], "standardize": standardize, "student_bias": BIAS}
    upstream = torch.ones(ROWS)
    expected = made(native, s, t, upstream, **options)
    wide = torch.full((ROWS, 2 * CLASSES), math.nan)
    wide[:, :CLASSES] = s
    strided = made(native, wide[:, :CLASSES], t, upstream, **options)
    assert all(torch.equal(a, b) for a, b in zip(strided[:3], expected[:3], strict=True))
    leaf, theirs = s.clone().requires_grad_(), t.clone().requires_grad_()
    logits = leaf * 1.0
    logits.retain_grad()
    loss: Any = tgt.distillation_loss(
        logits, theirs, TARGET, sample_weight=WEIGHT, reduction="sum", inplace=True, **options
    )
    loss.backward()
    assert theirs.grad is not None
    for found, wanted in ((logits.grad, expected[1]), (logits, expected[1]), (theirs.grad, expected[2])):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("form", ["plain", "decoupled", "the label's part", "skewed", "skewed back"])
def test_differences_beyond_the_range(native: str, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Such rows are taken in double, with the same adjustments."""
    s, t = torch.zeros(4, 40), toys.normal(4, 40, seed=1)
    s[0, 3], s[1, 3], t[1, 3], t[2, 5] = 3e37, -3e38, -2e38, 1e38
    options = {**FORMS[form], "student_bias": BIAS[:40], "label_margin": MARGIN[:40], "hard_weight": 1.0}
    y = torch.tensor(
        [3, 3, 3, 5] if form in ("plain", "skewed", "skewed back") else [8, 8, 8, 8]
    )  # the truth of the others needs digits, too

    def rows(backend: str, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
        loss: Any = tgt.distillation_loss(s, t, y, reduction="none", backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss, (s, t), torch.ones_like(loss))

    expected = rows("reference", s.double(), t.double())
    monkeypatch.setattr(composed, "forward", None)
    out = rows(native, s, t)
    for found, true in zip(out, expected, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form", [{"decoupled": (2.0, 0.0)}, {"decoupled": (1.0, 1.0)}, {"correct_teacher": 0.2}], ids=str
)
def test_a_loss_without_end_has_no_gradient(native: str, form: dict[str, Any]) -> None:
    s, t = torch.tensor([[-INF, 1.0, 2.0]], requires_grad=True), torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    loss: Any = tgt.distillation_loss(s, t, torch.tensor([0]), backend=native, **form)
    assert loss.item() == INF
    for grad in torch.autograd.grad(loss, (s, t)):
        assert not grad.any()


def test_a_skewed_divergence_of_near_sides(native: str) -> None:
    """Its value is of second order in their difference; that of rounding the normalisers is not in it."""
    t = toys.normal(4, 3000, seed=1).double() * 3
    s = t + 1e-3 * toys.normal(4, 3000, seed=2).double()
    for divergence in ("forward_kl", "reverse_kl"):
        for skew in (1e-3, 0.5):
            options: dict[str, Any] = {"divergence": divergence, "skew": skew, "reduction": "none"}
            out: Any = tgt.distillation_loss(s.float(), t.float(), backend=native, **options)
            true: Any = tgt.distillation_loss(s.float().double(), t.float().double(), backend="reference", **options)
            numerics.assert_close("loss", out, true, bar=1e-5, floor=2e-2)
            same: Any = tgt.distillation_loss(t.float(), t.float(), backend=native, **options)
            assert same.abs().max() < 1e-7
