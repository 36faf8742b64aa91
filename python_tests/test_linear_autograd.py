"""The loss from hidden states in autograd and on the machine: backward twice, paths, precision, streams, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import NAMES, Heads, assert_matches, check, heads, run, truth
from numerics import threads
from test_distill_machine import MIB, child
from test_registration import Watched
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, BackendError, DTypeError, ShapeError
from tgt_fast.kernels import linear_chunks

SMALL = 3 * 4 * 23 * 4  # bytes: three rows a chunk


def leaves(case: Heads) -> dict[str, Any]:
    return {n: None if x is None else x.detach().clone().requires_grad_() for n, x in case.tensors.items()}


# Backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_backward_twice_and_inputs_as_they_were(
    backend: str, reduction: str, dtype: torch.dtype, softcap: float | None
) -> None:
    """Gradients made in place must not reach what the caller holds, nor be scaled twice over one graph."""
    case = heads(dtypes=(dtype, dtype), student=(2.0, softcap))
    t = leaves(case)
    before = {name: tensor.detach().clone() for name, tensor in t.items()}
    versions = {name: tensor._version for name, tensor in t.items()}
    loss = tgt.linear_distillation_loss(
        **t, backend=backend, reduction=reduction, memory_budget=SMALL, **case.options()
    )  # type: ignore[call-overload]
    upstream = torch.linspace(0.5, 2.0, loss.numel()).reshape(loss.shape)
    first, second, third = (
        torch.autograd.grad(loss, list(t.values()), upstream * factor, retain_graph=True) for factor in (1.0, 1.0, 4.0)
    )
    for name, a, b, c in zip(NAMES, first, second, third, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the first is scaled after rounding, not before
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
        torch.testing.assert_close(4 * b, c, rtol=tolerance, atol=tolerance * float(c.abs().max()))
        assert torch.equal(t[name], before[name])
        assert t[name]._version == versions[name]


@pytest.mark.parametrize("upstream", [1.0, -0.75, torch.linspace(-1, 2, 7)], ids=["one", "a number", "a number a row"])
@pytest.mark.parametrize("wanted", [NAMES, ("student_hidden", "teacher_hidden")], ids=["all", "hidden"])
def test_any_upstream_gradient(native: str, upstream: float | Tensor, wanted: tuple[str, ...]) -> None:
    reduction = "none" if isinstance(upstream, Tensor) else "mean"
    check(
        heads(labeled=True), backend=native, upstream=upstream, reduction=reduction, wanted=wanted, hard_weight=1.0,
        memory_budget=SMALL,
    )  # fmt: skip


def test_a_gradient_of_one_is_handed_out_unscaled(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in forward, once: backward runs no product, and no pass over the gradients."""
    t = leaves(heads())
    loss = tgt.linear_distillation_loss(**t, backend=native)  # type: ignore[call-overload]
    monkeypatch.setattr(linear_chunks, "ChunkedLoss", None)
    made = [grad for grad in loss.grad_fn.ready if grad is not None]
    grads = torch.autograd.grad(loss, list(t.values()))
    assert [grad.data_ptr() for grad in grads] == [grad.data_ptr() for grad in made]


@pytest.mark.parametrize("way", ["native", "reference"])
def test_float16_gradients_do_not_underflow(native: str, way: str) -> None:
    """A mean over very many rows: its gradients are lost in float16 unless the loss scale comes first."""
    case = heads(70, (50, 50), dtypes=(torch.float16, torch.float16), biased=False)
    rows, scale = 2.0**23, 2.0**16
    found = run(case, backend=way, upstream=scale, normalizer=rows)
    expected = truth(case, upstream=scale, normalizer=rows)
    assert_matches(case, found, expected, per_row=scale / rows)
    late = run(case, backend=way, normalizer=rows)
    for name, grad in late.grads.items():
        late.grads[name] = grad * scale
        with pytest.raises(AssertionError, match=name):
            assert_matches(case, late, expected, per_row=scale / rows)
        late.grads[name] = found.grads[name]


def test_a_second_derivative_is_an_error_that_names_the_reference(native: str) -> None:
    t = leaves(heads())
    for reduction in ("mean", "none"):
        loss = tgt.linear_distillation_loss(**t, backend=native, reduction=reduction).sum()  # type: ignore[call-overload]
        (slope,) = torch.autograd.grad(loss, t["student_weight"], create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
            slope.sum().backward()


def test_a_teacher_from_inference_mode(native: str) -> None:
    case = heads(labeled=True)
    plain = run(case, backend=native, hard_weight=1.0, wanted=("student_hidden",))
    with torch.inference_mode():
        for name in NAMES[3:]:
            tensor = case.tensors[name]
            assert tensor is not None
            case.tensors[name] = tensor.clone()
    t = {n: x if n in NAMES[3:] or x is None else x.requires_grad_() for n, x in case.tensors.items()}
    loss = tgt.linear_distillation_loss(target=case.target, **t, backend=native, hard_weight=1.0)  # type: ignore[call-overload, misc]
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, t["student_hidden"], retain_graph=True)  # type: ignore[list-item]
        torch.testing.assert_close(grad, plain.grads["student_hidden"])


