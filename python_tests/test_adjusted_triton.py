"""Adjusted rows in Triton's kernel, tile by tile, beside the formula: every form, odd rows, in place, from a state."""

from __future__ import annotations

import math
from typing import Any

import numerics
import pytest
import torch
import toys
from torch import Tensor
from waiting import NothingWaits

import tgt_fast as tgt
from tgt_fast.kernels import composed
from tgt_fast.kernels import triton as backend_module
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import Direct, DistillCall, Outputs
from tgt_fast.kernels.options import ROW_COEFFICIENT, DistillOptions
from tgt_fast.kernels.triton import adjusted, distill, distill_calls
from tgt_fast.kernels.triton.tuning import Plan

INF = math.inf
CLASSES = 75
TARGET = torch.tensor([40, 0, 74, 2, -100, 1, -1, 4, 31, 0, 70, 33, 5])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.0, 0.0, 3.0, 1.0, 1.5, 0.75, 1.0, 2.0, 1.0])
ROWS = len(TARGET)
BIAS, OTHER_BIAS, MARGIN = (toys.normal(CLASSES, seed=seed) for seed in (5, 6, 7))
T_ROWS, TT_ROWS = torch.linspace(0.7, 4.0, ROWS), torch.linspace(3.0, 0.8, ROWS)
# Ways to cut such rows; the interpreter would take all of them as one tile.
CUTS = {"tiles of rows": Plan("stream", 8, 32, 1), "whole rows": Plan("stream", 16, 128, 1)}
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"divergence": name} for name in ("forward_kl", "reverse_kl", "symmetric", "tvd", "cross_entropy", "mse")},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "both parts": {"decoupled": (1.0, 4.0)},
    "the label's": {"decoupled": (1.5, 0.0)},
    "the others'": {"decoupled": (0.0, 2.0)},
    "a share of the others'": {"decoupled": (1.0, 1e-9)},
    "no part": {"decoupled": (0.0, 0.0)},
    "corrected": {"correct_teacher": 0.2},
    "skewed": {"skew": 0.05},
    "skewed back": {"skew": 0.4, "divergence": "reverse_kl"},
    "hard": {"soft_weight": 0.0, "hard_weight": 1.0, "student_bias": BIAS},
}
TERMS: dict[str, dict[str, Any]] = {
    "soft": {},
    "both": {"soft_weight": 0.4, "hard_weight": 0.7},
    "large margin": {"hard_weight": 0.6, "label_margin": MARGIN.abs() + 15},
    "negative margin, smoothed": {"hard_weight": 0.6, "label_margin": -20 * MARGIN.abs(), "label_smoothing": 0.2},
    "all smoothed": {"hard_weight": 0.6, "label_smoothing": 1.0},
}


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two sides with a row of every kind."""
    s, t = (toys.normal(ROWS, CLASSES, seed=seed) * 3 for seed in (0, 1))
    s[0, 5], t[0, 5] = 30.0, 25.0  # both are sure of another than the label
    for side in (s, t):
        side[1, 8:] = -INF  # whole tiles
        side[8, :64] = -INF
        side[12] += 300.0  # far from 0
    s[2, 9] = -INF  # which the teacher has
    s[3, 1] = math.nan
    s[4], t[5, 3] = math.nan, INF  # of rows that do not count
    s[6, 50] = t[6, 50] = 20.0
    s[7, 4] = t[7, 4] = -INF  # a label that is not there
    t[9, 1:] = -INF  # the teacher has the label alone
    t[10, 70], s[10, 70] = 40.0, 30.0  # both are sure of it
    t[11, 7] = -INF  # which the student has
    return s.to(dtype), t.to(dtype)


def computed(s: Tensor, t: Tensor, target: Tensor | None, up: Tensor, **options: Any) -> tuple[Tensor, ...]:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    loss: Any = tgt.distillation_loss(s, t, target, sample_weight=WEIGHT[: len(s)], **options)
    return (loss.detach(), *torch.autograd.grad(loss, (s, t), up.to(loss.dtype).expand_as(loss)))


@pytest.fixture
def fused(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend, whose own kernel is to take whatever is asked for."""
    monkeypatch.setattr(composed, "forward", None)
    monkeypatch.setattr(composed, "backward", None)
    return interpreted


