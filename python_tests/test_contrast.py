"""The contrastive loss: value and gradients against a float64 truth that cuts out what does not exist."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import Outcome
from numerics import arithmetic_bar, assert_close, gradient_bar, magnitude
from strategies import DTYPES
from test_distill_machine import MIB, child
from test_registration import Watched
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, BackendError, DTypeError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.options import DIVERGENCES, DistillOptions
from tgt_fast.kernels.reference import distillation_loss as reference_loss

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("student_q", "student_d", "teacher_q", "teacher_d")
THREE_ROWS = 3 * 3 * 11 * 4  # bytes: at most three queries a chunk
contrastive: Callable[..., Any] = tgt.contrastive_distillation_loss


@dataclass
class Towers:
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    positives: Tensor | None = None
    passage_ids: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["student_q"].shape[0], self.tensors["student_d"].shape[0]


def towers(
    queries: int = 7, passages: int = 11, hidden: tuple[int, int] = (8, 6), *, seed: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32), **options: Any,
) -> Towers:  # fmt: skip
    """Random towers whose second queries' scores are peaked: flat rows alone hide errors of large probabilities."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for side, width, dtype in zip(("student", "teacher"), hidden, dtypes, strict=True):
        for kind, rows in (("q", queries), ("d", passages)):
            vectors = torch.randn(rows, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
            vectors[1::2] *= 3.0 if kind == "q" else 1.0
            made[f"{side}_{kind}"] = vectors.to(dtype)
    positives, ids = options.pop("positives", None), options.pop("passage_ids", None)
    return Towers(made, {"temperature": 0.3, "teacher_temperature": 0.7} | options, positives, ids)


def run(case: Towers, *, backend: str, upstream: Tensor | float = 1.0, wanted: tuple[str, ...] = NAMES) -> Outcome:
    t = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in case.tensors.items()}
    out = contrastive(
        **t, positives=case.positives, passage_ids=case.passage_ids, backend=backend, **case.options
    )  # fmt: skip
    loss, stats = out if isinstance(out, tuple) else (out, None)
    upstream = torch.as_tensor(upstream).to(loss.dtype).expand_as(loss)
    grads = torch.autograd.grad(loss, [t[name] for name in wanted], upstream) if wanted else ()
    return Outcome(loss.detach(), dict(zip(wanted, grads, strict=True)), stats)


def truth(case: Towers, *, upstream: Tensor | float = 1.0) -> Outcome:
    """Query by query, over the passages that exist for it and no others; nothing is masked."""
    t = {name: tensor.double().requires_grad_() for name, tensor in case.tensors.items()}
    options = dict(case.options)
    for name in ("memory_budget", "return_stats"):
        options.pop(name, None)
    temperature = options.pop("temperature")
    teacher_temperature = options.pop("teacher_temperature", None) or temperature
    weight, normalizer, reduction = (options.pop(name, None) for name in ("sample_weight", "normalizer", "reduction"))
    student = t["student_q"] @ t["student_d"].T / temperature
    teacher = t["teacher_q"] @ t["teacher_d"].T / teacher_temperature
    queries, passages = case.shape
    positives = case.positives
    if positives is None and (options.get("hard_weight") or case.passage_ids is not None):
        positives = torch.arange(queries)
    losses, counted = [], 0.0
    for row in range(queries):
        own = -1 if positives is None else int(positives[row])
        factor = 1.0 if weight is None else float(weight[row])
        if own == -100 or factor == 0:
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        kept = [
            j for j in range(passages)
            if case.passage_ids is None or own < 0 or j == own or case.passage_ids[j] != case.passage_ids[own]
        ]  # fmt: skip
        target = torch.tensor([kept.index(own) if own >= 0 else -1]) if options.get("hard_weight") else None
        loss, _ = reference_loss(
            student[row, kept][None], teacher[row, kept][None], target, None, None,
            DistillOptions(reduction="sum", **options),
        )  # fmt: skip
        losses.append(factor * loss)
        counted += factor
    total = torch.stack(losses)
    if reduction == "sum":
        total = total.sum()
    elif reduction is None:
        total = total.sum() / (counted if normalizer is None else normalizer)
    grads = torch.autograd.grad(total, list(t.values()), torch.as_tensor(upstream).double().expand_as(total))
    return Outcome(total.detach(), dict(zip(NAMES, grads, strict=True)))


