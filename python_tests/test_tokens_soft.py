"""soft_embedding: values and gradients against float64, noise, straight-through, masks, chunks, memory, errors."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from numerics import assert_close, threads
from programs import ran
from strategies import DTYPES, lay_out, random_values
from test_tokens import chi_square
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from tgt_fast.kernels.native import tokens as native_tokens
from tgt_fast.kernels.reference.tokens import gumbel_noise
from tgt_fast.kernels.triton import tokens as triton_tokens
from tgt_fast.kernels.triton.tuning import SoftPlan

# On a device the noun has Triton's kernels alone; they are tested in its interpreter.
embedding = pytest.mark.parametrize("backend", ["reference", "native", "triton"], indirect=True)
compiled = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)

# What each number of classes is there for.
SIZES = (
    1,
    5,  # part of a vector, and of a block of four numbers
    37,
    2500,  # a block of 2048 and a part; three tiles of Triton's
)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return random_values(shape, seed, scale, dtype)


def evaluate(logits: Tensor, table: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """(embedding, gradient to the logits, gradient to the table)"""
    leaves = [x.detach().requires_grad_() for x in (logits, table)]
    out = tgt.soft_embedding(*leaves, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))


def truth(logits: Tensor, table: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The same by autograd through the reference, in float64 on the same, already rounded inputs."""
    options["backend"] = "reference"
    return evaluate(logits.double(), table.double(), upstream.double(), **options)


def assert_like_truth(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """fp64 1e-6, for the noise is float32's; fp32 1e-5; 16 bits no worse than 1.5 times rounding the truth."""
    for name, out, want in zip(("embedding", "d_logits", "d_table"), found, wanted, strict=True):
        floor = 1e-2 * math.sqrt(max(1, out.shape[0] if out.dim() > 1 else 1))
        bar = 1e-6 if out.dtype == torch.float64 else 1e-5
        if out.dtype in (torch.bfloat16, torch.float16):
            finite = want.nan_to_num()
            rounded = (finite.to(out.dtype).double() - finite).norm() / max(float(finite.norm()), floor)
            bar = max(bar, 1.5 * float(rounded))
        assert_close(name, out, want, bar=bar, floor=floor)


@pytest.mark.meet(3)
@embedding
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_dtype(backend: str, size: int, gumbel: bool, hard: bool) -> None:
    pairs = [(dtype, dtype) for dtype in DTYPES]
    pairs += [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float64)]
    for ours, other in pairs:
        if backend == "triton" and torch.float64 in (ours, other):
            continue
        logits, table = values(3, 2, size, dtype=ours), values(size, 9, seed=1, dtype=other)
        upstream = values(3, 2, 9, seed=2, dtype=other)
        options: dict[str, Any] = {"gumbel": gumbel, "hard": hard, "tau": 0.7, "seed": 3, "step": 2, "replica": 1}
        found = evaluate(logits, table, upstream, **options, backend=backend)
        assert [x.dtype for x in found] == [other, ours, other]
        wanted = truth(logits, table, upstream, **options)
        assert_like_truth(found, wanted)
    if size == 37:
        for wrong in (lambda x: torch.zeros_like(x), lambda x: x * 1.05, lambda x: x.roll(1, 0)):
            with pytest.raises(AssertionError):
                assert_like_truth(tuple(map(wrong, found)), wanted)