def cut(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(adjusted, "adjusted_plan", lambda *call: plan)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("temperature", [1.0, 3.0, "a row's"], ids=str)
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardized"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", CUTS)
def test_every_row(
    fused: str, monkeypatch: pytest.MonkeyPatch, form: str, terms: str, temperature: Any, standardize: bool,
    biased: bool, dtype: torch.dtype, way: str,
) -> None:  # fmt: skip
    options: dict[str, Any] = {**TERMS[terms], "standardize": standardize, "reduction": "none", **FORMS[form]}
    if biased:
        options |= {"student_bias": BIAS, "teacher_bias": OTHER_BIAS}
    options |= {"temperature": T_ROWS, "teacher_temperature": TT_ROWS} if temperature == "a row's" else {
        "temperature": temperature, "teacher_temperature": 0.8 * temperature,
    }  # fmt: skip
    cut(monkeypatch, CUTS[way])
    s, t = pair(dtype)
    up = 2.0 ** (torch.arange(ROWS, dtype=torch.float64) % 3 - 1)  # scales a rounded gradient without rounding
    up[2], up[6] = -0.5, -2.0
    expected = computed(s.double(), t.double(), TARGET, up, backend="reference", **options)
    found = computed(s, t, TARGET, up, backend=fused, **options)
    largest = 4.0 if temperature == "a row's" else float(temperature)
    for name, mine, true in zip(("loss", "d_student", "d_teacher"), found, expected, strict=True):
        for row in range(ROWS):
            bar = numerics.arithmetic_bar(found[0].dtype, 30.0)
            floor = 1e-2 * largest**2
            if name != "loss" and dtype.itemsize == 2:
                rounded = numerics.relative_error(true[row].to(dtype), true[row], floor)
                bar = max(bar, numerics.HALF_FACTOR * rounded) if rounded == rounded else bar
            numerics.assert_close(f"{name}[{row}]", mine[row], true[row], bar=bar, floor=floor)


