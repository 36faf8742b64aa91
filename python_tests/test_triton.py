"""The Triton backend: what it refuses, how it cuts calls, and every way to cut one, in Triton's interpreter.

The other tests run it too, as the backend "triton"; there a call's size chooses the way. test_triton_gpu.py runs the
compiled kernels.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import backward, forward
from numerics import Result, assert_matches_truth, evaluate, logits, targets, truth
from programs import ran
from strategies import DTYPES
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import BackendError
from tgt_fast.kernels import select
from tgt_fast.kernels import triton as backend_module
from tgt_fast.kernels.latent_calls import AscendCall, PerturbCall, outputs
from tgt_fast.kernels.native import latent as native_latent
from tgt_fast.kernels.options import DIVERGENCES, OP_ASCEND, OP_PERTURB, DistillOptions
from tgt_fast.kernels.philox import NoiseKey
from tgt_fast.kernels.triton import distill, latent, tuning
from tgt_fast.kernels.triton.tuning import Plan

# Ways to cut rows of 100 classes.
PLANS = {
    "a row a program": Plan("rows", 1, 128, 1),
    "rows that do not fill a program": Plan("rows", 4, 128, 1),
    "streamed": Plan("stream", 1, 32, 1),
}
ways = pytest.mark.parametrize(
    ("name", "divergence"),
    [
        *itertools.product(("rows that do not fill a program", "streamed"), DIVERGENCES),
        ("a row a program", "forward_kl"),  # the kernel of the first, with one row in the place of four
        ("a row a program", "jsd"),
    ],
)


def check(plan: Plan, student: Tensor, teacher: Tensor, target: Tensor | None = None, **options: Any) -> None:
    """A call cut by ``plan``, and the gradients made again from its state, against the truth."""
    options = {"reduction": "none", **options}
    made = DistillOptions(**{"teacher_temperature": options.get("temperature", 1.0), **options})
    out = forward(distill.forward, student, teacher, target, None, None, made, plan=plan)
    again = backward(
        distill.backward, student, teacher, target, out.row_state, torch.ones_like(out.loss), made, plan=plan
    )
    expected = truth(student, teacher, target, **options)
    for d_student, d_teacher in ((out.d_student, out.d_teacher), again):
        assert_matches_truth(
            Result(out.loss, d_student, d_teacher),
            expected,
            student,
            teacher,
            divergence=made.divergence,
            temperature=made.temperature,
            teacher_temperature=made.teacher_temperature,
            hard=target is not None,
        )


@ways
def test_every_way_to_cut_a_call(interpreted: str, name: str, divergence: str) -> None:
    student, teacher, target = logits(3, 100, 0), logits(3, 100, 1), targets(3, 100, 2)
    plan = PLANS[name]
    check(plan, student, teacher, divergence=divergence, beta=0.3, temperature=2.0)
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.7, "label_smoothing": 0.1}
    check(plan, student.bfloat16(), teacher.double(), target, temperature=0.5, **options)


@ways
def test_every_way_to_cut_masked_rows(interpreted: str, name: str, divergence: str) -> None:
    """Masks on either side, on both, whole tiles of them, and rows of NaN, +inf and nothing but -inf."""
    student, teacher, target = logits(9, 100, 0), logits(9, 100, 1), targets(9, 100, 2)
    for side, row in ((student, 0), (teacher, 1), (student, 2), (teacher, 2)):
        side[row, 7:41] = -math.inf
    student[3, 0:64] = teacher[3, 0:64] = -math.inf  # the first tiles hold nothing
    student[4, 64:] = teacher[4, 64:] = -math.inf  # the last ones
    student[5, 99] = math.nan
    teacher[6, 50] = math.inf
    student[7] = -math.inf
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.7, "label_smoothing": 0.1}
    check(PLANS[name], student, teacher, target, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_maxima_that_rise_from_tile_to_tile(interpreted: str, divergence: str) -> None:
    """A streamed row restates its sums whenever a side's maximum rises: here at every tile, by much and by little."""
    ramp = torch.linspace(-30, 30, 100)
    student = torch.stack([ramp, ramp.flip(0), 0.1 * ramp, ramp])
    teacher = torch.stack([0.5 * ramp, ramp, ramp.flip(0), 1.01 * ramp])
    if divergence in ("forward_kl", "jsd"):  # without the hard term, in which the student's maximum rises as well
        check(PLANS["streamed"], student, teacher, divergence=divergence)
    check(PLANS["streamed"], student, teacher, targets(4, 100, 2), divergence=divergence, hard_weight=1.0,
          label_smoothing=0.2, temperature=3.0)  # fmt: skip


