"""On a real GPU: the native backend against the float64 truth, and what only a device can show.

Streams, graph capture, autograd's threads, repeatability, memory, more than 2^31 elements. Skipped without a GPU,
unless TGT_FAST_REQUIRE_CUDA=1 turns that into a failure. The tests of the ``backend`` fixture and test_cuda_kernels.py
run on a GPU too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_calls import PLANS, Plan, planned, rows_without_data
from gpu_calls import every_kernel_once
from hypothesis import given, settings
from kernel_calls import loss_and_gradients as results
from numerics import Result, assert_matches_truth, distillation_loss, logits, targets, truth
from strategies import DTYPES, AscendCase, DistillCase, ascend_cases, distill_cases, lay_out
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels.native import core, distill
from tgt_fast.kernels.options import DIVERGENCES, DistillOptions

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


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


# 2, 17, 1000: a warp a row; 4099: a block, no alignment; 32000: two blocks; 128256: eight; 500008: streamed in float32
@pytest.mark.parametrize("classes", [2, 17, 1000, 4099, 32000, 128256, 500008])
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


@pytest.mark.parametrize("layout", ["row-strided", "column-strided", "transposed"])
@pytest.mark.parametrize("classes", [1000, 4099, 32000, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_however_they_lie(dtype: torch.dtype, classes: int, layout: str) -> None:
    student, teacher = (logits(3, classes, seed, dtype=dtype) for seed in (0, 1))
    target, there = targets(3, classes, 2), [lay_out(x.cuda(), layout) for x in (student, teacher)]
    for divergence in DIVERGENCES:
        options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "reduction": "none"}
        got, best = evaluate(*there, target, **options), truth(student, teacher, target, **options)
        assert_matches_truth(got, best, student, teacher, divergence=divergence, hard=True)


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


def test_every_kernel_once() -> None:
    """Calls that compute-sanitizer looks at."""
    assert all(not out.isnan().any() for out in every_kernel_once(torch.device("cuda")))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_layout_repeats_its_bits(divergence: str, dtype: torch.dtype, plan: Plan) -> None:
    """Enough rows that blocks of several rows run on a multiprocessor at a time, in another order each time."""
    student, teacher = (logits(1500, 3089, seed, dtype=dtype).cuda() for seed in (0, 1))
    student[1, 3000:] = teacher[1, 3000:] = -math.inf
    target = targets(1500, 3089, 2).cuda()
    options = DistillOptions(divergence=divergence, hard_weight=1.0, label_smoothing=0.1)

    def once() -> list[Tensor]:
        made = planned(student, teacher, target, None, None, options, wanted=(True, True), plan=plan)
        return results(made)

    first = once()
    for _ in range(20):
        again = once()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("size", [64, 2000, 150001])
def test_latents_repeat_their_bits(size: int) -> None:
    z, grad = torch.randn(300, size, device="cuda"), torch.randn(300, size, device="cuda")

    def once() -> tuple[Tensor, Tensor]:
        ball = tgt.perturb_latents(z, 1.0, seed=5, sphere_radius=3.0, backend="native")
        return ball, tgt.ascend_latents(
            z, grad, step_size=1.0, sigma=0.1, anchor=ball, radius=0.5, seed=5, backend="native"
        )

    first = once()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    return logits(64, 32000, 0).cuda(), logits(64, 32000, 1).cuda(), targets(64, 32000, 2).cuda()


def loss_and_gradients(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaves = [student.detach().requires_grad_(), teacher.detach().requires_grad_()]
    loss = distillation_loss(*leaves, target, hard_weight=1.0, backend="native")
    return (loss.detach(), *torch.autograd.grad(3 * loss, leaves))


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of the step, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


# 10: a warp a row; 4000: a block; 32000: a cluster
@pytest.mark.parametrize("classes", [10, 4000, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_captured_loss_replays_with_changed_inputs(divergence: str, dtype: torch.dtype, classes: int) -> None:
    """Forward and backward: float16 makes its gradients in backward, the others scale them there."""
    student, teacher = logits(64, classes, 0, dtype=dtype).cuda(), logits(64, classes, 1, dtype=dtype).cuda()
    target, upstream = targets(64, classes, 2).cuda(), torch.tensor(1.0, device="cuda")

    def step() -> tuple[Tensor, ...]:
        leaves = [student.detach().requires_grad_(), teacher.detach().requires_grad_()]
        loss = distillation_loss(*leaves, target, divergence=divergence, hard_weight=1.0, backend="native")
        return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream))

    graph, out = captured(step)
    for seed, factor in ((5, 1.0), (6, 3.0)):  # a factor of 1 is recognised on the device
        student.copy_(logits(64, classes, seed, dtype=dtype))
        target.copy_(targets(64, classes, seed))
        upstream.fill_(factor)
        graph.replay()
        for got, want in zip(out, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("size", [64, 2000, 150001])
def test_captured_latents_draw_fresh_noise_at_each_replay(size: int) -> None:
    z, seed = torch.randn(8, size, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    counter = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, ...]:
        moved = tgt.perturb_latents(z, 1.0, seed=seed, step=counter, backend="native")
        uphill = tgt.ascend_latents(
            z, moved, step_size=1.0, sigma=0.1, anchor=z, radius=0.5, seed=seed, step=counter, backend="native"
        )
        return moved, uphill

    def advancing() -> tuple[Tensor, ...]:
        out = step()
        counter.add_(1)
        return out

    graph, out = captured(advancing)
    seen: list[Tensor] = []
    for fresh in (3, 3, 2**40):
        seed.fill_(fresh)
        before = int(counter)
        graph.replay()
        assert int(counter) == before + 1
        now = [each.clone() for each in out]
        assert not any(torch.equal(now[0], other) for other in seen)
        seen.append(now[0])
        counter.fill_(before)
        for got, want in zip(now, step(), strict=True):
            assert torch.equal(got, want)
        counter.fill_(before + 1)


def test_work_waits_for_its_stream_alone(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Reads of what a stream is about to write wait for it; no other stream would."""
    student, teacher, target = problem
    fresh = logits(64, 32000, 9).cuda()
    want = loss_and_gradients(fresh, teacher, target)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        student.copy_(fresh)
        got = loss_and_gradients(student, teacher, target)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_thread_of_its_own(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    want = loss_and_gradients(*problem)
    torch.cuda.synchronize()
    got: list[tuple[Tensor, ...]] = []
    thread = threading.Thread(target=lambda: got.append(loss_and_gradients(*problem)))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got[0], want, strict=True))