def test_without_noise_it_is_softmax_times_the_table(native: str) -> None:
    logits, table = values(6, 40), values(40, 5, seed=1)
    want = torch.softmax(logits.double() / 1.3, -1) @ table.double()
    torch.testing.assert_close(tgt.soft_embedding(logits, table, tau=1.3).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_gradcheck_of_the_reference(gumbel: bool, hard: bool) -> None:
    """A hard embedding is a step in the logits: its gradient to them is that of the soft one, and so is the check."""
    logits, table = (values(2, 3, 5, dtype=torch.float64), values(5, 4, seed=1, dtype=torch.float64))
    options: dict[str, Any] = {"gumbel": gumbel, "tau": 0.8, "backend": "reference"}
    leaves = (logits.requires_grad_(), table.requires_grad_())
    if not hard:
        assert torch.autograd.gradcheck(lambda x, t: tgt.soft_embedding(x, t, **options), leaves)
        assert torch.autograd.gradgradcheck(lambda x, t: tgt.soft_embedding(x, t, **options), leaves)
        return
    assert torch.autograd.gradcheck(lambda t: tgt.soft_embedding(logits.detach(), t, hard=True, **options), (table,))
    soft, straight = (tgt.soft_embedding(logits, table, hard=h, **options).square().sum() for h in (False, True))
    upstream = 2 * tgt.soft_embedding(logits, table, hard=True, **options).detach()
    (d_straight,) = torch.autograd.grad(straight, logits)
    (d_soft,) = torch.autograd.grad(tgt.soft_embedding(logits, table, **options), logits, upstream)
    assert torch.equal(d_straight, d_soft)
    assert not torch.equal(d_straight, torch.autograd.grad(soft, logits)[0])


@embedding
def test_hard_takes_a_row_and_is_straight_through(backend: str) -> None:
    logits, table, upstream = values(7, 30), values(30, 4, seed=1), values(7, 4, seed=2)
    logits[3] = 0.0  # ties go to the lowest id
    logits[4, 20:] = logits[4].amax() + 1.0
    logits[6] = logits[5]  # one row of the table, taken twice
    out, d_logits, d_table = evaluate(logits, table, upstream, hard=True, backend=backend)
    chosen = torch.stack([torch.nonzero(row == row.amax())[0, 0] for row in logits])
    assert chosen[3] == 0
    assert chosen[4] == 20
    assert torch.equal(out, table[chosen])
    torch.testing.assert_close(d_logits, evaluate(logits, table, upstream, backend=backend)[1])
    torch.testing.assert_close(d_table, torch.zeros(30, 4).index_add_(0, chosen, upstream))


# Noise


def test_the_noise_is_gumbels() -> None:
    noise = gumbel_noise(3, torch.arange(50), 2, 4001).double().flatten()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    for level in (-2.0, 0.0, 2.0, 8.0):
        share, want = float((noise < level).double().mean()), math.exp(-math.exp(-level))
        assert abs(share - want) < 5 * math.sqrt(want * (1 - want) / noise.numel())


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_a_hard_sample_has_the_distribution_of_the_logits(backend: str) -> None:
    row = torch.tensor([0.3, -1.0, 2.0, 1.2, 1.2, -0.5, 0.0])
    out = tgt.soft_embedding(row.expand(100, 200, 7), torch.eye(7), gumbel=True, hard=True, seed=5, backend=backend)
    assert chi_square(out.argmax(-1), torch.softmax(row, 0).tolist()) < 5
    assert chi_square(out.argmax(-1), torch.softmax(1.05 * row, 0).tolist()) > 5


@embedding
def test_noise_belongs_to_the_sample_the_position_and_the_key(backend: str) -> None:
    """Every row of a batch is a row of another one: to rounding, for a product's order of additions is its own."""
    logits, table, ids = values(5, 3, 21), values(21, 4, seed=1), torch.arange(100, 105) + 2**40
    options: dict[str, Any] = {"gumbel": True, "seed": 4, "backend": backend}
    whole = tgt.soft_embedding(logits, table, sample_ids=ids, **options)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(tgt.soft_embedding(logits[order], table, sample_ids=ids[order], **options), whole[order])
    torch.testing.assert_close(tgt.soft_embedding(logits[:, :2], table, sample_ids=ids, **options), whole[:, :2])
    single = tgt.soft_embedding(logits[2, 0], table, sample_ids=ids[2:3], **options)
    torch.testing.assert_close(single, whole[2, 0])
    for change in ({"seed": 5}, {"step": 1}, {"replica": 1}, {"sample_ids": ids + 1}):
        other = tgt.soft_embedding(logits, table, **{"sample_ids": ids, **options, **change})
        assert ((other - whole).abs().amax(-1) > 1e-3).all()
    held = tgt.soft_embedding(logits, table, sample_ids=ids, **{**options, "seed": torch.tensor(4)})
    assert torch.equal(held, whole)


@compiled
def test_backward_draws_the_noise_of_forward_though_counters_have_advanced(backend: str) -> None:
    logits, table, upstream = values(4, 21), values(21, 4, seed=1), values(4, 4, seed=2)
    want = evaluate(logits, table, upstream, gumbel=True, seed=6, step=3, backend=backend)
    seed, step = torch.tensor(6), torch.tensor(3)
    leaf = logits.clone().requires_grad_()
    out = tgt.soft_embedding(leaf, table, gumbel=True, seed=seed, step=step, backend=backend)
    step += 1
    seed += 1
    (d_logits,) = torch.autograd.grad(out, leaf, upstream)
    assert torch.equal(d_logits, want[1])


# Masks


@embedding
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("gumbel", [False, True])
def test_masks_and_rows_that_are_no_distribution(backend: str, gumbel: bool, hard: bool) -> None:
    logits, table, upstream = values(6, 30), values(30, 4, seed=1), values(6, 4, seed=2)
    logits[0, ::2] = -math.inf
    logits[1, 3:] = -math.inf
    options: dict[str, Any] = {"gumbel": gumbel, "hard": hard, "tau": 0.5}
    found = evaluate(logits, table, upstream, **options, backend=backend)
    assert_like_truth(found, truth(logits, table, upstream, **options))
    assert (found[1][0, ::2] == 0).all()
    assert (found[1][1, 3:] == 0).all()
    odd = logits.clone()
    odd[2, 7] = math.nan
    odd[3, 29] = math.inf
    odd[4] = -math.inf
    strange = evaluate(odd, table, upstream, **options, backend=backend)
    for now, before in zip(strange[:2], found[:2], strict=True):
        assert now[2:5].isnan().all()
        torch.testing.assert_close(now[[0, 1, 5]], before[[0, 1, 5]])
    if hard:  # what took no row of the table gives nothing back to one
        assert not strange[2].isnan().any()


@embedding
def test_extreme_logits_and_temperatures(backend: str) -> None:
    logits, table = torch.tensor([[3e4, -3e4, 0.0, 2.9e4], [1e-3, 0.0, -1e-3, 0.0]]), values(4, 3)
    for tau in (1e-3, 1.0, 1e4):
        found = evaluate(logits, table, torch.ones(2, 3), tau=tau, backend=backend)
        wanted = truth(logits, table, torch.ones(2, 3), tau=tau)
        for out, want in zip(found[::2], wanted[::2], strict=True):
            torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


# Forms


@compiled
@pytest.mark.parametrize("size", [5, 37, 2500])
def test_the_gradient_of_peaked_rows(backend: str, size: int) -> None:
    """p (slope - mean slope), where both are large and nearly equal: their difference must not be their rounding."""
    logits = values(64, size, scale=1.0)
    logits[torch.arange(64), torch.arange(64) * 7 % size] += torch.linspace(4, 16, 64) + math.log(size)
    table, upstream = values(size, 40, seed=1), values(64, 40, seed=2, scale=10.0)
    found, wanted = evaluate(logits, table, upstream, backend=backend)[1], truth(logits, table, upstream)[1]
    leaf = logits.clone().requires_grad_()  # as PyTorch writes it
    (eager,) = torch.autograd.grad(leaf.softmax(-1) @ table, leaf, upstream)
    ours, theirs = ((x - wanted).norm(dim=1) / wanted.norm(dim=1) for x in (found, eager))
    assert ours.median() < 1e-5 < theirs.max()
    assert not (ours > 1e-4).any()
    assert (ours > 2 * theirs).sum() <= (theirs > 2 * ours).sum()


@embedding
@pytest.mark.parametrize("layout", ["dense", "row-strided", "column-strided", "transposed"])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 2, 9), (0, 9), (3, 0, 9)], ids=str)
def test_any_shape_and_strides(backend: str, shape: tuple[int, ...], layout: str) -> None:
    logits, table = values(*shape), values(9, 5, seed=1)
    upstream = values(*shape[:-1], 5, seed=2)
    laid = (lay_out(logits, layout), lay_out(table, layout), lay_out(upstream, layout))
    found = evaluate(*laid, gumbel=True, backend=backend)
    assert [x.shape for x in found] == [(*shape[:-1], 5), logits.shape, table.shape]
    for out, want in zip(found, truth(logits, table, upstream, gumbel=True), strict=True):
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradient_that_is_wanted(backend: str, wanted: tuple[bool, bool]) -> None:
    logits, table, upstream = values(4, 21), values(21, 4, seed=1), values(4, 4, seed=2)
    both = evaluate(logits, table, upstream, gumbel=True, backend=backend)[1:]
    leaves = [x.clone().requires_grad_(want) for x, want in zip((logits, table), wanted, strict=True)]
    tgt.soft_embedding(*leaves, gumbel=True, backend=backend).backward(upstream)
    for leaf, want, grad in zip(leaves, wanted, both, strict=True):
        assert (leaf.grad is not None) == want
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, grad)
    with torch.no_grad():
        assert not tgt.soft_embedding(*leaves, backend=backend).requires_grad