@pytest.mark.parametrize("form", ["forward_kl", "jsd", "both parts", "corrected", "skewed", "hard"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardized"])
@pytest.mark.parametrize("way", CUTS)
def test_over_the_logits_and_again_from_the_state(
    fused: str, monkeypatch: pytest.MonkeyPatch, form: str, standardize: bool, way: str
) -> None:
    """The same bits as beside them; a factor that scales without rounding scales gradients, and its sign is theirs."""
    cut(monkeypatch, CUTS[way])
    given = dict(FORMS[form])
    adjust = Adjustments(
        standardize, given.get("decoupled"), given.get("skew", 0.0), given.get("correct_teacher"), BIAS,
        label_margin=MARGIN,
    )  # fmt: skip
    options = DistillOptions(
        given.get("divergence", "forward_kl"), hard_weight=0.5, soft_weight=given.get("soft_weight", 1.0)
    )
    s, t = pair(torch.float32)
    call = DistillCall(options, s, t, TARGET, WEIGHT, want_d_student=True, want_d_teacher=True, want_row_state=True,
                       adjust=adjust)  # fmt: skip
    kernel = Direct(distill)
    apart = kernel.forward(call)
    assert apart.d_student is not None
    assert apart.d_teacher is not None
    assert apart.row_state is not None
    over = s.clone()
    inside = kernel.forward(call._replace(student=over, inplace=True))
    assert inside.d_student is not None
    assert inside.d_student.data_ptr() == over.data_ptr()
    counts = (TARGET != -100) & (WEIGHT != 0)
    weights = torch.where(counts, WEIGHT.double(), 0.0) / WEIGHT[TARGET != -100].double().sum()
    torch.testing.assert_close(apart.row_state[:, ROW_COEFFICIENT], weights, rtol=1e-15, atol=0)
    factors = -(2.0 ** (torch.arange(ROWS) % 3))
    scaled = kernel.backward(call, apart.row_state, factors)
    once = kernel.backward(call, apart.row_state, torch.tensor(1.0))
    for k, grad in enumerate((apart.d_student, apart.d_teacher)):
        assert torch.equal(grad.nan_to_num(7.0), (inside.d_student, inside.d_teacher)[k].nan_to_num(7.0))  # type: ignore[union-attr]
        assert torch.equal(grad.nan_to_num(7.0), once[k].nan_to_num(7.0))  # type: ignore[union-attr]
        torch.testing.assert_close(scaled[k], grad * factors[:, None], rtol=1e-6, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"reduction": "mean"}, {"normalizer": torch.tensor(5.0)},
                                     {"normalizer": 7.0}, {"normalizer": 0.0}], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", ["both parts", "skewed"])
def test_reductions(fused: str, form: str, options: dict[str, Any]) -> None:
    """Of rows that are not finite only where they do not count; labels and weights out of range drop their rows."""
    s, t = (side[[0, 1, 4, 5, 6, 9, 10]].contiguous() for side in pair(torch.float32))
    target, weight = TARGET[[0, 1, 4, 5, 6, 9, 10]], WEIGHT[[0, 1, 4, 5, 6, 9, 10]]
    given: dict[str, Any] = {**FORMS[form], "hard_weight": 0.5, "label_margin": MARGIN, **options}

    def made(backend: str, *sides: Tensor, **kept: Any) -> Tensor:
        loss: Tensor = tgt.distillation_loss(*sides, **kept, **given, backend=backend)
        return loss.detach()

    true = made("reference", s.double(), t.double(), target=target, sample_weight=weight)
    found = made(fused, s, t, target=target, sample_weight=weight)
    numerics.assert_close("loss", found, true, bar=3e-5, floor=1e-2)
    adjust = Adjustments(decoupled=given.get("decoupled"), skew=given.get("skew", 0.0), label_margin=MARGIN)
    call = DistillCall(
        DistillOptions(hard_weight=0.5, reduction=given.get("reduction", "mean")), s, t, target, weight,
        given.get("normalizer"), True, True, adjust=adjust,
    )  # fmt: skip
    wrong = call._replace(
        target=torch.where(target == -100, 2**40, target), sample_weight=torch.where(weight == 0, -1.0, weight)
    )
    for mine, its in zip(Direct(distill).forward(wrong), Direct(distill).forward(call), strict=True):
        if mine is not None and its is not None:
            assert torch.equal(mine, its)
    assert not Direct(distill).forward(call._replace(student=s[:0], teacher=t[:0], target=target[:0],
                                                     sample_weight=weight[:0])).loss.any()  # fmt: skip


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("soft_weight", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", CUTS)
def test_statistics(
    fused: str, monkeypatch: pytest.MonkeyPatch, standardize: bool, soft_weight: float, dtype: torch.dtype, way: str
) -> None:
    """Of what the soft term sees, before the label is apart and the teacher corrected."""
    cut(monkeypatch, CUTS[way])
    s, t = pair(dtype)
    s[6], t[6] = s[6].roll(3), t[6].roll(3)
    s[10, 40] = s[10, 70]  # of two first classes the first is meant
    options: dict[str, Any] = {
        "standardize": standardize, "soft_weight": soft_weight, "decoupled": (1.0, 2.0), "hard_weight": 1.0,
        "temperature": T_ROWS, "teacher_temperature": TT_ROWS, "student_bias": BIAS, "teacher_bias": OTHER_BIAS,
    }  # fmt: skip
    found, true = (
        tgt.distillation_loss(
            a, b, TARGET, sample_weight=WEIGHT, reduction="none", return_stats=True, backend=backend, **options
        )[1]
        for a, b, backend in ((s, t, fused), (s.double(), t.double(), "reference"))
    )
    bar = 1e-9 if dtype == torch.float64 else 2e-5
    for name, mine, its in zip(found._fields, found, true, strict=True):
        torch.testing.assert_close(mine.double(), its.double(), rtol=bar, atol=bar, equal_nan=True, msg=name)


def test_moments_of_rows_far_from_0(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """About what a lane meets first: neither an offset of a million, nor masks before it, takes a digit."""
    cut(monkeypatch, Plan("stream", 1, 32, 1))
    s, t = (toys.normal(4, CLASSES, seed=seed) for seed in (0, 1))
    s[0] += 2.0**20
    s[1, :64] = t[1, :64] = -INF
    s[1] -= 2.0**20
    s[2, 70] = 3e38  # its square is beyond the range of float32
    t[3] = 0.1  # deviates by nothing
    options: dict[str, Any] = {"standardize": True, "reduction": "none"}
    up = torch.ones(4)
    found = computed(s, t, None, up, backend=fused, **options)
    true = computed(s.double(), t.double(), None, up, backend="reference", **options)
    for name, mine, its in zip(("loss", "d_student"), found, true, strict=False):
        for row in range(4):
            numerics.assert_close(f"{name}[{row}]", mine[row], its[row], bar=3e-5, floor=1e-2)


@pytest.mark.parametrize("form", ["forward_kl", "both parts", "the label's", "corrected", "skewed", "skewed back"])
@pytest.mark.parametrize("sure", ["label", "another"])
def test_the_gradient_of_a_class_that_has_most_of_its_row(
    fused: str, monkeypatch: pytest.MonkeyPatch, form: str, sure: str
) -> None:
    """It is right to its own size, which is that of what is left of 1."""
    cut(monkeypatch, CUTS["tiles of rows"])
    s, t = (toys.normal(4, CLASSES, seed=seed) for seed in (0, 1))
    y = torch.tensor([40, 3, 70, 5])
    at = y if sure == "label" else y - 2
    rows = torch.arange(4)
    s[rows, at], t[rows, at] = 17.0, 16.0
    options: dict[str, Any] = {
        **FORMS[form], "reduction": "none", "student_bias": BIAS, "teacher_bias": OTHER_BIAS, "hard_weight": 1e-6,
    }  # fmt: skip
    up = torch.ones(4)
    found = computed(s, t, y, up, backend=fused, **options)
    true = computed(s.double(), t.double(), y, up, backend="reference", **options)
    for mine, its in zip(found[1:], true[1:], strict=True):
        torch.testing.assert_close(mine[rows, at].double(), its[rows, at], rtol=2e-4, atol=0)


@pytest.mark.parametrize("form", ["forward_kl", "both parts", "the label's", "skewed", "skewed back"])
def test_differences_beyond_the_range(fused: str, form: str) -> None:
    s, t = torch.zeros(4, 40), toys.normal(4, 40, seed=1)
    s[0, 3], s[1, 3], t[1, 3], t[2, 5] = 3e37, -3e38, -2e38, 1e38
    options: dict[str, Any] = {
        **FORMS[form], "student_bias": BIAS[:40], "label_margin": MARGIN[:40], "hard_weight": 1.0, "reduction": "none",
    }  # fmt: skip
    y = torch.tensor([8, 8, 8, 8] if "decoupled" in options else [3, 3, 3, 5])
    up = torch.ones(4)
    found = computed(s, t, y, up, backend=fused, **options)
    true = computed(s.double(), t.double(), y, up, backend="reference", **options)
    for name, mine, its in zip(("loss", "d_student", "d_teacher"), found, true, strict=True):
        for row in range(4):
            numerics.assert_close(f"{name}[{row}]", mine[row], its[row], bar=2e-5, floor=1.0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("skew", [1e-3, 0.5])
def test_a_skewed_divergence_of_near_sides(fused: str, divergence: str, skew: float) -> None:
    """Its value is of second order in their difference; that of rounding the normalisers is not in it."""
    t = toys.normal(4, 3000, seed=1).double() * 3
    s = (t + 1e-3 * toys.normal(4, 3000, seed=2).double()).float()
    options: dict[str, Any] = {"divergence": divergence, "skew": skew, "reduction": "none"}
    out: Any = tgt.distillation_loss(s, t.float(), backend=fused, **options)
    true: Any = tgt.distillation_loss(s.double(), t.float().double(), backend="reference", **options)
    numerics.assert_close("loss", out, true, bar=1e-5, floor=2e-2)
    same: Any = tgt.distillation_loss(t.float(), t.float(), backend=fused, **options)
    assert same.abs().max() < 1e-7


def test_what_the_kernel_does_not_take(interpreted: str) -> None:
    """Shares of the classes and a skew next to nothing go the way of a kernel that takes no adjustments."""
    s, t = (toys.normal(3, 7, seed=seed) for seed in (0, 1))
    call = DistillCall(DistillOptions(), s, t, adjust=Adjustments(skew=0.1))
    assert distill.takes_adjustments(call)
    assert not distill.takes_adjustments(call._replace(adjust=Adjustments(skew=1e-25)))
    assert not distill.takes_adjustments(call._replace(target=torch.ones(3, 7)))
    shares = t.softmax(-1)
    for options in ({"skew": 1e-25}, {"standardize": True, "hard_weight": 1.0, "target": shares}):
        out, true = (
            tgt.distillation_loss(s, t, backend=backend, **options) for backend in (interpreted, "reference")
        )  # fmt: skip
        torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-6)


def test_the_host_waits_for_no_device(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)

    for module in (adjusted, distill_calls):
        monkeypatch.setattr(module, "launch", launch)
    s, t = pair(torch.float32)
    adjust = Adjustments(True, (1.0, 2.0), 0.0, None, BIAS, OTHER_BIAS, MARGIN, T_ROWS, TT_ROWS)
    wanted: dict[str, Any] = dict.fromkeys(("want_d_student", "want_d_teacher", "want_row_state", "want_stats"), True)
    call = DistillCall(DistillOptions(hard_weight=1.0), s, t, TARGET, WEIGHT, adjust=adjust, **wanted)
    with NothingWaits():
        out: Outputs = Direct(distill).forward(call)
        assert out.row_state is not None
        Direct(distill).backward(call, out.row_state, torch.tensor(-1.0))
    assert launched == [
        "distill_count_kernel", "distill_adjusted_stats_kernel", "distill_adjusted_kernel", "distill_reduce_kernel",
        "distill_adjusted_kernel",
    ]  # fmt: skip
    assert backend_module.kernels().interpreted
