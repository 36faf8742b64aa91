"""The loss from hidden states: value and gradients against the float64 truth, whatever the chunks, rows and classes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from heads import BUDGETS, NAMES, Heads, assert_matches, check, heads, run, truth
from strategies import DTYPES
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels import linear_heads, memory
from tgt_fast.kernels.options import DIVERGENCES

pytestmark = pytest.mark.usefixtures("one_thread")


# Value and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(way: str, divergence: str, dtype: torch.dtype) -> None:
    case = heads(dtypes=(dtype, dtype), labeled=True, student=(1.5, 9.0), teacher=(0.75, 20.0))
    check(case, backend=way, divergence=divergence, hard_weight=0.5, memory_budget=BUDGETS["three rows"])
    check(heads(dtypes=(dtype, dtype)), backend=way, divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("student", [(1.0, None), (2.5, None), (1.0, 3.0), (0.5, 3.0)])
@pytest.mark.parametrize("teacher", [(1.0, None), (0.3, 2.0)])
def test_bias_scale_and_softcap(
    way: str, student: tuple[float, float | None], teacher: tuple[float, float | None], biased: bool
) -> None:
    case = heads((3, 4), biased=biased, student=student, teacher=teacher)
    check(case, backend=way, temperature=2.0, memory_budget=BUDGETS["three rows"])


def test_no_option_is_dropped_silently(way: str) -> None:
    """A softcap, a scale or a bias that is passed and not applied trains another model than the one that is saved."""
    plain = run(heads(biased=False), backend=way).loss
    for changed in ({"student": (2.0, None)}, {"teacher": (2.0, None)}, {"student": (1.0, 2.0)}, {"biased": True}):
        assert not torch.isclose(run(heads(**{"biased": False, **changed}), backend=way).loss, plain, rtol=1e-3)
    for changed in ({"teacher": (1.0, 2.0)}, {"vocabulary": {"vocab_size": 20}}):
        assert not torch.isclose(run(heads(biased=False, **changed), backend=way).loss, plain, rtol=1e-3)


PAIRS = [(a, b) for a, b in itertools.product(DTYPES, repeat=2) if a != b]


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_dtypes_may_differ(native: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(heads(dtypes=dtypes), backend=native, memory_budget=BUDGETS["three rows"])
    case = heads(dtypes=dtypes)  # and within a side, as hidden states under autocast and a head in float32
    assert case.tensors["student_weight"] is not None
    case.tensors["student_weight"] = case.tensors["student_weight"].to(dtypes[1])
    check(case, backend=native, memory_budget=BUDGETS["three rows"])


@pytest.mark.parametrize("block", [1, 300, 1 << 23])
def test_weights_are_widened_in_blocks(native: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_heads, "_BLOCK", block)
    check(heads(dtypes=(torch.bfloat16, torch.bfloat16)), backend=native, memory_budget=BUDGETS["three rows"])


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("wanted", [("student_hidden",), ("student_hidden", "student_weight")], ids=len)
def test_a_weight_is_widened_once_a_call_where_there_is_room(
    native: str, chunks: int, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy in float32 for every product of every chunk costs as much as the products themselves."""
    copies: list[str] = []
    allocate = memory.workspace

    def watched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        copies.extend(["a weight"] * (tuple(shape) == (100, 3)))
        made: Tensor = allocate(shape, dtype)
        return made

    monkeypatch.setattr(memory, "workspace", watched)
    case = heads(6, (100, 100), (3, 3), dtypes=(torch.bfloat16,) * 2, biased=False)
    rows = 6 // chunks
    check(case, backend=native, wanted=wanted, memory_budget=2 * 4 * 100 * rows)
    sums = wanted.count("student_weight")  # its gradient, which is as large
    assert len(copies) == sums + 2
    copies.clear()
    check(case, backend=native, wanted=wanted, memory_budget=1)
    assert len(copies) == sums