@compiled
def test_a_second_backward_and_no_second_derivative(backend: str) -> None:
    leaf, table = values(4, 21).requires_grad_(), values(21, 4, seed=1)
    out = tgt.soft_embedding(leaf, table, gumbel=True, backend=backend)
    (first,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    (again,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    assert torch.equal(first, again)
    (slope,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_rows_change_nothing_but_rounding(
    native: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, table, upstream = values(5, 4, 30, dtype=dtype), values(30, 6, seed=1), values(5, 4, 6, seed=2)
    want = evaluate(logits, table, upstream, gumbel=True)
    monkeypatch.setattr(native_tokens, "BUDGET", 3 * 30 * 4)  # three rows
    for out, one in zip(evaluate(logits, table, upstream, gumbel=True), want, strict=True):
        torch.testing.assert_close(out, one, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "plan",
    [SoftPlan(16, 16, 16, 1, 1), SoftPlan(16, 32, 32, 3, 1), SoftPlan(32, 16, 16, 7, 1, (16, 32, 32))],
    ids=lambda plan: str(plan).replace(", noisy=None", ""),
)
@pytest.mark.parametrize("hard", [False, True])
def test_every_way_to_cut_a_call(interpreted: str, hard: bool, plan: SoftPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the vocabulary that hold nothing, a maximum that rises from tile to tile, more splits than tiles."""
    ramp = torch.linspace(-20, 20, 40)
    logits = torch.cat([values(14, 40), torch.stack([ramp, ramp.flip(0), 0.1 * ramp])])
    logits[0, :24] = logits[1, 24:] = -math.inf
    table, upstream = values(40, 21, seed=1), values(17, 21, seed=2)
    monkeypatch.setattr(triton_tokens, "soft_plan", lambda *_: plan)
    found = evaluate(logits, table, upstream, gumbel=True, hard=hard, backend=interpreted)
    assert_like_truth(found, truth(logits, table, upstream, gumbel=True, hard=hard))


def test_same_bits_for_any_number_of_threads_in_the_rows(native: str) -> None:
    """The core's part: PyTorch's matrix products may add in another order."""
    logits, table = values(101, 700), torch.eye(700)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(tgt.soft_embedding(logits, table, gumbel=True, hard=True))
    assert all(torch.equal(out, results[0]) for out in results)


_PEAK = """
import torch, tgt_fast as tgt
def told(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
table = torch.ones(20000, 16)
tgt.soft_embedding(torch.zeros(2, 20000, requires_grad=True), table, gumbel=True).sum().backward()
logits = torch.ones(2000, 20000, requires_grad=True)  # 160 MB
before = told("VmHWM")
out = tgt.soft_embedding(logits, table, gumbel=True)
forward, rest = told("VmHWM") - before, told("VmRSS")  # what forward has given back is no part of backward
out.sum().backward()
print(forward, told("VmHWM") - rest)
"""


def test_memory_is_a_chunk_and_the_gradient(native: str, child_environment: dict[str, str]) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("this system does not tell a process its peak memory")
    run = ran(_PEAK, environment=child_environment)
    assert run.returncode == 0, run.stderr
    forward, backward = (int(number) / (2000 * 20000 * 4) for number in run.stdout.split())
    assert forward < 0.25
    assert 0.9 < backward < 1.25  # the gradient, and little else


T = values(3, 2, seed=1)
X = values(4, 3)
ERRORS: list[tuple[type[Exception], dict[str, Any], str]] = [
    (DTypeError, {"logits": X.long()}, "int64"),
    (DTypeError, {"table": T.long()}, "table.*int64"),
    (ShapeError, {"logits": torch.tensor(1.0)}, r"\(\)"),
    (ShapeError, {"table": torch.zeros(5, 2)}, r"\(5, 2\).*\(4, 3\)"),
    (ShapeError, {"table": torch.zeros(3)}, r"\(3,\)"),
    (DeviceError, {"table": torch.zeros(3, 2, device="meta")}, "meta.*cpu"),
    (ArgumentError, {"tau": 0.0}, "tau.*0.0"),
    (ArgumentError, {"tau": math.inf}, "tau.*inf"),
    (ArgumentError, {"gumbel": 1}, "gumbel.*1"),
    (ArgumentError, {"hard": "yes"}, "hard.*'yes'"),
    (ShapeError, {"sample_ids": torch.arange(3)}, r"\(3,\).*logits \(4, 3\)"),
    (ArgumentError, {"sample_ids": torch.tensor([0, 1, 2, 2**48])}, str(2**48)),
    (ArgumentError, {"step": -1}, "-1"),
    (ArgumentError, {"backend": "gpu"}, "'gpu'"),
    (ShapeError, {"logits": torch.zeros(1).expand(1, 2**33, 3), "gumbel": True}, "Gumbel"),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: str(list(value)) if isinstance(value, dict) else ""
)
def test_bad_input_is_named(native: str, error: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        tgt.soft_embedding(**{"logits": X, "table": T, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 5, 9), (64, 4099, 96), (32, 30522, 384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_on_a_gpu(gpu: str, shape: tuple[int, int, int], dtype: torch.dtype, hard: bool) -> None:
    """Triton's kernels as a device runs them: like the truth, and twice the same."""
    rows, size, width = shape
    logits, table = values(rows, size, dtype=dtype), values(size, width, seed=1, dtype=dtype)
    upstream = values(rows, width, seed=2, dtype=dtype)
    options: dict[str, Any] = {"gumbel": True, "hard": hard, "tau": 0.7, "seed": 3, "step": 2}
    there = [x.to(gpu) for x in (logits, table, upstream)]
    one, two = (
        tuple(x.cpu() for x in evaluate(*there, **options, backend="triton"))  # type: ignore[misc]
        for _ in range(2)
    )
    assert_like_truth(one, truth(logits, table, upstream, **options))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