def test_the_gradient_reaches_a_latent_through_frozen_heads(backend: str) -> None:
    z = torch.randn(4, 3, requires_grad=True)
    student, teacher = nn.Linear(3, 9).requires_grad_(False), nn.Linear(3, 9).requires_grad_(False)
    args = (z, student.weight, z, teacher.weight)
    loss = tgt.linear_distillation_loss(*args, student_bias=student.bias, teacher_bias=teacher.bias, backend=backend)
    (found,) = torch.autograd.grad(loss, z)
    dense = tgt.distillation_loss(student(z), teacher(z), backend="reference")
    torch.testing.assert_close(found, torch.autograd.grad(dense, z)[0])


# Doors, modes, the machine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_doors_give_the_same_bits(native: str, dtype: torch.dtype, reduction: str) -> None:
    case = heads((2, 5), (23, 27), dtypes=(dtype, dtype), labeled=True, vocabulary={"vocab_size": 22})
    assert case.target is not None
    case.target.clamp_(max=21)
    options: dict[str, Any] = {"hard_weight": 1.0, "reduction": reduction, "return_stats": True, "upstream": 0.5}
    direct = run(case, backend=native, **options)
    with Watched() as watched:
        dispatched = run(case, backend=native, **options)
    assert "tgt_fast::linear_distill_forward" in watched.seen
    assert torch.equal(direct.loss, dispatched.loss)
    assert all(torch.equal(a, b) for a, b in zip(direct.stats, dispatched.stats, strict=True))
    assert all(torch.equal(direct.grads[name], dispatched.grads[name]) for name in NAMES)


@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_autocast_leaves_precision_alone(backend_name: str) -> None:
    case = heads(dtypes=(torch.float32, torch.bfloat16))
    plain = run(case, backend=backend_name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(case, backend=backend_name)
        with Watched():
            dispatched = run(case, backend=backend_name)
    for other in (inside, dispatched):
        assert torch.equal(plain.loss, other.loss)
        assert all(torch.equal(plain.grads[name], other.grads[name]) for name in NAMES)


def test_same_bits_from_run_to_run(native: str) -> None:
    case = heads(97, (1999, 1999), (40, 24), labeled=True, student=(1.0, 9.0))
    first, second = (run(case, backend=native, hard_weight=0.5, memory_budget=MIB) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in NAMES)


def test_transforms_go_to_the_formula() -> None:
    t = [x.detach() for x in heads().tensors.values() if x is not None]

    def loss(a: Tensor, b: Tensor, backend: str = "auto") -> Tensor:
        made: Tensor = tgt.linear_distillation_loss(a, b, t[3], t[4], backend=backend)
        return made

    each = torch.stack([loss(x, t[1]) for x in (t[0], 2 * t[0])])
    torch.testing.assert_close(torch.vmap(loss, (0, None))(torch.stack([t[0], 2 * t[0]]), t[1]), each)
    slope = torch.func.grad(loss)(t[0], t[1])
    leaf = t[0].clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(loss(leaf, t[1]), leaf)[0])
    with pytest.raises(BackendError, match="backend='reference'"):
        torch.vmap(lambda x: loss(x, t[1], "native"))(t[0][None])


class FakeStream:
    """A second stream that runs at once, and writes down who waits for whom."""

    log: list[str]

    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        assert event.recorded, "waits for what nobody recorded"
        self.log.append(f"{self.name} waits for an event of {event.recorded}")


class FakeEvent:
    recorded = ""

    def record(self, stream: FakeStream) -> None:
        self.recorded = stream.name