@pytest.mark.parametrize("plan", [PLANS["streamed"], PLANS["a row a program"]], ids=["streamed", "rows"])
def test_gradients_over_the_logits(interpreted: str, plan: Plan) -> None:
    student, teacher = logits(5, 100, 0), logits(5, 100, 1)
    options = DistillOptions(divergence="symmetric")
    apart = forward(distill.forward, student, teacher, None, None, None, options, plan=plan)
    over = student.clone()
    inside = forward(distill.forward, over, teacher, None, None, None, options, plan=plan, inplace=True)
    assert inside.d_student is not None
    assert inside.d_student.data_ptr() == over.data_ptr()
    assert torch.equal(over, apart.d_student)  # type: ignore[arg-type]
    assert torch.equal(inside.d_teacher, apart.d_teacher)  # type: ignore[arg-type]


def test_labels_and_weights_out_of_range_drop_their_rows(interpreted: str) -> None:
    """As on any device: they cannot be an error there."""
    student, teacher = logits(6, 10, 0), logits(6, 10, 1)
    target = torch.tensor([3, 10, -7, 2**40, 4, -100])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, math.nan, 1.0])
    options = DistillOptions(hard_weight=1.0, reduction="mean")
    out = forward(distill.forward, student, teacher, target, weight, None, options)
    alone = forward(distill.forward, student[:1], teacher[:1], target[:1], None, None, options)
    assert torch.equal(out.loss, alone.loss)
    for got, want in ((out.d_student, alone.d_student), (out.d_teacher, alone.d_teacher)):
        assert got is not None
        assert torch.equal(got[:1], want)  # type: ignore[arg-type]
        assert not got[1:].any()


def test_a_factor_that_leaves_float32_is_carried_in_two(interpreted: str) -> None:
    for value in (0.3, 1e-30, 1e30, 1 / 3, 0.0):
        high, low = backend_module.two_floats(value)
        assert high == torch.tensor(value, dtype=torch.float32).item()
        assert abs(high + low - value) <= 2.0**-46 * abs(value)


# Latents

TILED = 151  # three tiles of 64: a first, one between, and a last that is not full


@pytest.mark.meet(1)  # test_latent.py has each dtype with each option, in a tile
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"truncation": 2.0}, {"sphere_radius": "keep"}, {"sphere_radius": 3.0}])
def test_perturb_in_tiles(interpreted: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    z = torch.randn(3, TILED, generator=torch.Generator().manual_seed(0)).to(dtype)
    key = NoiseKey(-5, torch.tensor([0, 2**40 + 3, 2**48 - 1]), 7, 9, OP_PERTURB, options.get("truncation"))
    call = PerturbCall(z, key, 0.7, None, options.get("sphere_radius"))
    whole, tiled = outputs(call), outputs(call)
    native_latent.forward(call, whole)
    latent.forward(call, tiled, plan=Plan("rows", 2, 64, 1))
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(tiled, whole, **close)


@pytest.mark.parametrize("norm", ["l2", "linf", "raw"])
@pytest.mark.parametrize("radius_norm", [None, "l2", "linf"])
def test_ascend_in_tiles(interpreted: str, norm: str, radius_norm: str | None) -> None:
    z, grad, anchor = torch.randn(3, 3, TILED, generator=torch.Generator().manual_seed(0))
    grad[1] = 0
    radius = torch.tensor([0.1, 10.0, 1e9]) if radius_norm else None
    call = AscendCall(
        z, grad, NoiseKey(torch.tensor(2**63 - 5), torch.arange(3), torch.tensor(3), 0, OP_ASCEND), 0.7, 0.3, radius,
        torch.linspace(0, 1, TILED), anchor if radius_norm else None, norm, radius_norm or "l2",
    )  # fmt: skip
    whole, tiled = outputs(call), outputs(call)
    native_latent.forward(call, whole)
    latent.forward(call, tiled, plan=Plan("rows", 2, 64, 1))
    torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=1e-6)


# The choice of the backend


def test_cpu_tensors_are_served_by_name_alone(interpreted: str) -> None:
    student = torch.zeros(2, 3)
    assert select.choose("distill", "triton", (student,)) == "triton"
    assert select.choose("distill", "auto", (student,)) != "triton"
    (row,) = (row for row in tgt.backends() if row.name == "triton")
    assert row.available
    assert row.devices == ("cpu",)


