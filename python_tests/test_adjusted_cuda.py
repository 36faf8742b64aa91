"""Adjusted losses in CUDA kernels of their own: long rows, in place, from saved states, and what drops a row there."""

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
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import Direct, DistillCall
from tgt_fast.kernels.native import distill
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.reference import distill as reference

of_kernels = pytest.mark.parametrize(
    "backend", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)

ROWS = 6
TEMPERATURE = 2.0
INF = math.inf
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"divergence": name} for name in ("forward_kl", "reverse_kl", "symmetric", "jsd", "tvd", "mse")},
    "cross_entropy": {"divergence": "cross_entropy"},
    "both parts": {"decoupled": (1.0, 2.0)},
    "the label's": {"decoupled": (1.5, 0.0)},
    "the others'": {"decoupled": (0.0, 1.5)},
    "corrected": {"correct_teacher": 0.2},
    "skewed": {"skew": 0.1},
    "skewed the other way": {"skew": 0.3, "divergence": "reverse_kl"},
}
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25, 3.0, 1.0])
T_ROWS, TT_ROWS = torch.linspace(0.7, 4.0, ROWS), torch.linspace(3.0, 0.8, ROWS)
# Two classes, part of a second vector, fewer vectors than threads, and as many as take every thread several times
SIZES = (2, 13, 709, 6001)
WAYS: dict[str, tuple[str, bool, bool]] = {  # whose gradients, in place, unaligned
    "both": ("both", False, False),
    "both, in place, unaligned": ("both", True, True),
    "the student's, in place": ("student", True, False),
    "the teacher's, unaligned": ("teacher", False, True),
}


@pytest.fixture(autouse=True)
def _by_the_kernel_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "forward", None)
    monkeypatch.setattr(composed, "backward", None)