@pytest.mark.parametrize("rows", [1, 3, 7, 12])
@pytest.mark.parametrize("given", [False, True])
def test_chunks_made_ahead(native: str, rows: int, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the second stream, which has not yet run on a GPU: made ahead in two slots, equal results."""
    case = heads(rows, (23, 27), given=given, student=(1.0, 3.0), vocabulary={"vocab_size": 22})
    budget = 2 * 4 * 4 * 23 * 4
    plain = run(case, backend=native, memory_budget=budget)
    log: list[str] = []
    monkeypatch.setattr(FakeStream, "log", log, raising=False)
    main = FakeStream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(linear_chunks, "overlaps", lambda device: True)
    ahead = run(case, backend=native, memory_budget=budget)
    torch.testing.assert_close(ahead.loss, plain.loss)
    torch.testing.assert_close(ahead.grads, plain.grads)
    if rows == 12:
        assert log[0] == "side waits for main"
        assert log[-1] == "main waits for side"
        assert "side waits for an event of main" in log


PEAK = """
    import json, sys
    import torch, torch.nn.functional as F
    import tgt_fast as tgt

    def peak():  # bytes; VmHWM counts this program alone, ru_maxrss would begin with its parent's
        with open("/proc/self/status") as lines:
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    torch.set_num_threads(2)
    rows, hidden, classes = 1536, 64, 32000
    x, z = torch.randn(2, rows, hidden).unbind(0)
    weight, other = (torch.randn(2, classes, hidden) * 0.06).unbind(0)
    x.requires_grad_(); weight.requires_grad_()
    target = torch.randint(0, classes, (rows,))

    def step(x, weight, z, other, target, ours):
        if ours:
            loss = tgt.linear_distillation_loss(x, weight, z, other, target, hard_weight=1.0)
        else:
            student = x @ weight.T
            log_q, log_p = F.log_softmax(student, -1), F.log_softmax(z @ other.T, -1)
            loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) + F.cross_entropy(student, target)
        loss.backward()

    ours = {ours}
    step(x[:8].detach().requires_grad_(), weight[:64].detach().requires_grad_(), z[:8], other[:64], target[:8] % 64,
         ours)
    before = peak()
    step(x, weight, z, other, target, ours)
    assert weight.grad is not None and weight.grad.isfinite().all()
    print(json.dumps(peak() - before))