def test_autograds_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """backward() runs in a thread of autograd's; on a side stream it uses the stream of the forward pass."""
    threads: list[int] = []
    plain = distill.backward

    def noted(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return plain(*arguments, **options)

    monkeypatch.setattr(distill, "backward", noted)
    student, teacher = (logits(64, 4000, seed, dtype=torch.float16).cuda() for seed in (0, 1))
    grads: list[Tensor] = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            leaf = student.detach().requires_grad_()
            distillation_loss(leaf, teacher, backend="native").backward()
        torch.cuda.synchronize()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert threads
    assert threading.get_ident() not in threads
    assert torch.equal(grads[0], grads[1])


def test_beside_torchs_own_kernels(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Two CUDA runtimes in a process: their kernels alternate on a stream, and neither sees the other's errors."""
    student, teacher, target = problem
    want = loss_and_gradients(student, teacher, target)
    weight = torch.randn(32000, 32000 // 8, device="cuda")
    for _ in range(3):
        product = student @ weight
        got = loss_and_gradients(student, teacher, target)
        assert torch.equal(product, student @ weight)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(RuntimeError, match="distill_fwd_kernel"):  # more rows than a grid has blocks
        core().cuda_distill_forward(rows_without_data(core(), 2**31), (3, 0, True), 0)
    assert torch.equal(student @ weight, product)
    assert torch.equal(loss_and_gradients(student, teacher, target)[0], want[0])


def test_a_second_device(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Tensors decide where kernels run, whatever device is current; and that stays as it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    want = loss_and_gradients(*problem)
    there = [x.to("cuda:1") for x in problem]
    assert torch.cuda.current_device() == 0
    got = loss_and_gradients(*there)  # type: ignore[arg-type]
    z = torch.zeros(4, 2000, device="cuda:1")
    moved = tgt.perturb_latents(z, 1.0, seed=1, backend="native")
    assert torch.cuda.current_device() == 0
    assert {x.device.index for x in (*got, moved)} == {1}
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))
    assert torch.equal(moved.cpu(), tgt.perturb_latents(z.to("cuda:0"), 1.0, seed=1, backend="native").cpu())


@pytest.mark.parametrize("both", [False, True])
def test_memory_beyond_the_gradients_is_small(problem: tuple[Tensor, Tensor, Tensor], both: bool) -> None:
    student, teacher, target = problem
    leaves = [student.requires_grad_(), teacher.requires_grad_(both)][: 1 + both]
    distillation_loss(student, teacher, target, hard_weight=1.0, backend="native").backward()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = distillation_loss(student, teacher, target, hard_weight=1.0, backend="native")
    (2 * loss).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    assert gradients <= extra < gradients + (1 << 20)


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


def test_more_than_two_to_the_31_elements(room: Callable[[int], None]) -> None:
    """The last rows, beyond what 32 bits index, equal the same rows alone. About 14 GB."""
    room(16)
    rows, classes = 16800, 128256
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


@pytest.mark.parametrize("size", [1000, 100_000])
def test_more_than_two_to_the_31_latents(room: Callable[[int], None], size: int) -> None:
    """The last samples equal the same samples alone. About 9 GB."""
    room(12)
    samples = 2**31 // size + 10
    z = torch.zeros(samples, size, dtype=torch.bfloat16, device="cuda")
    ids = torch.arange(samples, device="cuda")
    tail = slice(samples - 3, samples)
    for options in ({}, {"sphere_radius": 2.0}):
        moved = tgt.perturb_latents(z, 1.0, seed=1, sample_ids=ids, backend="native", **options)  # type: ignore[arg-type]
        want = tgt.perturb_latents(z[tail], 1.0, seed=1, sample_ids=ids[tail], backend="native", **options)  # type: ignore[arg-type]
        assert torch.equal(moved[tail], want)