def sides(classes: int, dtype: torch.dtype, unaligned: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of every kind: masked on both sides, on one, not a number, sure of a class, and equal ones."""
    # Unaligned rows begin between multiples of 16 bytes.
    s, t = ((toys.normal(ROWS, classes + 1, seed=seed) * 3).to(dtype)[:, int(unaligned) :] for seed in (0, 1))
    s, t = (x[:, :classes] for x in (s, t))
    if classes > 8:
        s[1, classes // 2 :] = t[1, classes // 2 :] = -INF
        s[2, 1], s[3, 4] = -INF, math.nan
        s[4, 8], t[4, 8] = 30.0, 40.0  # the first of its eight
        t[5] = s[5]
    return s, t


def targets(classes: int) -> Tensor:
    target = torch.tensor([classes - 1, 0, 3, 1, 8, -1])
    return target.clamp_max(classes - 1)


def options_of(form: str, classes: int, standardize: bool, beside: str = "nothing") -> dict[str, Any]:
    options: dict[str, Any] = {**FORMS[form], "standardize": standardize, "temperature": TEMPERATURE}
    if beside != "nothing":
        options["student_bias"] = toys.normal(classes, seed=5)
    if "biases" in beside:
        options["teacher_bias"] = toys.normal(classes + 1, seed=6)[1:]
    if "temperatures" in beside:
        options |= {"temperature": T_ROWS, "teacher_temperature": TT_ROWS}
    if "margin" in beside:
        options["label_margin"] = toys.normal(classes, seed=7)
    return options


def computed(
    s: Tensor, t: Tensor, up: Tensor, wanted: str = "both", inplace: bool = False, **options: Any
) -> dict[str, Tensor]:
    """The loss and the wanted gradients."""
    s, t = s.detach().requires_grad_("student" in wanted), t.detach().requires_grad_("teacher" in wanted)
    if wanted == "both":
        s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    given = s * 1 if inplace and s.requires_grad else s
    loss: Any = tgt.distillation_loss(given, t, inplace=inplace and s.requires_grad, **options)
    leaves = {name: x for name, x in (("d_student", s), ("d_teacher", t)) if x.requires_grad}
    return {
        "loss": loss.detach(),
        **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), up), strict=True)),
    }


def compare(mine: dict[str, Tensor], true: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Losses of logits up to 57 times a temperature; gradients of 16 bits are rounded twice, the second time scaled."""
    bars = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
    assert mine.keys() == true.keys()
    for name, expected in true.items():
        of_loss = name == "loss"
        bar = 5.7e-5 if of_loss and dtype != torch.float64 else bars[dtype]
        floor = 1e-2 * (TEMPERATURE**2 if of_loss else TEMPERATURE)
        for row in range(len(expected)):
            numerics.assert_close(f"{name}[{row}]", mine[name][row].double(), expected[row], bar=bar, floor=floor)


@of_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("beside", ["nothing", "biases and temperatures", "margin"])
@pytest.mark.parametrize("terms", [(0.5, 0.0, 0.0), (0.4, 0.7, 0.1), (0.0, 1.0, 0.0)])
def test_rows_of_any_length(
    backend: str, form: str, classes: int, dtype: torch.dtype, way: str, standardize: bool, beside: str,
    terms: tuple[float, float, float],
) -> None:  # fmt: skip
    wanted, inplace, unaligned = WAYS[way]
    options = options_of(form, classes, standardize, beside)
    names = ("soft_weight", "hard_weight", "label_smoothing")
    options |= {**dict(zip(names, terms, strict=True)), "reduction": "none", "sample_weight": WEIGHT}
    s, t = sides(classes, dtype, unaligned)
    up = torch.linspace(-0.5, 2.0, ROWS)
    target = targets(classes)
    mine = computed(
        s, t, up.double() if dtype == torch.float64 else up, wanted, inplace, target=target, backend=backend, **options
    )
    true = computed(s.double(), t.double(), up.double(), wanted, target=target, backend="reference", **options)
    true["loss"] = true["loss"].to(mine["loss"].dtype).double()
    compare(mine, true, dtype)


def direct(form: str, classes: int, dtype: torch.dtype, standardize: bool, **more: Any) -> DistillCall:
    """A call of the kernel itself."""
    given = FORMS[form]
    adjust = Adjustments(
        standardize, given.get("decoupled"), given.get("skew", 0.0), given.get("correct_teacher"),
        toys.normal(classes, seed=5), toys.normal(classes, seed=6), toys.normal(classes, seed=7), T_ROWS, TT_ROWS,
    )  # fmt: skip
    options = DistillOptions(given.get("divergence", "forward_kl"), hard_weight=0.5, reduction="none")
    s, t = sides(classes, dtype)
    target = targets(classes)
    wanted = dict.fromkeys(("want_d_student", "want_d_teacher", "want_row_state"), True)
    return DistillCall(options, s, t, target, WEIGHT, **wanted, **more, adjust=adjust)


@of_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("standardize", [False, True])
def test_the_gradients_again_from_the_rows_weights(
    backend: str, form: str, dtype: torch.dtype, standardize: bool
) -> None:
    """With an upstream gradient of any sign, applied before rounding; of 1 the same bits."""
    call = direct(form, 709, dtype, standardize)
    out = Direct(distill).forward(call)
    assert out.row_state is not None
    again = Direct(distill).backward(call, out.row_state, torch.ones(()))
    up = torch.linspace(-0.75, 2.0, ROWS)
    scaled = Direct(distill).backward(call, out.row_state, up)
    for name, first, second, third in zip(
        ("d_student", "d_teacher"), (out.d_student, out.d_teacher), again, scaled, strict=True
    ):
        assert first is not None
        assert second is not None
        assert third is not None
        torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True, msg=name)
        bar = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 6e-3}[dtype]
        numerics.assert_close(name, third.double(), first.double() * up[:, None].double(), bar=bar, floor=1e-2)


