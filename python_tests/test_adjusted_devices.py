"""Adjustments around a kernel that takes none: any row against the formula, in chunks, for which no host waits."""

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
from tgt_fast.kernels import adjusted_rows, composed
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import Direct, DistillCall, Gradients, Outputs
from tgt_fast.kernels.options import DistillOptions

ROWS, CLASSES = 11, 12
INF = math.inf
TARGET = torch.tensor([3, 0, 5, 2, -100, 1, -1, 4, 6, 0, 7])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.0, 0.0, 3.0, 1.0, 1.5, 0.75, 1.0])
BIAS, OTHER, MARGIN = (toys.normal(CLASSES, seed=seed) for seed in (5, 6, 7))
T_ROWS, TT_ROWS = torch.linspace(0.7, 4.0, ROWS), torch.linspace(3.0, 0.8, ROWS)
FORMS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "jsd": {"divergence": "jsd"},
    "mse": {"divergence": "mse"},
    "both parts": {"decoupled": (1.0, 2.0)},
    "the label's": {"decoupled": (1.5, 0.0)},
    "the others'": {"decoupled": (0.0, 1.5)},
    "corrected": {"correct_teacher": 0.2},
}
of_kernels = pytest.mark.parametrize(
    "backend", ["emulated", "triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two sides with a row of every kind."""
    s, t = (toys.normal(ROWS, CLASSES, seed=seed) * 3 for seed in (0, 1))
    large = 2e4 if dtype == torch.float16 else 1e20
    for side in (s, t):
        side[1, 8:] = -INF
    s[2, 9] = -INF  # which the teacher has
    s[3, 1] = math.nan
    s[4], t[5, 3] = math.nan, INF  # of rows that do not count
    s[7, 2], t[7, 4] = large, large / 2
    if dtype != torch.float16:  # which has no number for such a gradient
        s[8], t[8] = 2.0, 2.0
    t[9, 1:] = -INF  # the teacher has the label alone
    t[10, 7], s[10, 7] = 40.0, 30.0  # both are sure of it
    return s.to(dtype), t.to(dtype)


def computed(s: Tensor, t: Tensor, target: Tensor | None, up: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    loss: Any = tgt.distillation_loss(s, t, target, sample_weight=WEIGHT, **options)
    return (loss.detach(), *torch.autograd.grad(loss, (s, t), up))


@of_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("given", ["labels", "shares"])
@pytest.mark.parametrize("terms", [(0.5, 0.0), (0.4, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize("beside", ["nothing", "biases", "margin"])
def test_every_row(
    backend: str, monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype, standardize: bool, by_row: bool,
    given: str, terms: tuple[float, float], beside: str,
) -> None:  # fmt: skip
    options: dict[str, Any] = {**FORMS[form], "standardize": standardize, "reduction": "none", "temperature": 2.0}
    options["soft_weight"], options["hard_weight"] = terms
    if by_row:
        options |= {"temperature": T_ROWS, "teacher_temperature": TT_ROWS}
    if beside == "biases":
        options |= {"student_bias": BIAS, "teacher_bias": OTHER}
    target = TARGET
    if given == "shares" and "decoupled" not in options and "correct_teacher" not in options:
        target = toys.normal(ROWS, CLASSES, seed=9).softmax(1)
    elif beside == "margin":
        options |= {"label_margin": MARGIN, "student_bias": BIAS}
    s, t = pair(dtype)
    up = torch.linspace(-0.5, 2.0, ROWS)
    expected = computed(s.double(), t.double(), target, up.double(), backend="reference", **options)
    monkeypatch.setattr(adjusted_rows, "_ELEMENTS", {"cpu": 4 * CLASSES})
    monkeypatch.setattr(composed, "forward_by_formula", None)
    made = computed(s, t, target, up.to(torch.float64 if dtype == torch.float64 else torch.float32), backend=backend,
                    **options)  # fmt: skip
    bars = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 6e-3, torch.float16: 1.5e-3}
    expected = (expected[0].to(made[0].dtype).double(), *expected[1:])
    for name, mine, true in zip(("loss", "d_student", "d_teacher"), made, expected, strict=True):
        for row in range(ROWS):
            floor = 1e6 if row == 8 and standardize else 1e-2  # where a standard deviation of 0 is divided by
            bar = bars[dtype if name != "loss" or dtype == torch.float64 else torch.float32]
            numerics.assert_close(f"{name}[{row}]", mine[row], true[row], bar=bar, floor=floor)


@of_kernels
def test_statistics_and_sums(backend: str) -> None:
    """Of what the soft term sees, of rows that count; the mean of all chunks' rows."""
    s, t = pair(torch.float32)
    s[3] = t[9] = 0.5
    options = {"temperature": T_ROWS, "decoupled": (1.0, 2.0), "label_margin": MARGIN, "return_stats": True}
    for soft_weight in (1.0, 0.0):
        for standardize in (False, True):
            given: dict[str, Any] = {**options, "soft_weight": soft_weight, "standardize": standardize}
            found, stats = tgt.distillation_loss(s, t, TARGET, sample_weight=WEIGHT, backend=backend, **given)
            true, expected = tgt.distillation_loss(s, t, TARGET, sample_weight=WEIGHT, backend="reference", **given)
            numerics.assert_close("loss", found.double(), true.double(), bar=3e-5, floor=0.1)
            for name, mine, its in zip(stats._fields, stats, expected, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_small_temperatures_of_rows_stay_in_range(interpreted: str) -> None:
    """Differences of logits over a temperature leave the range of float32, and what is made of them does not."""
    s, t = toys.normal(3, 5, seed=1) * 1e12, toys.normal(3, 5, seed=2) * 1e12
    ours, theirs = torch.tensor([1e-28, 1e-3, 1.0]), torch.tensor([1e-28, 1e-3, 2.0])
    made, true = (
        tgt.distillation_loss(
            *sides, torch.tensor([0, 1, 2]), temperature=ours, teacher_temperature=theirs, reduction="none",
            decoupled=(1.0, 2.0), backend=backend,
        )
        for sides, backend in (((s, t), interpreted), ((s.double(), t.double()), "reference"))
    )  # fmt: skip
    torch.testing.assert_close(made.double(), true, rtol=1e-4, atol=1e-12)


class _Kernel:
    """Stands in the place of a kernel on a device: fills what it is given."""

    @staticmethod
    def forward(call: DistillCall, out: Outputs) -> None:
        for room in out:
            if room is not None:
                room.fill_(0.5)

    @staticmethod
    def scale_(grad: Tensor, factor: Tensor) -> None:
        grad.mul_(factor.to(grad.dtype)[:, None])


@pytest.mark.parametrize("form", FORMS)
def test_the_host_waits_for_no_device(form: str) -> None:
    s, t = pair(torch.float32)
    given = FORMS[form]
    adjust = Adjustments(
        True, given.get("decoupled"), 0.0, given.get("correct_teacher"), BIAS, OTHER, MARGIN, T_ROWS, TT_ROWS
    )
    options = DistillOptions(given.get("divergence", "forward_kl"), hard_weight=1.0)
    wanted: dict[str, Any] = dict.fromkeys(("want_d_student", "want_d_teacher", "want_row_state", "want_stats"), True)
    call = DistillCall(options, s, t, TARGET, WEIGHT, adjust=adjust, **wanted)
    with NothingWaits():
        out = Direct(_Kernel).forward(call)
        grads: Gradients = Direct(_Kernel).backward(call, out.row_state, torch.tensor(-1.0))  # type: ignore[arg-type]
    assert all(grad is not None and grad.shape == s.shape for grad in grads)
