"""The loss from the student's hidden states against a top-k record: what neither side's N x C logits are needed for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from heads import STUDENT, THREE_ROWS, assert_matches, check, run, topk_case, truth
from strategies import DTYPES
from test_distill_machine import MIB, child
from test_registration import Watched
from torch import Tensor

import tgt_fast as tgt
from tgt_fast import TeacherTopK
from tgt_fast.errors import ArgumentError, BackendError, ShapeError
from tgt_fast.kernels import linear_chunks, linear_heads, memory
from tgt_fast.kernels.options import TAILS, TOPK_DIVERGENCES

pytestmark = pytest.mark.usefixtures("one_thread")


# Value and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", TOPK_DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_every_divergence_and_tail(way: str, tail: str, divergence: str, dtype: torch.dtype) -> None:
    """Against all logits in float64: with everything a head can have, then plain and at a temperature."""
    case = topk_case(dtype=dtype, tail=tail, labeled=True, student=(1.5, 9.0))
    options: dict[str, Any] = {"divergence": divergence, "beta": 0.3}
    check(case, backend=way, hard_weight=0.5, label_smoothing=0.1, memory_budget=THREE_ROWS, **options)
    case = topk_case(dtype=dtype, tail=tail, biased=False, temperature=2.0)
    check(case, backend=way, temperature=2.0, soft_weight=0.7, **options)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("student", [(1.0, None), (2.5, None), (1.0, 3.0), (0.5, 3.0)])
def test_bias_scale_and_softcap(way: str, student: tuple[float, float | None], biased: bool) -> None:
    case = topk_case((3, 4), biased=biased, student=student, temperature=2.0)
    check(case, backend=way, temperature=2.0, memory_budget=THREE_ROWS)


def test_no_option_of_the_student_is_dropped_silently(way: str) -> None:
    """A softcap, a scale or a bias that is passed and not applied trains another model than the one that is saved."""
    plain = run(topk_case(biased=False), backend=way).loss
    for changed in ({"student": (2.0, None)}, {"student": (1.0, 2.0)}, {"biased": True}):
        assert not torch.isclose(run(topk_case(**{"biased": False, **changed}), backend=way).loss, plain, rtol=1e-3)


def test_bf16_logits_are_not_rounded(native: str) -> None:
    """Logits in bfloat16 before the softmax cost gradients percents, which no loss curve shows."""
    case = topk_case(64, (300, 300), dtype=torch.bfloat16, k=16, biased=False, student=(4.0, None))
    found = check(case, backend=native, per_row=1 / 64)
    t = {name: case.tensors[name].requires_grad_() for name in STUDENT[:2]}  # type: ignore[union-attr]
    assert case.topk is not None
    rounded = tgt.distillation_loss(4.0 * (t["student_hidden"] @ t["student_weight"].T), case.topk)
    expected = truth(case)
    for name, grad in zip(t, torch.autograd.grad(rounded, list(t.values())), strict=True):
        found.grads[name], kept = grad, found.grads[name]
        with pytest.raises(AssertionError, match=name):
            assert_matches(case, found, expected, per_row=1 / 64)
        found.grads[name] = kept


@pytest.mark.parametrize("dtypes", [p for p in itertools.product(DTYPES, repeat=2) if p[0] != p[1]], ids=str)
def test_dtypes_of_head_and_record_may_differ(native: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = topk_case(dtype=dtypes[0], log_probs=dtypes[1])
    assert case.topk is not None
    case.topk = dataclasses.replace(case.topk, ids=case.topk.ids.to(torch.int32))
    check(case, backend=native, memory_budget=THREE_ROWS)


def test_the_comparison_fails_for_wrong_gradients(native: str) -> None:
    case = topk_case(labeled=True)
    found, expected = run(case, backend=native, hard_weight=1.0), truth(case, hard_weight=1.0)
    wrongs = (torch.zeros_like, lambda x: 1.05 * x, lambda x: x.flip(0))
    for name, wrong in itertools.product(STUDENT, wrongs):
        kept, found.grads[name] = found.grads[name], wrong(found.grads[name])
        with pytest.raises(AssertionError, match=name):
            assert_matches(case, found, expected, per_row=1 / 7)
        found.grads[name] = kept


def test_it_is_the_loss_on_logits(way: str) -> None:
    """Of a user who has the logits, which float64 makes the same to many digits."""
    case = topk_case((2, 5), dtype=torch.float64, labeled=True, temperature=3.0)
    t = {name: case.tensors[name].requires_grad_() for name in STUDENT}  # type: ignore[union-attr]
    logits = torch.nn.functional.linear(t["student_hidden"], t["student_weight"], t["student_bias"])
    options: dict[str, Any] = {"temperature": 3.0, "hard_weight": 0.5, "divergence": "jsd"}
    assert case.topk is not None
    dense = tgt.distillation_loss(logits, case.topk, case.target, **options)
    found = run(case, backend=way, **options)
    torch.testing.assert_close(found.loss, dense.detach())
    torch.testing.assert_close(tuple(found.grads.values()), torch.autograd.grad(dense, list(t.values())))


def test_a_truncated_record_never_gives_a_negative_loss(native: str) -> None:
    """Cut to k classes and not renormalised, a divergence goes negative and a student is paid for what is missing."""
    case = topk_case(64, (60, 60), k=3)
    for divergence, scale in itertools.product(("forward_kl", "reverse_kl", "jsd"), (0.1, 1.0, 8.0)):
        case.student = (scale, None)
        assert (run(case, backend=native, divergence=divergence, reduction="none", wanted=()).loss >= 0).all()
    assert case.topk is not None
    hidden, weight, bias = (case.tensors[name] for name in STUDENT)
    logits = torch.nn.functional.linear(hidden, weight, bias)  # type: ignore[arg-type]
    same = dataclasses.replace(case, student=(1.0, None), topk=tgt.topk_teacher(logits, 3))
    equal = run(same, backend=native, reduction="none", wanted=()).loss
    assert (equal >= 0).all()
    assert (equal < 1e-5).all()


# Rows, reductions, chunks


@pytest.mark.parametrize("tail", TAILS)
def test_rows_that_do_not_count_may_hold_anything(way: str, tail: str) -> None:
    case = topk_case(8, labeled=True, tail=tail)
    assert case.target is not None
    assert case.topk is not None
    case.target[4], case.target[5] = -100, -1
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 3.0, 1.0])
    clean = check(case, backend=way, hard_weight=0.5, sample_weight=weight)
    assert case.tensors["student_hidden"] is not None
    case.tensors["student_hidden"][2], case.topk.log_probs[4] = math.nan, math.nan
    case.topk.ids[2], case.topk.ids[4] = 99, 3
    for reduction, budget in itertools.product(("mean", "none", "sum"), (1, THREE_ROWS, 1 << 30)):
        found = run(
            case, backend=way, hard_weight=0.5, sample_weight=weight, reduction=reduction, memory_budget=budget
        )  # fmt: skip
        assert all(grad.isfinite().all() for grad in found.grads.values())
        assert not found.grads["student_hidden"][[2, 4]].any()
        if reduction == "mean":
            torch.testing.assert_close(found.loss, clean.loss)
            torch.testing.assert_close(found.grads, clean.grads)


def test_a_row_that_is_no_distribution_leaves_the_others_alone(way: str) -> None:
    case = topk_case(5)
    clean = run(case, backend=way, reduction="none", wanted=("student_hidden",))
    assert case.topk is not None
    case.topk.log_probs[3, 1] = math.nan
    found = run(case, backend=way, reduction="none", wanted=("student_hidden",))
    rest = [0, 1, 2, 4]
    assert found.loss[3].isnan()
    assert found.grads["student_hidden"][3].isnan().all()
    torch.testing.assert_close(found.loss[rest], clean.loss[rest])
    torch.testing.assert_close(found.grads["student_hidden"][rest], clean.grads["student_hidden"][rest])


@pytest.mark.parametrize("upstream", [1.0, -0.75, torch.linspace(-1, 2, 7)], ids=["one", "a number", "a number a row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_upstream_gradient(way: str, upstream: float | Tensor, dtype: torch.dtype) -> None:
    reduction = "none" if isinstance(upstream, Tensor) else "mean"
    case = topk_case(labeled=True, dtype=dtype)
    check(case, backend=way, upstream=upstream, reduction=reduction, hard_weight=1.0, memory_budget=THREE_ROWS)


def test_one_batch_of_32_is_4_of_8(way: str) -> None:
    case = topk_case(32, labeled=True)
    assert case.target is not None
    assert case.topk is not None
    assert case.tensors["student_hidden"] is not None
    case.target[torch.tensor([1, 2, 3, 9, 30])] = -100
    whole = run(case, backend=way, hard_weight=0.5)
    loss, grads = torch.zeros(()), {name: torch.zeros_like(grad) for name, grad in whole.grads.items()}
    for start in range(0, 32, 8):
        rows = slice(start, start + 8)
        part = dataclasses.replace(
            case, tensors={**case.tensors, "student_hidden": case.tensors["student_hidden"][rows]},
            target=case.target[rows], topk=case.topk[rows],
        )  # fmt: skip
        made = run(part, backend=way, hard_weight=0.5, normalizer=27.0)
        loss += made.loss
        for name, grad in made.grads.items():
            (grads[name][rows] if name.endswith("hidden") else grads[name]).add_(grad)
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(grads, whole.grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(way: str, reduction: str) -> None:
    found = run(topk_case(0, labeled=True), backend=way, reduction=reduction, hard_weight=1.0)
    assert found.loss.shape == ((0,) if reduction == "none" else ())
    assert not found.loss.any()
    assert all(not grad.any() for grad in found.grads.values())


@pytest.mark.records
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_backward_twice_and_inputs_as_they_were(
    backend: str, reduction: str, dtype: torch.dtype, softcap: float | None
) -> None:
    """Gradients made in place must not reach what the caller holds, nor be scaled twice over one graph."""
    case = topk_case(dtype=dtype, student=(2.0, softcap))
    assert case.topk is not None
    t = {name: case.tensors[name].requires_grad_() for name in STUDENT}  # type: ignore[union-attr]
    held = {**t, "ids": case.topk.ids, "log_probs": case.topk.log_probs}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in held.items()}
    loss = tgt.linear_distillation_loss(
        **t, teacher_logits=case.topk, backend=backend, reduction=reduction, memory_budget=THREE_ROWS,
        **case.options(),
    )  # type: ignore[call-overload, misc]  # fmt: skip
    upstream = torch.linspace(0.5, 2.0, loss.numel()).reshape(loss.shape)
    first, second, third = (
        torch.autograd.grad(loss, list(t.values()), upstream * factor, retain_graph=True) for factor in (1.0, 1.0, 4.0)
    )
    for a, b, c in zip(first, second, third, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the first is scaled after rounding, not before
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
        torch.testing.assert_close(4 * b, c, rtol=tolerance, atol=tolerance * float(c.abs().max()))
    for name, tensor in held.items():
        assert torch.equal(tensor, before[name][0])
        assert tensor._version == before[name][1]


def test_a_second_derivative_needs_the_reference(native: str) -> None:
    case = topk_case(3, (5, 5), k=2, dtype=torch.float64)
    t = [case.tensors[name].requires_grad_() for name in STUDENT]  # type: ignore[union-attr]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, backend: str = "reference") -> Tensor:
        made: Tensor = tgt.linear_distillation_loss(
            hidden, weight, student_bias=bias, teacher_logits=case.topk, backend=backend
        )
        return made

    torch.autograd.gradcheck(loss, t)
    torch.autograd.gradgradcheck(loss, t)
    (slope,) = torch.autograd.grad(loss(*t, backend=native), t[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        slope.sum().backward()


def test_products_of_bf16_on_a_device(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a device, on a CPU, which has not yet run on a GPU."""
    monkeypatch.setattr(linear_heads, "casts_operands", lambda device: True)
    for tail, student in itertools.product(TAILS, ((1.0, None), (1.5, 30.0))):
        case = topk_case(128, (2000, 2000), k=16, dtype=torch.bfloat16, tail=tail, student=student)
        for budget in (1 << 18, 1 << 30):
            check(case, backend=native, memory_budget=budget)