@of_kernels
@pytest.mark.parametrize("form", ["forward_kl", "jsd", "mse", "both parts", "corrected", "skewed"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("soft_weight", [1.0, 0.0])
@pytest.mark.parametrize("beside", ["nothing", "biases and temperatures"])
def test_statistics_are_of_what_the_soft_term_sees(
    backend: str, form: str, standardize: bool, soft_weight: float, beside: str
) -> None:
    """Before a label is hidden or a teacher corrected; a side that is no distribution is NaN by itself."""
    s, t = sides(709, torch.float32)
    t[0, 7] = s[3, 4] = INF
    options = options_of(form, 709, standardize, beside)
    options |= {"soft_weight": soft_weight, "hard_weight": 0.5, "return_stats": True, "sample_weight": WEIGHT}
    target = targets(709)
    target[2] = -100
    _, stats = tgt.distillation_loss(s, t, target, backend=backend, **options)
    _, expected = tgt.distillation_loss(s.double(), t.double(), target, backend="reference", **options)
    for name, mine, its in zip(stats._fields, stats, expected, strict=True):
        torch.testing.assert_close(mine.double(), its.double(), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


@of_kernels
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("given", [None, 3.5, 0.0])
def test_reductions_and_rows_that_do_not_count(backend: str, reduction: str, given: float | None) -> None:
    """A label or a weight that is out of range drops its row: on a device it is no error."""
    call = direct("both parts", 300, torch.float32, True)
    target, weight = torch.tensor([5, 300, 3, 2, 7, -100]), torch.tensor([1.0, 1.0, -2.0, 1.0, 0.5, 2.0])
    call.student[3, 4] = 0.0
    call.student[5] = math.nan
    assert call.adjust is not None
    divisor = None if given is None or reduction == "sum" else torch.tensor(given)
    call = call._replace(
        target=target, sample_weight=weight, divisor=divisor, options=call.options._replace(reduction=reduction)
    )
    out = Direct(distill).forward(call)
    kept = torch.tensor([0, 3, 4])
    assert isinstance(call.teacher, Tensor)
    adjust = call.adjust._replace(student_temperature=T_ROWS[kept], teacher_temperature=TT_ROWS[kept])
    true = Direct(reference).forward(
        call._replace(
            student=call.student[kept].double(), teacher=call.teacher[kept].double(), target=target[kept],
            sample_weight=weight[kept], adjust=adjust,
        )
    )  # fmt: skip
    numerics.assert_close("loss", out.loss.double(), true.loss, bar=3e-5, floor=0.1)
    for name, mine, its in zip(("d_student", "d_teacher"), out[2:4], true[2:4], strict=True):
        assert mine is not None
        assert its is not None
        numerics.assert_close(name, mine[kept].double(), its, bar=3e-5, floor=1e-2)
        assert not mine[torch.tensor([1, 2, 5])].any()
        assert its.any() == (given != 0.0 or reduction == "sum")


@of_kernels
def test_equal_sides_have_no_gradient(backend: str) -> None:
    """Nor a loss, in bits, where the two are compared in the same way."""
    s, _ = sides(2053, torch.float32)
    for form in ("forward_kl", "reverse_kl", "jsd", "tvd", "mse", "both parts", "skewed"):
        options = options_of(form, 2053, True)
        made = computed(
            s, s.clone(), torch.ones(ROWS), target=targets(2053), reduction="none", backend=backend, **options
        )
        for name, found in made.items():
            assert found[:2].abs().max() <= 1e-7, (form, name)


@of_kernels
def test_the_same_bits_again_and_no_waiting(backend: str) -> None:
    call = direct("both parts", 2053, torch.float32, True, want_stats=True)
    with NothingWaits():
        first = Direct(distill).forward(call)
    second = Direct(distill).forward(call)
    for name, one, other in zip(first._fields, first, second, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


@of_kernels
def test_no_rows(backend: str) -> None:
    s, t = torch.empty(0, 12).requires_grad_(), torch.empty(0, 12)
    loss: Any = tgt.distillation_loss(s, t, standardize=True, skew=0.1, backend=backend)
    loss.backward()
    assert loss == 0
    assert s.grad is not None
    assert s.grad.shape == (0, 12)


@of_kernels
@pytest.mark.parametrize("form", ["forward_kl", "both parts", "the label's", "the others'", "corrected"])
@pytest.mark.parametrize("soft_weight", [0.5, 0.0])
def test_labels_far_ahead_alone_and_missing(backend: str, form: str, soft_weight: float) -> None:
    """A label far ahead leaves the others' distribution as it is, and a margin may set it far behind."""
    s, t = sides(13, torch.float32)
    s, t = s[:4].clone(), t[:4].clone()
    s[:] = t[::2].repeat(2, 1) * 0.5
    s[0, 12], t[0, 12] = 300.0, 200.0
    s[1, 1:] = t[1, 1:] = -INF  # both have the label alone
    s[1, 0] = -200.0
    s[2, 3] = -INF  # the student lacks it
    s[3, 1], t[3, 1] = 300.0, -INF
    margin = torch.zeros(13)
    margin[12], margin[1] = 350.0, 300.5
    options = {**FORMS[form], "soft_weight": soft_weight, "hard_weight": 0.7, "temperature": TEMPERATURE}
    options |= {"label_margin": margin, "reduction": "none", "target": targets(13)[:4]}
    up = torch.linspace(0.5, 2.0, 4)
    mine = computed(s, t, up, backend=backend, **options)
    true = computed(s.double(), t.double(), up.double(), backend="reference", **options)
    compare(mine, true, torch.float32)


@of_kernels
@pytest.mark.parametrize("form", ["forward_kl", "symmetric", "jsd", "both parts", "corrected", "skewed"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.7])
@pytest.mark.parametrize("standardize", [False, True])
def test_a_peak_has_what_the_others_leave(backend: str, form: str, hard_weight: float, standardize: bool) -> None:
    """Wherever it is among eight classes, with its label or beside it: no digits of its gradient are lost."""
    s, t = (toys.normal(8, 24, seed=seed) * (0.01 if standardize else 1.0) for seed in (1, 2))
    at = torch.arange(8)
    s[at, 8 + at] += 20.0
    t[at, 8 + at] += 17.0
    temperature = 0.25 if standardize else 1.0
    options = {**FORMS[form], "hard_weight": hard_weight, "standardize": standardize, "temperature": temperature}
    options |= {"target": torch.where(at % 2 == 0, 8 + at, at), "reduction": "none"}
    mine = computed(s, t, torch.ones(8), backend=backend, **options)
    true = computed(s.double(), t.double(), torch.ones(8, dtype=torch.float64), backend="reference", **options)
    for name in ("d_student", "d_teacher"):
        peaks, expected = mine[name][at, 8 + at].double(), true[name][at, 8 + at]
        torch.testing.assert_close(peaks, expected, rtol=3e-5, atol=2e-9, msg=name)  # of numbers near 1, 6e-8 is lost


@of_kernels
@pytest.mark.parametrize("form", ["skewed", "skewed the other way"])
def test_near_sides_are_told_apart(backend: str, form: str) -> None:
    """The rounding of the normalisers, which all classes share, is not in a small skewed divergence."""
    s = toys.normal(ROWS, 6001, seed=1)
    t = s + toys.normal(ROWS, 6001, seed=2) * 1e-2
    made, true = (
        tgt.distillation_loss(*pair, standardize=True, reduction="none", backend=where, **FORMS[form])
        for pair, where in (((s, t), backend), ((s.double(), t.double()), "reference"))
    )
    assert true.max() < 1e-4
    torch.testing.assert_close(made.double(), true, rtol=0, atol=1.5e-7)


@of_kernels
def test_small_temperatures_of_rows_stay_in_range(backend: str) -> None:
    """Differences of logits over a temperature leave the range of float32, and what is made of them does not."""
    s, t = toys.normal(3, 5, seed=1) * 1e18, toys.normal(3, 5, seed=2) * 1e18
    ours, theirs = torch.tensor([1e-28, 1e-3, 1.0]), torch.tensor([1e-28, 1e-3, 2.0])
    for form in ("both parts", "skewed", "symmetric"):
        made, true = (
            tgt.distillation_loss(
                *pair, torch.tensor([0, 1, 2]), temperature=ours, teacher_temperature=theirs, reduction="none",
                backend=where, **FORMS[form],
            )
            for pair, where in (((s, t), backend), ((s.double(), t.double()), "reference"))
        )  # fmt: skip
        torch.testing.assert_close(made.double(), true, rtol=1e-4, atol=1e-40)