def assert_matches(case: Towers, found: Outcome, expected: Outcome, *, per_row: float) -> None:
    """Loss and gradients within the bars of their dtypes. ``per_row``: the upstream gradient that a query sees."""
    is_fp64 = any(x.dtype == torch.float64 for x in case.tensors.values())
    dtype = torch.float64 if is_fp64 else torch.float32
    t = {name: tensor.double() for name, tensor in case.tensors.items()}
    temperature = case.options["temperature"]
    teacher_temperature = case.options.get("teacher_temperature") or temperature
    largest = magnitude(
        t["student_q"] @ t["student_d"].T / temperature, t["teacher_q"] @ t["teacher_d"].T / teacher_temperature
    )
    rows = math.sqrt(case.shape[0])
    floor = 1e-2 * rows * per_row
    assert found.loss.dtype == dtype
    assert_close("loss", found.loss, expected.loss, bar=arithmetic_bar(dtype, largest), floor=floor)
    for name, grad in found.grads.items():
        reference = expected.grads[name]
        assert grad.dtype == case.tensors[name].dtype
        small = floor / (temperature if name.startswith("student") else teacher_temperature)
        bar = gradient_bar(grad.dtype, dtype, largest, reference, small)
        assert_close(name, grad, reference, bar=bar, floor=small)


def check(case: Towers, *, backend: str, upstream: Tensor | float = 1.0) -> Outcome:
    found, expected = run(case, backend=backend, upstream=upstream), truth(case, upstream=upstream)
    assert_matches(case, found, expected, per_row=1.0 / case.shape[0])
    return found