"""


def test_extra_memory_is_a_tenth_of_eager(native: str, child_environment: dict[str, str]) -> None:
    """At 1536 x 64 x 32000 in float32, the gradients themselves (8.6 MB on both sides) included."""
    ours, eager = (child(PEAK.format(ours=flag), child_environment) for flag in (True, False))
    assert 8 * MIB < ours < 130 * MIB
    assert ours < eager / 10


# Errors


def fails(error: type[Exception], match: str, **changed: Any) -> None:
    t: dict[str, Any] = {
        "student_hidden": torch.zeros(4, 3), "student_weight": torch.zeros(9, 3), "teacher_hidden": torch.zeros(4, 5),
        "teacher_weight": torch.zeros(9, 5),
    }  # fmt: skip
    t |= changed
    with pytest.raises(error, match=match) as caught:
        tgt.linear_distillation_loss(**t)
    assert str(caught.value).startswith("linear_distillation_loss: ")


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "hidden sizes": (
        ShapeError, r"student_hidden \(4, 2\) and student_weight \(9, 3\)", {"student_hidden": torch.zeros(4, 2)},
    ),
    "weight": (
        ShapeError, r"teacher_hidden \(4, 5\) and teacher_weight \(9,\)", {"teacher_weight": torch.zeros(9)},
    ),
    "bias": (ShapeError, r"student_bias \(1,\) must be \(9,\)", {"student_bias": torch.zeros(1)}),
    "rows": (
        ShapeError, r"student_hidden \(4, 3\) and teacher_hidden \(6, 5\)", {"teacher_hidden": torch.zeros(6, 5)},
    ),
    "classes": (
        ShapeError, r"9 classes, teacher_weight 11; pass vocab_size=.*vocab_map=",
        {"teacher_weight": torch.zeros(11, 5)},
    ),
    "vocab_size": (ShapeError, r"9 classes, teacher_weight 9; vocab_size=10", {"vocab_size": 10}),
    "map's shape": (
        ShapeError, r"vocab_map has shape \(3,\), but teacher_weight has 9", {"vocab_map": torch.zeros(3).long()},
    ),
    "mask's shape": (
        ShapeError, r"vocab_mask has shape \(3,\), but student_weight has 9", {"vocab_mask": torch.ones(3).bool()},
    ),
    "mask's dtype": (DTypeError, "vocab_mask must be bool, got torch.int64", {"vocab_mask": torch.ones(9).long()}),
    "map's dtype": (DTypeError, "vocab_map must hold integer", {"vocab_map": torch.ones(9)}),
    "map twice": (
        ArgumentError, r"vocab_map\[0\] and vocab_map\[4\] both name class 0", {"vocab_map": torch.arange(9) % 4},
    ),
    "map's range": (ArgumentError, r"vocab_map\[8\] = 9 is not in \[0, 9\)", {"vocab_map": torch.arange(9) + 1}),
    "map and size": (ArgumentError, "vocab_size=3 and vocab_map", {"vocab_map": torch.arange(9), "vocab_size": 3}),
    "no teacher": (ArgumentError, "got neither", {"teacher_hidden": None, "teacher_weight": None}),
    "half a teacher": (ArgumentError, "got only one", {"teacher_weight": None}),
    "two teachers": (
        ArgumentError, "teacher_hidden, teacher_weight is given too", {"teacher_logits": torch.zeros(4, 9)},
    ),
    "scale of logits": (
        ArgumentError, "teacher_scale=2, teacher_softcap is given too",
        {"teacher_hidden": None, "teacher_weight": None, "teacher_logits": torch.zeros(4, 9), "teacher_scale": 2.0,
         "teacher_softcap": 3.0},
    ),
    "softcap": (ArgumentError, "student_softcap must be finite and in", {"student_softcap": 0.0}),
    "scale": (ArgumentError, "teacher_scale must be finite and in", {"teacher_scale": math.inf}),
    "budget": (ArgumentError, "memory_budget must be in", {"memory_budget": 0}),
    "integers": (DTypeError, "student_weight must be float64", {"student_weight": torch.zeros(9, 3).long()}),
    "target": (
        ArgumentError, r"target\[2\] = 9 is not in \[0, 9\)",
        {"target": torch.tensor([0, 1, 9, 2]), "hard_weight": 1.0},
    ),
    "padded target": (
        ArgumentError, r"target\[2\] = 8 is not in \[0, 8\)",
        {"target": torch.tensor([0, 1, 8, 2]), "hard_weight": 1.0, "vocab_size": 8},
    ),
    "target's shape": (
        ShapeError, r"target \(3,\) does not match", {"target": torch.zeros(3).long(), "hard_weight": 1.0},
    ),
    "weight's value": (
        ArgumentError, r"sample_weight\[1\] = -1", {"sample_weight": torch.tensor([1.0, -1.0, 1.0, 1.0])},
    ),
    "divergence": (ArgumentError, "divergence must be one of", {"divergence": "kl"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_both_values(name: str) -> None:
    error, match, changed = ERRORS[name]
    fails(error, match, **changed)


def test_the_loss_on_logits_says_how_to_align() -> None:
    with pytest.raises(ShapeError, match=r"5 classes, teacher_logits 6; tgt_fast.align_logits"):
        tgt.distillation_loss(torch.zeros(2, 5), torch.zeros(2, 6))


# The module


def test_the_module_is_the_function() -> None:
    case = heads((2, 4), (23, 16), labeled=True, vocabulary={"vocab_map": torch.arange(16) + 3})
    case.target = torch.full((2, 4), 5)
    options: dict[str, Any] = {"divergence": "jsd", "temperature": 2.0, "student_softcap": 5.0, "hard_weight": 0.5}
    module = tgt.LinearDistillationLoss(**options, **case.vocabulary, memory_budget=SMALL)
    case.student = (1.0, 5.0)
    options.pop("student_softcap")
    expected = run(case, wanted=(), memory_budget=SMALL, **options).loss
    assert torch.equal(module(target=case.target, **case.tensors), expected)
    soft = run(Heads(case.tensors, case.student, vocabulary=case.vocabulary), **{**options, "hard_weight": 0.0})
    torch.testing.assert_close(module.soft(**case.tensors), soft.loss)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert "student_softcap=5.0, memory_budget" in repr(module)
    assert "vocab_map=..." in repr(module)


def test_the_module_refuses_what_the_function_refuses() -> None:
    makers: list[Callable[[], Any]] = [
        lambda: tgt.LinearDistillationLoss("kl"),
        lambda: tgt.LinearDistillationLoss(student_softcap=-1.0),
        lambda: tgt.LinearDistillationLoss(vocab_size=0),
    ]
    for make in makers:
        with pytest.raises(ArgumentError, match=r"^linear_distillation_loss: "):
            make()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_threads_hardly_matters(native: str, count: int) -> None:
    """The row kernel's bits do not depend on it; PyTorch's product may sum in another order."""
    case = heads(40, (500, 500))
    with threads(1):
        one = run(case, backend=native)
    with threads(count):
        many = run(case, backend=native)
    torch.testing.assert_close(many.loss, one.loss)
    for name, (grad, other) in itertools.chain((n, (one.grads[n], many.grads[n])) for n in NAMES):
        torch.testing.assert_close(grad, other, msg=name)
