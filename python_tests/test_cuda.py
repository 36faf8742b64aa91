"""On a real GPU: the native backend against the float64 truth, and what only a device can show.

Streams, graph capture, autograd's threads, repeatability, more than 2^31 elements. Skipped without a GPU, unless
TGT_FAST_REQUIRE_CUDA=1 turns that into a failure.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from numerics import Result, assert_matches_truth, distillation_loss, logits, targets, truth
from strategies import DTYPES, AscendCase, DistillCase, ascend_cases, distill_cases
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels.native import cuda, cuda_distill
from tgt_fast.kernels.options import DIVERGENCES, DistillOptions, Forward

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

# As in test_cuda_kernels.py: (path, blocks a row, bulk copies).
PLANS = [(1, 0, True), (2, 1, False), (2, 1, True), (2, 2, True), (2, 4, False), (2, 8, True), (3, 0, True)]


def on_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def evaluate(
    student: Tensor, teacher: Tensor, target: Tensor | None, upstream: Tensor | None = None, **options: Any
) -> Result:
    """The loss and its gradients on the GPU, brought back."""
    leaves = [x.detach().cuda().requires_grad_() for x in (student, teacher)]
    options = {name: on_gpu(value) for name, value in options.items()}
    loss = distillation_loss(*leaves, on_gpu(target), backend="native", **options)
    assert loss.is_cuda
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream.cuda().to(loss))
    return Result(loss.detach().cpu(), grads[0].cpu(), grads[1].cpu())


def check(student: Tensor, teacher: Tensor, target: Tensor | None = None, per_row: float = 1.0, **options: Any) -> None:
    assert_matches_truth(
        evaluate(student, teacher, target, **options),
        truth(student, teacher, target, **options),
        student,
        teacher,
        divergence=options.get("divergence", "forward_kl"),
        temperature=options.get("temperature", 1.0),
        teacher_temperature=options.get("teacher_temperature"),
        hard=target is not None,
        per_row=per_row,
    )


# 17, 1000: a warp a row; 4099: a block, no alignment; 32000: two blocks; 128256: eight; 500008: streamed in float32
@pytest.mark.parametrize("classes", [1, 17, 1000, 4099, 32000, 128256, 500008])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_size_and_dtype(divergence: str, dtype: torch.dtype, classes: int) -> None:
    rows = 5 if classes < 10_000 else 2
    student, teacher = logits(rows, classes, 0, dtype=dtype), logits(rows, classes, 1, dtype=dtype)
    check(student, teacher, divergence=divergence, reduction="none")
    check(
        student, teacher, targets(rows, classes, 2), divergence=divergence, temperature=2.0, hard_weight=0.5,
        label_smoothing=0.1, reduction="none",
    )  # fmt: skip


@settings(max_examples=150)
@given(case=distill_cases())
def test_any_legal_call_agrees_with_the_truth(case: DistillCase) -> None:
    rows = math.prod(case.student.shape[:-1])
    divisor = float(case.options.get("normalizer") or rows) if case.options["reduction"] == "mean" else 1.0
    check(case.student, case.teacher, case.target, per_row=1.0 / max(1.0, divisor), **case.options)


@settings(max_examples=100)
@given(case=ascend_cases())
def test_ascend_agrees_with_the_cpu(case: AscendCase) -> None:
    want = tgt.ascend_latents(case.z, case.grad, **case.options)
    options = {name: on_gpu(value) for name, value in case.options.items()}
    got = tgt.ascend_latents(case.z.cuda(), case.grad.cuda(), backend="native", **options).cpu()
    tolerance = 4 * torch.finfo(case.z.dtype).eps + 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [5, 1024, 1032, 40000, 150001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_that_of_the_cpu(size: int, dtype: torch.dtype) -> None:
    z, ids = torch.zeros(3, size, dtype=dtype), torch.tensor([4, 2**47, 1])
    for options in ({}, {"truncation": 1.5}, {"sphere_radius": 2.0}):
        want = tgt.perturb_latents(z, 1.0, seed=7, sample_ids=ids, **options)  # type: ignore[arg-type]
        got = tgt.perturb_latents(z.cuda(), 1.0, seed=7, sample_ids=ids.cuda(), backend="native", **options)  # type: ignore[arg-type]
        tolerance = torch.finfo(dtype).eps + 4e-6
        torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_layout_gives_the_same_and_repeats_its_bits(dtype: torch.dtype, plan: tuple[int, int, bool]) -> None:
    student, teacher = (logits(9, 3089, seed, dtype=dtype).cuda() for seed in (0, 1))
    student[1, 3000:] = teacher[1, 3000:] = -math.inf
    target = targets(9, 3089, 2).cuda()
    options = DistillOptions(divergence="jsd", hard_weight=1.0, label_smoothing=0.1)
    engine = cuda.engine(student)
    assert engine is not None

    def once(how: tuple[int, int, bool]) -> Forward:
        return cuda_distill.forward(
            engine, student, teacher, target, None, None, options, wanted=(True, True), plan=how
        )  # fmt: skip

    first = once(plan)
    for _ in range(20):
        again = once(plan)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))  # type: ignore[arg-type]
    streamed = once((3, 0, True))
    torch.testing.assert_close(first.loss, streamed.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.d_student, streamed.d_student, rtol=1e-2, atol=1e-6)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    return logits(64, 32000, 0).cuda(), logits(64, 32000, 1).cuda(), targets(64, 32000, 2).cuda()


def loss_and_gradients(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaves = [student.detach().requires_grad_(), teacher.detach().requires_grad_()]
    loss = distillation_loss(*leaves, target, hard_weight=1.0, backend="native")
    return (loss.detach(), *torch.autograd.grad(3 * loss, leaves))


def test_capture_and_replay_with_changed_inputs(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = problem
    z, step = torch.zeros(8, 2000, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss_and_gradients(student, teacher, target)
            tgt.perturb_latents(z, 1.0, step=step, backend="native")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(student, teacher, target)
        moved = tgt.perturb_latents(z, 1.0, step=step, backend="native")
        uphill = tgt.ascend_latents(z, moved, step_size=1.0, anchor=z, radius=0.5, step=step, backend="native")
        step += 1
    for seed in (5, 6):
        student.copy_(logits(64, 32000, seed))
        before = int(step)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, loss_and_gradients(student, teacher, target), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(moved, tgt.perturb_latents(z, 1.0, step=before, backend="native"))
        assert uphill.isfinite().all()


def test_a_side_stream_and_autograds_threads(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    want = loss_and_gradients(*problem)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got = loss_and_gradients(*problem)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_twice_with_the_upstream_gradient_applied_each_time(dtype: torch.dtype) -> None:
    student = logits(16, 32000, 0, dtype=dtype).cuda().requires_grad_()
    teacher = logits(16, 32000, 1, dtype=dtype).cuda()
    loss = distillation_loss(student, teacher, backend="native")
    (first,) = torch.autograd.grad(loss, student, torch.tensor(1024.0, device="cuda"), retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, torch.tensor(1024.0, device="cuda"))
    torch.testing.assert_close(first, second, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_nothing_waits_for_the_device(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    z = torch.zeros(8, 2000, device="cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(*problem)
        tgt.perturb_latents(z, 1.0, step=step, backend="native")
        tgt.ascend_latents(z, z, step_size=1.0, anchor=z, radius=0.5, backend="native")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements() -> None:
    """The last rows, beyond what 32 bits index, equal the same rows alone. About 14 GB."""
    rows, classes = 16800, 128256
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free device memory")
    student = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_()
    teacher = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_()
    assert student.numel() > 2**31
    tail = slice(rows - 3, rows)
    want = evaluate(student[tail], teacher[tail], None, reduction="none")
    student.requires_grad_()
    loss = distillation_loss(student, teacher, reduction="none", backend="native")
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    assert torch.equal(loss[tail].detach().cpu(), want.loss)
    assert torch.equal(grad[tail].cpu(), want.d_student)  # type: ignore[arg-type]
