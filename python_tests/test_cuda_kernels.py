"""The CUDA kernels, emulated and on a GPU where there is one: every way to lay a row on the chip, against the truth.

The other tests run them too, as the backends ``emulated`` and ``cuda``; there a call's size chooses the way.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_calls import PLANS, Kernels, Plan, rows_without_data
from emulated_gpu import tensors_on_an_emulated_gpu
from kernel_calls import loss_and_gradients
from numerics import Result, assert_matches_truth, logits, targets, truth
from strategies import DTYPES, lay_out
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels.calls import Outputs
from tgt_fast.kernels.native import cuda
from tgt_fast.kernels.native.abi import packer
from tgt_fast.kernels.options import DIVERGENCES

plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda":
        return Kernels.on(torch.device(request.getfixturevalue("gpu")))
    return Kernels.emulated(request.getfixturevalue("emulated"))


def check(
    kernels: Kernels, plan: Plan, student: Tensor, teacher: Tensor, target: Tensor | None = None, **options: Any
) -> Outputs:
    options = {"reduction": "none", **options}
    out = kernels.forward(plan, student, teacher, target, **options)
    assert_matches_truth(
        Result(out.loss, out.d_student, out.d_teacher),
        truth(student, teacher, target, **options),
        student,
        teacher,
        divergence=options.get("divergence", "forward_kl"),
        temperature=options.get("temperature", 1.0),
        teacher_temperature=options.get("teacher_temperature"),
        hard=target is not None,
    )
    return out


@plans
@pytest.mark.parametrize("divergence", DIVERGENCES)
# 2: six blocks of eight have nothing; 67: a tail; 1000: whole vectors; 3089: blocks of unequal shares
@pytest.mark.parametrize("classes", [2, 67, 1000, 3089])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(kernels: Kernels, plan: Plan, divergence: str, classes: int, dtype: torch.dtype) -> None:
    student, teacher = logits(3, classes, 0, dtype=dtype), logits(3, classes, 1, dtype=dtype)
    target = torch.tensor([0, classes // 2, classes - 1])
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "teacher_temperature": 3.0}
    check(kernels, plan, student, teacher, target, hard_weight=0.7, label_smoothing=0.1, **options)
    options = {"divergence": divergence, "hard_weight": 1.0}
    check(kernels, plan, student, teacher, target, **options)


@pytest.mark.parametrize("plan", [PLANS["a warp"], PLANS["2 blocks, bulk copies"]], ids=["a warp", "2 blocks"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5])
def test_rows_that_take_the_short_loops(kernels: Kernels, plan: Plan, divergence: str, temperature: float) -> None:
    """Halves of whole vectors, with and without a hard term, which is a power of the soft one at some temperatures;
    beside them rows with masks, far logits, a peak, another temperature of the teacher, and one that is dropped."""
    student, teacher = logits(7, 520, 0, dtype=torch.bfloat16), logits(7, 520, 1, dtype=torch.bfloat16)
    student[2, 17] = teacher[2, 17] = -math.inf
    student[3, 17] = teacher[3, 17] = -2e19
    student[4, 300] += 60
    teacher[1] = student[1] + 1
    student[6] = student[6] * 50 + 3000
    target = torch.tensor([0, -1, 519, 300, 300, -100, 77])
    other = {"divergence": divergence, "temperature": temperature, "teacher_temperature": temperature + 0.5}
    check(kernels, plan, student, teacher, target, hard_weight=0.5, **other)
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    check(kernels, plan, student, teacher, **options)
    both = check(kernels, plan, student, teacher, target, hard_weight=0.5, **options)
    alone = kernels.forward(plan, student, teacher, target, hard_weight=0.5, wanted=(True, False), **options)
    assert torch.equal(alone.loss, both.loss)
    assert_matches_truth(
        Result(alone.loss, alone.d_student, both.d_teacher),
        truth(student, teacher, target, hard_weight=0.5, **options),
        student,
        teacher,
        divergence=divergence,
        temperature=temperature,
        hard=True,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_mixtures_of_near_and_of_far(kernels: Kernels, temperature: float) -> None:
    """jsd in its short loops: rows that differ by their last bits, and rows whose peaks are elsewhere, so far away that
    a probability over the other is no float."""
    student = logits(4, 520, 0, dtype=torch.bfloat16)
    teacher = student.clone()
    teacher[0, ::3] *= 1 + 2**-7
    student[1, 5] = teacher[1, 5] = 100
    teacher[1, 6] = 99
    student[2:, 5:7] = teacher[2:, 518:] = 200 * temperature  # two each: gradients of a lone peak have another loop
    target = torch.tensor([5, 6, 519, -1])
    for hard in (0.0, 0.5):
        check(
            kernels,
            PLANS["a warp"],
            student,
            teacher,
            target,
            divergence="jsd",
            temperature=temperature,
            hard_weight=hard,
        )


@plans
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("at", [0, 1, 602])
def test_peaks(kernels: Kernels, plan: Plan, at: int, divergence: str) -> None:
    student, teacher = logits(3, 603, 0), logits(3, 603, 1)
    student[:, at] += 30
    teacher[:2, at] += 30
    check(kernels, plan, student, teacher, divergence=divergence)
    check(kernels, plan, student, teacher, torch.tensor([at, 7, at]), divergence=divergence, hard_weight=0.5)


@plans
def test_the_label_may_be_anywhere(kernels: Kernels, plan: Plan) -> None:
    """Each row its own class: the first and last of every share and of every vector."""
    classes = 67
    student, teacher = logits(1, classes, 0).repeat(classes, 1), logits(1, classes, 1).repeat(classes, 1)
    check(kernels, plan, student, teacher, torch.arange(classes), hard_weight=5.0)


@plans
@pytest.mark.parametrize("pair", [(a, b) for a in DTYPES for b in DTYPES if torch.float64 not in (a, b)], ids=str)
def test_mixed_dtypes_on_sliced_rows(kernels: Kernels, plan: Plan, pair: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = logits(4, 301, 0, dtype=pair[0]), logits(4, 301, 1, dtype=pair[1])
    dense = check(kernels, plan, student, teacher)
    sliced = check(kernels, plan, lay_out(student, "row-strided"), lay_out(teacher, "row-strided"))
    for got, want in zip(loss_and_gradients(sliced), loss_and_gradients(dense), strict=True):
        assert torch.equal(got, want)


@plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masks_and_rows_that_are_no_distribution(
    kernels: Kernels, plan: Plan, divergence: str, dtype: torch.dtype
) -> None:
    student, teacher = logits(8, 203, 0, dtype=dtype), logits(8, 203, 1, dtype=dtype)
    student[1, 190:] = teacher[1, 190:] = -math.inf
    student[2, 5] = teacher[3, 200] = -math.inf
    student[4, 202], teacher[5, 0] = math.nan, math.inf
    student[6] = -math.inf
    out = check(kernels, plan, student, teacher, divergence=divergence)
    assert out.loss.isnan().tolist() == [False] * 4 + [True] * 3 + [False]
    check(kernels, plan, student, teacher, targets(8, 203, 3), divergence=divergence, hard_weight=0.5)


@plans
def test_in_place_gradients_equal_separate_ones(kernels: Kernels, plan: Plan) -> None:
    student, teacher, target = logits(3, 1003, 0), logits(3, 1003, 1), targets(3, 1003, 2)
    plain = kernels.forward(plan, student, teacher, target, hard_weight=1.0)
    copy = student.clone()
    placed = kernels.forward(plan, copy, teacher, target, hard_weight=1.0, inplace=True)
    assert torch.equal(placed.loss, plain.loss)
    assert torch.equal(copy, plain.d_student)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [5, 1003])
def test_out_of_range_labels_and_weights_behave_as_dropped(kernels: Kernels, classes: int) -> None:
    student, teacher = logits(6, classes, 0), logits(6, classes, 1)
    bad = torch.tensor([1, classes, 2, -7, 2**40, 3])
    dropped = torch.where((bad < 0) | (bad >= classes), -100, bad)
    weight = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0, 0.5])
    for reduction in ("mean", "sum", "none"):
        options: dict[str, Any] = {"hard_weight": 1.0, "reduction": reduction}
        got = kernels.forward((0, 0, True), student, teacher, bad, weight=weight, **options)
        want = kernels.forward((0, 0, True), student, teacher, dropped, weight=weight, **options)
        for a, b in zip(loss_and_gradients(got), loss_and_gradients(want), strict=True):
            assert torch.equal(a, b)
    weight = torch.tensor([1.0, -1.0, math.nan, math.inf, 0.0, 2.0])
    counted = torch.where((weight > 0) & weight.isfinite(), weight, 0.0)
    got, want = (kernels.forward((0, 0, True), student, teacher, weight=w) for w in (weight, counted))
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.d_student, want.d_student)  # type: ignore[arg-type]


def test_a_normalizer_on_the_device_is_one_on_the_host(kernels: Kernels) -> None:
    student, teacher = logits(6, 33, 0), logits(6, 33, 1)
    for value in (0.0, 7.5):
        got = kernels.forward((0, 0, True), student, teacher, normalizer=torch.tensor(value))
        want = kernels.forward((0, 0, True), student, teacher, normalizer=value)
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.d_student, want.d_student)  # type: ignore[arg-type]


def test_a_failed_launch_names_its_kernel(emulated: ModuleType) -> None:
    """More rows than a grid has blocks."""
    with pytest.raises(RuntimeError, match="distill_fwd_kernel: "):
        emulated.cuda_distill_forward(rows_without_data(emulated, 2**31), (3, 0, True), 0)


@pytest.mark.parametrize("size", [5, 1024, 1032, 40000, 150001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latents_of_every_size_equal_the_cpu(kernels: Kernels, size: int, dtype: torch.dtype) -> None:
    """A warp, a block, and clusters of 4 and 8 blocks a sample. The generator's integers are the same."""
    generator = torch.Generator().manual_seed(0)
    z, grad, anchor = (torch.randn(3, size, generator=generator).to(dtype) for _ in range(3))
    calls = (
        lambda: tgt.perturb_latents(z, 0.5, seed=7, sample_ids=torch.tensor([4, 2**47, 1]), step=5, replica=2),
        lambda: tgt.perturb_latents(z, 0.5, seed=7, sphere_radius="keep"),
        lambda: tgt.perturb_latents(z, 0.5, seed=7, truncation=1.5, sphere_radius=3.0),
        lambda: tgt.ascend_latents(z, grad, step_size=2.0, sigma=0.1, anchor=anchor, radius=1.0, seed=3),
        lambda: tgt.ascend_latents(z, grad, step_size=0.1, norm="linf", anchor=anchor, radius=0.3, radius_norm="linf"),
    )
    tolerance = 4 * torch.finfo(dtype).eps + 4e-6
    for call in calls:
        want = call()
        with kernels.within():
            got = call()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_seed_and_step_may_live_on_the_device(emulated: ModuleType) -> None:
    z = torch.zeros(4, 33)
    with tensors_on_an_emulated_gpu(emulated):
        want = tgt.perturb_latents(z, 1.0, seed=(5 << 40) + 3, step=9)
        engine = cuda.engine(z)
        assert engine is not None
        seed, step, ids, out = torch.tensor((5 << 40) + 3), torch.tensor(9), torch.arange(4), torch.empty_like(z)
        key = (0, ids.data_ptr(), 0, 0, 0, 0.0)
        call = packer(engine.core, "PerturbCall")(4, 33, 0, z.data_ptr(), out.data_ptr(), 1.0, 0, 0, *key, 0.0)
        engine.core.cuda_latent_perturb(call, (seed.data_ptr(), step.data_ptr()), 0)
    assert torch.equal(out, want)