def run_python(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = ran(code, environment={**kept, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_gpu_and_the_interpreter_it_says_so_and_triton_is_not_imported(interpreted: str) -> None:
    code = """
import sys, torch, tgt_fast as tgt
for call in (lambda: tgt.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton"),
             lambda: tgt.perturb_latents(torch.zeros(2, 3), 1.0, backend="triton")):
    try:
        call()
    except tgt.errors.BackendError as error:
        print(error)
print([row.reason for row in tgt.backends() if row.name == "triton"], "triton" in sys.modules)
"""
    first, second, last = run_python(code).splitlines()
    for line in (first, second):
        assert "TRITON_INTERPRET=1" in line
    assert "no GPU" in last
    assert last.endswith("False")


def test_a_triton_that_is_missing_or_broken_is_refused_with_its_reason(
    interpreted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "load", lambda: "Triton does not load (ImportError: no such library)")
    (row,) = (row for row in tgt.backends() if row.name == "triton")
    assert not row.available
    assert "no such library" in row.reason
    with pytest.raises(BackendError, match="no such library"):
        tgt.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton")
    with pytest.raises(BackendError, match="no such library"):
        backend_module.kernels()


def test_interpreter_switched_on_too_late_is_refused() -> None:
    if backend_module.importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    code = """
import os, triton
os.environ["TRITON_INTERPRET"] = "1"
import torch, tgt_fast
print(tgt_fast.kernels.triton.refusal("distill", (torch.zeros(2, 3),)))
"""
    assert "before" in run_python(code)


# Plans


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 1024, 1025, 4096, 4097, 128256, 2**30])
@pytest.mark.parametrize("wide", [False, True])
def test_shipped_plans_cover_a_row(classes: int, wide: bool) -> None:
    plan = tuning.shipped_plan(classes, wide)
    assert plan.kernel == "stream" or plan.block >= classes
    assert plan.rows * plan.block <= 4096
    tile = tuning.elementwise_plan(plan)
    assert tile.rows * tile.block <= 4096
    for number in (*plan[1:], *tile[1:]):
        assert number & (number - 1) == 0


@pytest.mark.parametrize("classes", [1, 2, 10, 16, 33, 100, 128])
def test_shipped_plans_of_short_rows_fit_the_registers(classes: int) -> None:
    # A thread may hold as many rows' states as elements, and 8 of them spill.
    plan = tuning.shipped_plan(classes, False)
    assert plan.rows * plan.block <= 4 * 32 * plan.warps


def test_plans_of_long_rows_and_wide_tables() -> None:
    assert tuning.shipped_plan(128256, False) == Plan("stream", 1, 1024, 4)
    plan = tuning.soft_plan(512, 30522, 384, torch.bfloat16, torch.device("cuda"))
    assert (plan.forward(True).width, plan.forward(False)) == (256, plan)  # noise is drawn once a tile of the width


@pytest.fixture
def plans_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of plans, in force for a test."""
    tuning.own_plans.cache_clear()
    path = tmp_path / "plans.json"
    monkeypatch.setenv(tuning.PLANS_VARIABLE, str(path))
    yield path
    tuning.own_plans.cache_clear()


@pytest.mark.parametrize(("temperature", "power"), [(3.0, 3), (4.0, 4), (2.5, 0)])
def test_hard_terms_by_powers(interpreted: str, plans_file: Path, temperature: float, power: int) -> None:
    plans_file.write_text(json.dumps([{"kernel": "stream", "classes": 24, "rows": 1, "block": 16, "warps": 1}]))
    options: dict[str, Any] = {"temperature": temperature, "hard_weight": 1.0, "reduction": "none"}
    assert distill._numbers(DistillOptions(**options), True).constants["POWER"] == power
    for classes in (24, 40):  # streamed, and a tile a row; both divide by 8
        student, teacher = logits(3, classes, 0) * 3, logits(3, classes, 1)
        target = torch.tensor([5, -1, 23])
        best = truth(student, teacher, target, **options)
        made = evaluate(student, teacher, target, backend=interpreted, **options)
        assert_matches_truth(made, best, student, teacher, temperature=temperature, hard=True)


def test_a_table_of_ones_own_comes_first(interpreted: str, plans_file: Path) -> None:
    own = {"kernel": "stream", "classes": 50, "rows": 1, "block": 16, "warps": 2}
    plans_file.write_text(json.dumps([own]))
    assert tuning.plan_of(4, 33, False, None) == Plan("stream", 1, 16, 2)
    assert tuning.plan_of(4, 51, False, None) == tuning.interpreted_plan(4, 51)
    student, teacher = logits(4, 33, 0), logits(4, 33, 1)
    best = truth(student, teacher, reduction="none")
    assert_matches_truth(
        evaluate(student, teacher, backend=interpreted, reduction="none"), best, student, teacher
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        '{"kernel": "rows"}',
        '[{"kernel": "rows", "classes": 64, "rows": 1, "block": 32, "warps": 4}]',  # a row would not fit
        '[{"kernel": "stream", "classes": 64, "rows": 1, "block": 48, "warps": 4}]',  # no power of 2
        '[{"kernel": "stream", "classes": "64", "rows": 1, "block": 32, "warps": 4}]',
        '[{"kernel": "exec", "classes": 64, "rows": 1, "block": 64, "warps": 4}]',
    ],
)
def test_an_unreadable_table_is_ignored_with_a_warning(plans_file: Path, text: str) -> None:
    plans_file.write_text(text)
    with pytest.warns(UserWarning, match="plans.json is ignored"):
        assert tuning.own_plans(None) == ()


def test_no_table_is_no_warning(plans_file: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert tuning.own_plans(None) == ()
    assert not recwarn