# Doors, the machine


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", TAILS)
def test_both_doors_give_the_same_bits(native: str, reduction: str, tail: str) -> None:
    case = topk_case((2, 5), (27, 23), labeled=True, tail=tail, vocabulary={"vocab_size": 23})
    options: dict[str, Any] = {"hard_weight": 1.0, "reduction": reduction, "upstream": 0.5}
    direct = run(case, backend=native, **options)
    with Watched() as watched:
        dispatched = run(case, backend=native, **options)
    assert "tgt_fast::linear_distill_forward" in watched.seen
    assert torch.equal(direct.loss, dispatched.loss)
    assert all(torch.equal(direct.grads[name], dispatched.grads[name]) for name in STUDENT)


@pytest.mark.once("torch.compile")
def test_compiled_whole_it_is_the_same(native: str) -> None:
    """No graph break, and the same numbers, which no user would notice to be others."""
    case = topk_case((2, 5), labeled=True, temperature=2.0)
    assert case.topk is not None
    loss_fn = tgt.LinearDistillationLoss("jsd", temperature=2.0, hard_weight=0.5, student_softcap=5.0)

    def step(hidden: Tensor, weight: Tensor, topk: TeacherTopK, target: Tensor) -> Tensor:
        made: Tensor = loss_fn(hidden, weight, target=target, teacher_logits=topk)
        return made

    hidden, weight = case.tensors["student_hidden"], case.tensors["student_weight"]
    assert hidden is not None
    assert weight is not None
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves, case.topk, case.target)  # type: ignore[arg-type]
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chunks_stay_within_their_budget(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    allocate = memory.workspace

    def watched(self: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        taken.append(math.prod(shape) * dtype.itemsize)
        made: Tensor = allocate(shape, dtype)
        return made

    monkeypatch.setattr(linear_chunks.ChunkedLoss, "_empty", watched)
    run(topk_case(1000, (500, 500)), backend=native, memory_budget=1 << 20, wanted=("student_hidden",))
    assert 0.9 * (1 << 20) < sum(taken) <= 1 << 20


PEAK = """
    import json
    import torch
    import tgt_fast as tgt

    def peak():  # bytes; VmHWM counts this program alone, ru_maxrss would begin with its parent's
        with open("/proc/self/status") as lines:
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    torch.set_num_threads(2)
    rows, width, classes, k = 2048, 64, 32000, 64
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(classes, width) * 0.1).requires_grad_()
    ids = torch.rand(rows, 128).topk(k).indices * 250
    record = tgt.TeacherTopK(ids, torch.randn(rows, k).log_softmax(-1) - 0.1, None, 1.0, classes)

    def step(hidden, weight, record):
        tgt.linear_distillation_loss(hidden, weight, teacher_logits=record).backward()

    small = tgt.topk_teacher(torch.randn(8, 500), 4)
    step(torch.randn(8, width, requires_grad=True), torch.randn(500, width, requires_grad=True), small)
    before = peak()
    step(hidden, weight, record)
    assert weight.grad.isfinite().all() and hidden.grad.isfinite().all()
    print(json.dumps(peak() - before))
"""


def test_neither_sides_logits_are_ever_in_memory(native: str, child_environment: dict[str, str]) -> None:
    """2048 x 32000: logits in float32 are 250 MiB a side. A chunk's are 64 MiB, the gradients 9 MiB."""
    extra = child(PEAK, child_environment)
    assert 60 * MIB < extra < 110 * MIB


# Errors


@pytest.mark.parametrize(
    ("match", "error", "changed"),
    [
        (r"temperature is 1, but the record was taken at 2", ArgumentError, {"temperature": 1.0}),
        (r"teacher_temperature is 3, but the record", ArgumentError, {"teacher_temperature": 3.0}),
        (r"divergence must be one of .* with a top-k record, got 'tvd'", ArgumentError, {"divergence": "tvd"}),
        (r"teacher_softcap is given too", ArgumentError, {"teacher_softcap": 3.0}),
        (r"teacher_hidden is given too", ArgumentError, {"teacher_hidden": torch.zeros(4, 5)}),
        (r"student_weight has 9 classes, the record 11; pass vocab_size=", ShapeError, {"classes": 11}),
        (r"student_hidden \(4, 3\) and the record's log_probs \(5, 2\)", ShapeError, {"rows": 5}),
        (r"ids\[3, 1\] = 0 is listed twice in its row", ArgumentError, {"id": 0}),
        (r"ids\[3, 1\] = 9 is not in \[0, 9\)", ArgumentError, {"id": 9}),
    ],
)
def test_errors_name_both_values(native: str, match: str, error: type[Exception], changed: dict[str, Any]) -> None:
    changed = dict(changed)
    ids = torch.arange(2).repeat(changed.pop("rows", 4), 1)
    ids[3, 1] = changed.pop("id", 1)
    topk = TeacherTopK(ids, torch.full(ids.shape, -2.0), None, 2.0, changed.pop("classes", 9))
    for backend in (native, "reference"):
        with pytest.raises(error, match="^linear_distillation_loss: .*" + match):
            tgt.linear_distillation_loss(
                torch.zeros(4, 3), torch.zeros(9, 3), **{"temperature": 2.0, "teacher_logits": topk, **changed},
                backend=backend, memory_budget=1,
            )  # fmt: skip


def test_a_backend_without_a_kernel_for_records_says_so(interpreted: str) -> None:
    with pytest.raises(BackendError, match="no Triton kernels for top-k records"):
        run(topk_case(), backend=interpreted)


def test_the_module_takes_records() -> None:
    case = topk_case((2, 4), (27, 23), labeled=True, temperature=2.0, vocabulary={"vocab_size": 23})
    module = tgt.LinearDistillationLoss(temperature=2.0, hard_weight=0.5, vocab_size=23)
    t = {name: case.tensors[name] for name in STUDENT}
    found = module(**t, teacher_logits=case.topk, target=case.target)
    assert torch.equal(found, run(case, temperature=2.0, hard_weight=0.5, wanted=()).loss)
    soft = module.soft(**t, teacher_logits=case.topk)
    assert torch.equal(soft, run(dataclasses.replace(case, target=None), temperature=2.0, wanted=()).loss)