def test_bf16_logits_are_not_rounded(native: str) -> None:
    """Logits in bfloat16 before the softmax cost gradients percents, which no loss curve shows.

    The bar is 1.5 times the rounding of the exact gradient, on peaked rows; rounded logits do not pass it.
    """
    case = heads(64, (300, 300), (64, 64), dtypes=(torch.bfloat16, torch.bfloat16), biased=False, student=(4.0, None))
    found = check(case, backend=native, per_row=1 / 64)
    t = {name: None if x is None else x.requires_grad_() for name, x in case.tensors.items()}
    student = 4.0 * (t["student_hidden"] @ t["student_weight"].T)  # type: ignore[operator, union-attr]
    teacher = t["teacher_hidden"] @ t["teacher_weight"].T  # type: ignore[operator, union-attr]
    rounded = tgt.distillation_loss(student, teacher)
    names = list(found.grads)
    grads = dict(zip(names, torch.autograd.grad(rounded, [t[name] for name in names]), strict=True))  # type: ignore[misc]
    expected = truth(case)
    for name in names:
        found.grads[name], kept = grads[name], found.grads[name]
        with pytest.raises(AssertionError, match=name):
            assert_matches(case, found, expected, per_row=1 / 64)
        found.grads[name] = kept


@pytest.mark.parametrize("shifted", [None, "student_weight", "student_hidden"])
@pytest.mark.parametrize("options", [{}, {"student": (1.5, 30.0)}], ids=["plain", "scaled and capped"])
def test_products_of_bf16_on_a_device(
    native: str, options: dict[str, Any], shifted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a device, on a CPU: gradients of logits rounded before the products keep the bar all the same.

    Also where weights or hidden states have a mean that the exact gradients nearly cancel.
    """
    monkeypatch.setattr(linear_heads, "casts_operands", lambda device: True)
    case = heads(256, (2000, 2000), (128, 128), dtypes=(torch.bfloat16, torch.bfloat16), **options)
    if shifted is not None:
        tensor = case.tensors[shifted]
        assert tensor is not None
        tensor += 1.0
    for budget in (1 << 20, 1 << 30):
        check(case, backend=native, memory_budget=budget)


def test_products_of_bf16_with_weights_and_any_upstream_gradient(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_heads, "casts_operands", lambda device: True)
    case = heads(64, (300, 320), (32, 16), dtypes=(torch.bfloat16,) * 2, labeled=True, vocabulary={"vocab_size": 300})
    assert case.target is not None
    case.target[3], case.target[9] = -100, -1
    weight = torch.rand(64, generator=torch.Generator().manual_seed(1)) * 50
    weight[5] = 0.0
    upstream = torch.linspace(-1.0, 1.0, 65)[:64].square()
    for options in ({"normalizer": 1e4, "upstream": 2.0**10}, {"reduction": "none", "upstream": upstream}):
        check(case, backend=native, hard_weight=1.0, sample_weight=weight, memory_budget=1 << 18, **options)
    assert not run(case, backend=native, hard_weight=1.0, upstream=0.0).grads["student_weight"].any()


def test_products_of_fp16_on_a_device(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_heads, "casts_operands", lambda device: True)
    case = heads(dtypes=(torch.float16, torch.float16), student=(2.0, 9.0), labeled=True)
    check(case, backend=native, hard_weight=0.5, memory_budget=BUDGETS["three rows"])


def test_the_comparison_fails_for_wrong_gradients(native: str) -> None:
    case = heads(labeled=True)
    found, expected = run(case, backend=native, hard_weight=1.0), truth(case, hard_weight=1.0)
    for name, wrong in itertools.product(NAMES, (torch.zeros_like, lambda x: 1.05 * x, lambda x: x.flip(0))):
        kept, found.grads[name] = found.grads[name], wrong(found.grads[name])
        with pytest.raises(AssertionError, match=name):
            assert_matches(case, found, expected, per_row=1 / 7)
        found.grads[name] = kept


# Chunks


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "return_stats": True}])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_size_of_a_chunk_does_not_matter(way: str, options: dict[str, Any], softcap: float | None) -> None:
    """Rows are the same to rounding (a product's blocks depend on its shape), sums over rows too."""
    case = heads(11, labeled=True, student=(1.0, softcap), teacher=(1.0, softcap))
    results = [run(case, backend=way, hard_weight=1.0, memory_budget=b, **options) for b in BUDGETS.values()]
    for other in results[1:]:
        torch.testing.assert_close(other.loss, results[0].loss)
        for name, grad in other.grads.items():
            torch.testing.assert_close(grad, results[0].grads[name], rtol=1e-4, atol=1e-6)
        if other.stats is not None:
            torch.testing.assert_close(tuple(other.stats), tuple(results[0].stats))


def test_a_chunk_stays_within_its_budget(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    allocate = memory.workspace

    def watched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        taken.append(math.prod(shape) * dtype.itemsize)
        made: Tensor = allocate(shape, dtype)
        return made

    monkeypatch.setattr(memory, "workspace", watched)
    case = heads(1000, (500, 500), biased=False)
    run(case, backend=native, memory_budget=1 << 20, wanted=("student_hidden",))
    assert 0.9 * (1 << 20) < sum(taken) <= 1 << 20


# Gradients on demand


class Counted:
    """The number of products, and of those as large as a weight's gradient."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shapes: tuple[tuple[int, ...], ...]) -> None:
        self.all = self.of_weights = 0
        for name in ("mm", "addmm"):
            monkeypatch.setattr(torch, name, self._watch(getattr(torch, name), shapes))

    def _watch(self, function: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made = function(*args, **kwargs)
            self.all += 1
            self.of_weights += tuple(made.shape) in shapes
            return made

        return call


@pytest.mark.parametrize("wanted", [c for n in range(7) for c in itertools.combinations(NAMES, n)], ids=len)
def test_every_subset_of_gradients(native: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The wanted ones have the same bits as among all; only they cost a product."""
    case = heads()
    everything = run(case, backend=native)
    counted = Counted(monkeypatch, ((23, 8), (23, 6)))
    found = run(case, backend=native, wanted=wanted)
    assert torch.equal(found.loss, everything.loss)
    assert found.grads.keys() == set(wanted)
    assert all(torch.equal(found.grads[name], everything.grads[name]) for name in wanted)
    assert counted.of_weights == sum(name.endswith("weight") for name in wanted)
    assert counted.all == 2 + sum(not name.endswith("bias") for name in wanted)


def test_tied_heads_add_up(way: str) -> None:
    weight = torch.randn(9, 5, requires_grad=True)
    student, teacher = torch.randn(2, 6, 5, requires_grad=True).unbind(0)
    loss = tgt.linear_distillation_loss(student, weight, teacher, weight, backend=way, memory_budget=200)
    (tied,) = torch.autograd.grad(loss, weight)
    copies = [weight.detach().clone().requires_grad_() for _ in range(2)]
    loss = tgt.linear_distillation_loss(student.detach(), copies[0], teacher.detach(), copies[1], backend=way)
    torch.testing.assert_close(tied, sum(torch.autograd.grad(loss, copies)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_teacher_given_by_its_logits(way: str, dtype: torch.dtype, softcap: float | None) -> None:
    case = heads((2, 4), dtypes=(torch.float32, dtype), given=True, labeled=True, student=(1.0, softcap))
    check(case, backend=way, hard_weight=0.5, temperature=2.0, memory_budget=BUDGETS["three rows"])
    logits = case.tensors["teacher_hidden"]
    assert logits is not None
    case.tensors["teacher_hidden"] = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # transposed in memory
    check(case, backend=way, hard_weight=0.5, temperature=2.0)


# Rows


def test_rows_that_do_not_count_may_hold_anything(way: str) -> None:
    case = heads(8, labeled=True)
    target, weight = case.target, torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 3.0, 1.0])
    assert target is not None
    target[4], target[5] = -100, -1
    clean = check(case, backend=way, hard_weight=0.5, sample_weight=weight, per_row=1 / 8)
    for side, row in itertools.product(("student_hidden", "teacher_hidden"), (2, 4)):
        tensor = case.tensors[side]
        assert tensor is not None
        tensor[row] = math.nan if row == 2 else math.inf
    for reduction, budget in itertools.product(("mean", "none", "sum"), BUDGETS.values()):
        found = run(
            case, backend=way, hard_weight=0.5, sample_weight=weight, reduction=reduction, memory_budget=budget
        )  # fmt: skip
        assert all(grad.isfinite().all() for grad in found.grads.values())
        for side in ("student_hidden", "teacher_hidden"):
            assert not found.grads[side][[2, 4]].any()
        if reduction == "mean":
            torch.testing.assert_close(found.loss, clean.loss)
            torch.testing.assert_close(found.grads, clean.grads)


def test_a_row_that_is_not_a_number_leaves_the_others_alone(way: str) -> None:
    case = heads(5)
    clean = run(case, backend=way, reduction="none", wanted=("student_hidden", "teacher_hidden"))
    assert case.tensors["student_hidden"] is not None
    case.tensors["student_hidden"][3, 1] = math.nan
    found = run(case, backend=way, reduction="none", wanted=("student_hidden", "teacher_hidden"))
    rest = [0, 1, 2, 4]
    assert found.loss[3].isnan()
    torch.testing.assert_close(found.loss[rest], clean.loss[rest])
    for name, grad in found.grads.items():
        assert grad[3].isnan().all()
        torch.testing.assert_close(grad[rest], clean.grads[name][rest])


@pytest.mark.parametrize("normalizer", [3.0, torch.tensor(5.0), 0, torch.tensor(0.0)])
def test_a_normalizer_replaces_the_divisor(way: str, normalizer: float | Tensor) -> None:
    case = heads(labeled=True)
    total = run(case, backend=way, reduction="sum", hard_weight=1.0)
    found = run(case, backend=way, normalizer=normalizer, hard_weight=1.0, memory_budget=1)
    factor = 0.0 if float(normalizer) == 0 else 1 / float(normalizer)
    torch.testing.assert_close(found.loss, total.loss * factor)
    for name, grad in found.grads.items():
        torch.testing.assert_close(grad, total.grads[name] * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_batch_of_32_is_4_of_8(way: str, weighted: bool) -> None:
    case = heads(32, labeled=True)
    assert case.target is not None
    case.target[torch.tensor([1, 2, 3, 9, 30])] = -100
    weight = torch.linspace(0.5, 2.0, 32) if weighted else None
    divisor = float((torch.ones(32) if weight is None else weight)[case.target != -100].sum())
    whole = run(case, backend=way, hard_weight=0.5, sample_weight=weight)
    loss, grads = torch.zeros(()), {name: torch.zeros_like(grad) for name, grad in whole.grads.items()}
    for start in range(0, 32, 8):
        rows = slice(start, start + 8)
        split = {n: x[rows] if x is not None and n.endswith("hidden") else x for n, x in case.tensors.items()}
        part = run(
            Heads(split, target=case.target[rows]), backend=way, hard_weight=0.5, normalizer=divisor,
            sample_weight=None if weight is None else weight[rows],
        )  # fmt: skip
        loss += part.loss
        for name, grad in part.grads.items():
            (grads[name][rows] if name.endswith("hidden") else grads[name]).add_(grad)
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(grads, whole.grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given", [False, True])
def test_no_rows(way: str, reduction: str, given: bool) -> None:
    found = run(heads(0, given=given, labeled=True), backend=way, reduction=reduction, hard_weight=1.0)
    assert found.loss.shape == ((0,) if reduction == "none" else ())
    assert not found.loss.any()
    assert all(not grad.any() for grad in found.grads.values())


def test_nothing_counted_is_zero(way: str) -> None:
    case = heads(3, labeled=True)
    assert case.target is not None
    case.target[:] = -100
    found = run(case, backend=way, hard_weight=1.0)
    assert found.loss == 0
    assert all(not grad.any() for grad in found.grads.values())


def test_statistics(way: str) -> None:
    case = heads((2, 4), labeled=True, student=(1.0, 3.0))
    found = run(case, backend=way, hard_weight=1.0, return_stats=True, temperature=2.0, memory_budget=1)
    expected = truth(case, hard_weight=1.0, temperature=2.0).stats
    for mine, theirs in zip(found.stats, expected, strict=True):
        assert mine.shape == (2, 4)
        assert mine.dtype == (torch.bool if theirs.dtype == torch.bool else torch.float32)
        torch.testing.assert_close(mine, theirs.reshape(2, 4).to(mine.dtype))


# The reference


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_is_differentiable_twice(reduction: str) -> None:
    case = heads(3, (5, 6), (3, 2), dtypes=(torch.float64,) * 2, student=(2.0, 3.0), vocabulary={"vocab_size": 4})
    leaves = [x.requires_grad_() for x in case.tensors.values() if x is not None]

    def loss(*tensors: Tensor) -> Tensor:
        a, b, c, d, e, f = tensors
        made: Tensor = tgt.linear_distillation_loss(  # type: ignore[assignment]
            a, b, d, e, student_bias=c, teacher_bias=f, divergence="jsd", reduction=reduction, backend="reference",
            **case.options(),
        )  # fmt: skip
        return made

    torch.autograd.gradcheck(loss, leaves)
    torch.autograd.gradgradcheck(loss, leaves)