@pytest.fixture(params=["formula", "native", "reference rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The value of ``backend``: the formula itself, chunks on the compiled kernel, chunks on the reference's rows."""
    if request.param == "formula":
        return "reference"
    if request.param == "native":
        return str(request.getfixturevalue("native"))
    monkeypatch.setattr(select, "choose", lambda op, backend, tensors: "reference")
    return "auto"


# Value and gradients

COPIES = torch.tensor([0, 1, 2, 3, 3, 5, 6, 0, 0, 9, 6])  # passages 3 and 4 are copies, each a query's own one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(way: str, divergence: str, dtype: torch.dtype) -> None:
    for extra in ({}, {"hard_weight": 0.5, "label_smoothing": 0.1, "passage_ids": COPIES}):
        case = towers(dtypes=(dtype, dtype), divergence=divergence, memory_budget=THREE_ROWS, **extra)
        check(case, backend=way)


def test_the_formula_from_pytorch_itself(way: str) -> None:
    """Temperatures divide the scores, and nothing is multiplied by their square."""
    case = towers(9, 9, dtypes=(torch.float64, torch.float64), hard_weight=0.25)
    t = case.tensors
    student, teacher = t["student_q"] @ t["student_d"].T / 0.3, t["teacher_q"] @ t["teacher_d"].T / 0.7
    expected = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    expected = expected + 0.25 * F.cross_entropy(student, torch.arange(9))
    torch.testing.assert_close(run(case, backend=way, wanted=()).loss, expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("budget", [1, THREE_ROWS, 1 << 30], ids=["one query", "three queries", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("passage_ids", [None, COPIES], ids=["all", "copies"])
def test_any_chunk_and_reduction(way: str, reduction: str, budget: int, passage_ids: Tensor | None) -> None:
    case = towers(hard_weight=1.0, memory_budget=budget, reduction=reduction, passage_ids=passage_ids)
    if reduction == "mean":
        del case.options["reduction"]
    upstream = torch.linspace(-1.0, 2.0, 7) if reduction == "none" else -0.75
    found, expected = run(case, backend=way, upstream=upstream), truth(case, upstream=upstream)
    assert_matches(case, found, expected, per_row=1.0 / 7 if reduction == "mean" else 1.0)


# One query, one passage; more passages than queries; rows that are all their own; no query at all.
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 4), (3, 70), (0, 3)])
def test_shapes(way: str, shape: tuple[int, int]) -> None:
    case = towers(*shape, hard_weight=1.0)
    if shape[0]:
        check(case, backend=way)
        return
    found = run(case, backend=way)
    assert found.loss.item() == 0.0
    assert all(not grad.any() and grad.shape == case.tensors[name].shape for name, grad in found.grads.items())


@pytest.mark.parametrize("dtypes", [(a, b) for a, b in itertools.product(DTYPES, repeat=2) if a != b], ids=str)
def test_dtypes_may_differ(native: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(towers(dtypes=dtypes, memory_budget=THREE_ROWS), backend=native)


@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
@pytest.mark.parametrize("passage_ids", [None, COPIES], ids=["all", "copies"])
def test_queries_without_a_passage_and_queries_that_do_not_count(
    way: str, hard_weight: float, passage_ids: Tensor | None
) -> None:
    positives = torch.tensor([10, -1, 3, -100, 4, 4, 0], dtype=torch.int32)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 1.0])
    options: dict[str, Any] = {"hard_weight": hard_weight, "passage_ids": passage_ids, "positives": positives}
    check(towers(**options, memory_budget=THREE_ROWS), backend=way)
    check(towers(**options, sample_weight=weight), backend=way)
    case = towers(**options, sample_weight=weight)
    expected = truth(case)
    for row, name in itertools.product((3, 4), ("student_q", "teacher_q")):
        case.tensors[name][row] = math.nan  # dropped whatever they hold
    found = run(case, backend=way)
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for name, grad in found.grads.items():
        torch.testing.assert_close(grad.double(), expected.grads[name], rtol=1e-4, atol=1e-5)


def test_copies_of_a_passage_get_no_probability(way: str) -> None:
    """With ids a second copy changes nothing, and gets no gradient; without, it does."""
    case = towers(5, 5, hard_weight=1.0)
    plain = run(case, backend=way)
    doubled = towers(5, 5, hard_weight=1.0)
    for name in ("student_d", "teacher_d"):
        doubled.tensors[name] = torch.cat([case.tensors[name], case.tensors[name]])
    unmarked = run(doubled, backend=way)
    assert unmarked.loss > plain.loss + 0.1
    # Copies of the own passage vanish. Those of others stay: each is one wrong answer more, and just as wrong.
    doubled.passage_ids = torch.arange(5).repeat(2)
    marked = run(doubled, backend=way)
    assert plain.loss < marked.loss < unmarked.loss
    alone = towers(1, 1, hard_weight=1.0)
    for name in ("student_d", "teacher_d"):
        alone.tensors[name] = alone.tensors[name].repeat(3, 1)
    alone.passage_ids = torch.zeros(3, dtype=torch.int64)
    found = run(alone, backend=way)
    assert found.loss.item() == 0.0
    assert all(not grad.any() for grad in found.grads.values())


def test_the_comparison_fails_for_wrong_results(native: str) -> None:
    case = towers(hard_weight=1.0, passage_ids=COPIES)
    found, expected = run(case, backend=native), truth(case)
    for name in ("loss", *NAMES):
        for factor in (0.0, 1.05):
            wrong = Outcome(found.loss, dict(found.grads))
            if name == "loss":
                wrong.loss = found.loss * factor
            else:
                wrong.grads[name] = found.grads[name] * factor
            with pytest.raises(AssertionError, match=name):
                assert_matches(case, wrong, expected, per_row=1.0 / 7)
    for changed in ({"passage_ids": None}, {"temperature": 0.31}, {"teacher_temperature": 0.6}, {"hard_weight": 0.9}):
        with pytest.raises(AssertionError):
            assert_matches(
                case, run(towers(**{"hard_weight": 1.0, "passage_ids": COPIES} | changed), backend=native),
                expected, per_row=1.0 / 7,
            )  # fmt: skip


def test_gradcheck_of_the_meaning() -> None:
    case = towers(3, 5, (3, 2), dtypes=(torch.float64, torch.float64), passage_ids=torch.tensor([0, 1, 2, 0, 7]))

    def loss(*tensors: Tensor) -> Tensor:
        made: Tensor = contrastive(
            *tensors, passage_ids=case.passage_ids, hard_weight=1.0, backend="reference", **case.options
        )
        return made

    inputs = [x.requires_grad_() for x in case.tensors.values()]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_subsets_of_gradients(native: str) -> None:
    case = towers(hard_weight=1.0)
    everything = run(case, backend=native)
    for wanted in itertools.chain.from_iterable(itertools.combinations(NAMES, n) for n in range(5)):
        found = run(case, backend=native, wanted=wanted)
        assert torch.equal(found.loss, everything.loss)
        assert all(torch.equal(grad, everything.grads[name]) for name, grad in found.grads.items())


def test_statistics(way: str) -> None:
    case = towers(return_stats=True, memory_budget=THREE_ROWS)
    t = {name: tensor.double() for name, tensor in case.tensors.items()}
    student, teacher = t["student_q"] @ t["student_d"].T / 0.3, t["teacher_q"] @ t["teacher_d"].T / 0.7
    stats = run(case, backend=way).stats
    assert torch.equal(stats.agreement, student.argmax(1) == teacher.argmax(1))
    torch.testing.assert_close(stats.student_lse.double(), student.logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.teacher_lse.double(), teacher.logsumexp(1), rtol=1e-5, atol=1e-5)


# Doors, modes, the machine


def test_both_doors_give_the_same_bits(native: str) -> None:
    case = towers(hard_weight=1.0, passage_ids=COPIES, return_stats=True, memory_budget=THREE_ROWS)
    direct = run(case, backend=native)
    with Watched() as watched:
        dispatched = run(case, backend=native)
    assert "tgt_fast::linear_distill_forward" in watched.seen
    assert torch.equal(direct.loss, dispatched.loss)
    assert all(torch.equal(a, b) for a, b in zip(direct.stats, dispatched.stats, strict=True))
    assert all(torch.equal(direct.grads[name], dispatched.grads[name]) for name in NAMES)


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("passage_ids", [None, COPIES], ids=["all", "copies"])
def test_compiled(native: str, passage_ids: Tensor | None) -> None:
    case = towers(passage_ids=passage_ids)

    def loss(*tensors: Tensor) -> Tensor:
        made: Tensor = contrastive(*tensors, passage_ids=passage_ids, hard_weight=0.5, **case.options)
        return made

    inputs = [x.requires_grad_() for x in case.tensors.values()]
    function: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, theirs = function(*inputs), loss(*inputs)
    assert torch.equal(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_name_the_reference(native: str) -> None:
    case = towers()
    t = {name: tensor.requires_grad_() for name, tensor in case.tensors.items()}
    (slope,) = torch.autograd.grad(contrastive(**t, **case.options), t["student_q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        slope.sum().backward()


PEAK = """
    import json, torch, tgt_fast as tgt
    torch.manual_seed(0); torch.set_num_threads(1)

    def peak():  # bytes; VmHWM counts this program alone, ru_maxrss would begin with its parent's
        lines = open("/proc/self/status").read().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

    def step(n, m, ours):
        q, d, tq, td = (torch.randn(r, 64) / 8 for r in (n, m, n, m))
        q.requires_grad_(); d.requires_grad_()
        if ours:
            loss = tgt.contrastive_distillation_loss(
                q, d, tq, td, temperature=0.1, hard_weight=1.0, passage_ids=torch.arange(m) % 4000,
                memory_budget=16 << 20)
        else:
            s, t = q @ d.T / 0.1, tq @ td.T / 0.1
            loss = torch.nn.functional.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
            loss = loss + torch.nn.functional.cross_entropy(s, torch.arange(n))
        loss.backward()

    step(8, 64, {ours})
    before = peak()
    step(4096, 8192, {ours})
    print(json.dumps(peak() - before))
"""


def test_no_scores_are_kept_beyond_a_chunk(native: str, child_environment: dict[str, str]) -> None:
    """4096 x 8192 scores take 128 MiB in float32, and eager PyTorch keeps several such; a chunk of them 16."""
    ours, eager = (child(PEAK.format(ours=flag), child_environment) for flag in (True, False))
    assert ours < 64 * MIB
    assert eager > 3 * 128 * MIB


# Errors


def fails(error: type[Exception], match: str, **changed: Any) -> None:
    t: dict[str, Any] = {
        "student_q": torch.zeros(4, 3), "student_d": torch.zeros(6, 3), "teacher_q": torch.zeros(4, 5),
        "teacher_d": torch.zeros(6, 5), "temperature": 1.0,
    }  # fmt: skip
    t |= changed
    with pytest.raises(error, match=match) as caught:
        contrastive(**t)
    assert str(caught.value).startswith("contrastive_distillation_loss: ")


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "width": (ShapeError, r"student_q \(4, 2\) and student_d \(6, 3\)", {"student_q": torch.zeros(4, 2)}),
    "queries": (ShapeError, r"student_q \(4, 3\) and teacher_q \(5, 5\)", {"teacher_q": torch.zeros(5, 5)}),
    "passages": (ShapeError, r"student_d \(6, 3\) and teacher_d \(7, 5\)", {"teacher_d": torch.zeros(7, 5)}),
    "no passage": (
        ShapeError, "must be a passage", {"student_d": torch.zeros(0, 3), "teacher_d": torch.zeros(0, 5)},
    ),
    "dimensions": (ShapeError, r"teacher_q must be \(rows, H\)", {"teacher_q": torch.zeros(1, 4, 5)}),
    "dtype": (DTypeError, "student_d", {"student_d": torch.zeros(6, 3, dtype=torch.int64)}),
    "temperature": (ArgumentError, r"temperature must be .*got 0", {"temperature": 0.0}),
    "teacher_temperature": (ArgumentError, r"teacher_temperature .*got -1", {"teacher_temperature": -1}),
    "too few passages": (
        ArgumentError, "4 queries and 3 passages",
        {"student_d": torch.zeros(3, 3), "teacher_d": torch.zeros(3, 5), "hard_weight": 1.0},
    ),
    "positives' shape": (ShapeError, r"positives \(3,\)", {"positives": torch.zeros(3, dtype=torch.int64)}),
    "positives' dtype": (DTypeError, "positives", {"positives": torch.zeros(4)}),
    "positives' range": (ArgumentError, "6", {"positives": torch.tensor([0, 1, 6, 2])}),
    "ids' shape": (ShapeError, r"passage_ids \(4,\)", {"passage_ids": torch.zeros(4, dtype=torch.int64)}),
    "weights": (ArgumentError, "sample_weight", {"sample_weight": torch.tensor([1.0, -1.0, 1.0, 1.0])}),
    "budget": (ArgumentError, "memory_budget", {"memory_budget": 0}),
    "divergence": (ArgumentError, "divergence", {"divergence": "kl"}),
    "processes": (ArgumentError, "init_process_group", {"gather": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_op_and_the_values(name: str) -> None:
    error, match, changed = ERRORS[name]
    fails(error, match, **changed)


def test_a_backend_that_cannot_run() -> None:
    nowhere = [torch.zeros(4, 3, device="meta")] * 4
    with pytest.raises(BackendError, match=r"contrast: backend 'native' cannot run this call.*meta"):
        contrastive(*nowhere, temperature=1.0, backend="native")


# The module


def test_the_module_is_the_function(native: str) -> None:
    case = towers(5, 8)
    options: dict[str, Any] = {
        "temperature": 0.2, "teacher_temperature": 0.4, "hard_weight": 0.5, "divergence": "jsd", "beta": 0.3,
        "soft_weight": 2.0, "label_smoothing": 0.1, "reduction": "none", "memory_budget": 999, "return_stats": True,
    }  # fmt: skip
    module = tgt.ContrastiveDistillationLoss(**options)
    extra = {"positives": torch.tensor([5, 6, 7, 0, -1]), "passage_ids": torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])}
    (mine, my_stats), (theirs, stats) = module(**case.tensors, **extra), contrastive(**case.tensors, **extra, **options)
    assert torch.equal(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(my_stats, stats, strict=True))
    assert not list(module.parameters())
    assert "temperature=0.2, teacher_temperature=0.4, hard_weight=0.5" in repr(module)
    with pytest.raises(ArgumentError, match="temperature"):
        tgt.ContrastiveDistillationLoss(0.0)
    with pytest.raises(ArgumentError, match="divergence"):
        tgt.ContrastiveDistillationLoss(1.0, divergence="kl")
