"""The reference is proven first: derivatives by finite differences, values by formulas written anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from numerics import logits, targets
from strategies import random_values, seeds, temperatures
from torch import Tensor

from tgt_fast.kernels.options import DIVERGENCES, DistillOptions
from tgt_fast.kernels.reference import distillation_loss

BOUNDED = ("jsd", "tvd")  # finite whatever is masked
INF = math.inf


def rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The reference, a loss a row unless told otherwise."""
    options.setdefault("reduction", "none")
    options.setdefault("teacher_temperature", options.get("temperature", 1.0))
    return distillation_loss(student, teacher, target, sample_weight, normalizer, DistillOptions(**options))[0]


def double(count: int, classes: int, seed: int) -> Tensor:
    return logits(count, classes, seed, dtype=torch.float64)


def by_hand(student: Tensor, teacher: Tensor, divergence: str, ts: float, tt: float, beta: float) -> Tensor:
    """The table of divergences through torch's own functions, for finite logits."""
    log_q, log_p = torch.log_softmax(student / ts, -1), torch.log_softmax(teacher / tt, -1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    table = {
        "forward_kl": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "symmetric": kl(log_p, log_q) + kl(log_q, log_p),
        "jsd": beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
        "tvd": (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
        "cross_entropy": torch.stack(
            [F.cross_entropy(s[None], p[None]) for s, p in zip(student / ts, log_p.exp(), strict=True)]
        ),
        "mse": F.mse_loss(student / ts, teacher / tt, reduction="none").sum(-1),
    }
    return table[divergence] * (1.0 if divergence == "mse" else ts * ts)


# Values


@pytest.mark.parametrize(("ts", "tt"), [(1.0, 1.0), (2.0, 2.0), (0.5, 4.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_equals_torch_written_out(divergence: str, ts: float, tt: float) -> None:
    student, teacher = double(6, 11, 0), double(6, 11, 1)
    ours = rows(student, teacher, divergence=divergence, beta=0.3, temperature=ts, teacher_temperature=tt)
    torch.testing.assert_close(ours, by_hand(student, teacher, divergence, ts, tt, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_hard_term_equals_torch_cross_entropy_at_temperature_one(smoothing: float) -> None:
    student, teacher, target = double(6, 11, 0), double(6, 11, 1), targets(6, 11, 2)
    ours = rows(student, teacher, target, temperature=3.0, soft_weight=0.0, hard_weight=2.0, label_smoothing=smoothing)
    theirs = 2.0 * F.cross_entropy(student, target, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_terms_weights_and_reductions_add_up() -> None:
    student, teacher = double(5, 7, 0), double(5, 7, 1)
    target, weight = (
        torch.tensor([3, -100, -1, 0, 6]),
        torch.tensor([0.5, 9.0, 2.0, 0.0, 1.5], dtype=torch.float64),
    )
    options: dict[str, Any] = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4}
    soft = by_hand(student, teacher, "forward_kl", 2.0, 2.0, 0.5)
    hard = F.cross_entropy(student, target.clamp_min(0), reduction="none") * (target >= 0)
    counted = torch.tensor([True, False, True, False, True])
    expected = weight * (0.7 * soft + 0.4 * hard) * counted
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(rows(student, teacher, target, sample_weight=weight, **options), expected, **close)
    total = rows(student, teacher, target, sample_weight=weight, reduction="sum", **options)
    torch.testing.assert_close(total, expected.sum(), **close)
    mean = rows(student, teacher, target, sample_weight=weight, reduction="mean", **options)
    torch.testing.assert_close(mean, expected.sum() / 4.0, **close)
    other = rows(student, teacher, target, sample_weight=weight, reduction="mean", normalizer=10.0, **options)
    torch.testing.assert_close(other, expected.sum() / 10.0, **close)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_class_masked_on_both_sides_does_not_exist(divergence: str) -> None:
    """Value and gradients are those of the logits without the class: smoothing, entropy and all."""
    keep = torch.tensor([0, 1, 3, 4, 6])
    target = torch.tensor([0, 3, 4, 6])
    narrow = [double(4, 5, seed).requires_grad_() for seed in (0, 1)]
    wide = [
        torch.full((4, 7), -INF, dtype=torch.float64).index_copy(1, keep, x.detach()).requires_grad_() for x in narrow
    ]
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "hard_weight": 0.5, "label_smoothing": 0.2}
    renumbered = torch.searchsorted(keep, target)
    expected = rows(narrow[0], narrow[1], renumbered, **options)
    actual = rows(wide[0], wide[1], target, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    d_wide, d_narrow = torch.autograd.grad(actual.sum(), wide), torch.autograd.grad(expected.sum(), narrow)
    for got, want in zip(d_wide, d_narrow, strict=True):
        torch.testing.assert_close(got[:, keep], want, rtol=1e-12, atol=1e-12)
        assert got[:, [2, 5]].eq(0).all()


@pytest.mark.parametrize("divergence", BOUNDED)
def test_a_class_masked_on_one_side_is_the_limit_of_a_vanishing_logit(divergence: str) -> None:
    student, teacher = double(4, 6, 0), double(4, 6, 1)
    near = [student.clone(), teacher.clone()]
    far = [student.clone(), teacher.clone()]
    near[0][:, 2], far[0][:, 2] = -100.0, -INF
    near[1][:, 4], far[1][:, 4] = -100.0, -INF
    values, gradients = [], []
    for pair in (near, far):
        leaves = [x.requires_grad_() for x in pair]
        value = rows(leaves[0], leaves[1], divergence=divergence)
        values.append(value)
        gradients.append(torch.autograd.grad(value.sum(), leaves))
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_jsd_limits_are_the_two_kl_divergences() -> None:
    student, teacher = double(4, 6, 0), double(4, 6, 1)
    tiny = 1e-7
    forward = rows(student, teacher, divergence="jsd", beta=tiny) / tiny
    torch.testing.assert_close(forward, rows(student, teacher), rtol=1e-4, atol=1e-6)
    backward = rows(student, teacher, divergence="jsd", beta=1 - tiny) / tiny
    torch.testing.assert_close(backward, rows(student, teacher, divergence="reverse_kl"), rtol=1e-4, atol=1e-6)


# Properties of the table


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_give_no_divergence_and_no_gradient(divergence: str) -> None:
    student = double(6, 9, 0).requires_grad_()
    teacher = student.detach().clone().requires_grad_()
    value = rows(student, teacher, divergence=divergence, temperature=2.0)
    d_student, d_teacher = torch.autograd.grad(value.sum(), (student, teacher))
    torch.testing.assert_close(d_student, torch.zeros_like(d_student), rtol=0, atol=1e-15)
    if divergence == "cross_entropy":
        p = torch.softmax(student.detach() / 2.0, -1)
        torch.testing.assert_close(
            value, 4.0 * torch.distributions.Categorical(probs=p).entropy(), rtol=1e-12, atol=1e-12
        )
    else:
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-15)
        torch.testing.assert_close(d_teacher, torch.zeros_like(d_teacher), rtol=0, atol=1e-15)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_adding_a_constant_to_all_logits_changes_nothing_but_mse(divergence: str) -> None:
    student, teacher = double(4, 6, 0), double(4, 6, 1)
    plain = rows(student, teacher, divergence=divergence)
    for moved in (
        rows(student + 3.0, teacher, divergence=divergence),
        rows(student, teacher - 2.0, divergence=divergence),
    ):
        assert torch.allclose(moved, plain, rtol=1e-12, atol=1e-12) == (divergence != "mse")


@settings(max_examples=50)
@given(seed=seeds, ts=temperatures, tt=temperatures)
def test_no_divergence_is_negative(seed: int, ts: float, tt: float) -> None:
    student, teacher = (
        random_values((4, 9), seed, 10.0, torch.float64),
        random_values((4, 9), seed + 1, 10.0, torch.float64),
    )
    for divergence in DIVERGENCES:
        for other in (teacher, student + 1e-9):
            assert rows(student, other, divergence=divergence, temperature=ts, teacher_temperature=tt).ge(0).all()


def test_jsd_is_symmetric_at_one_half_and_symmetric_is_the_sum_of_both_directions() -> None:
    student, teacher = double(4, 6, 0), double(4, 6, 1)
    exact: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(
        rows(student, teacher, divergence="jsd"), rows(teacher, student, divergence="jsd"), **exact
    )
    both = rows(student, teacher, divergence="forward_kl") + rows(student, teacher, divergence="reverse_kl")
    torch.testing.assert_close(rows(student, teacher, divergence="symmetric"), both, **exact)
    assert not torch.allclose(
        rows(student, teacher, divergence="jsd", beta=0.3), rows(teacher, student, divergence="jsd", beta=0.3)
    )


def test_a_loss_is_a_sum_over_classes_not_a_mean() -> None:
    """Splitting each class into 64 of equal probability changes nothing: no division by their number."""
    student, teacher = double(4, 5, 0), double(4, 5, 1)
    split = [x.repeat_interleave(64, dim=-1) for x in (student, teacher)]
    for divergence in ("forward_kl", "reverse_kl", "symmetric", "jsd", "tvd"):
        value = rows(student, teacher, divergence=divergence)
        torch.testing.assert_close(rows(*split, divergence=divergence), value, rtol=1e-12, atol=1e-12)
    by_value = (
        torch.tensor([[math.log(3.0), 0.0]]),
        torch.tensor([[0.0, 0.0]]),
    )  # q = (3/4, 1/4), p = (1/2, 1/2)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert rows(*by_value).item() == pytest.approx(expected, abs=1e-7)


# Derivatives


def masked_inputs(divergence: str) -> tuple[list[Tensor], list[Tensor]]:
    """Finite values for both sides, and which of them gradcheck may move; the others are -inf."""
    values = [double(4, 6, seed) for seed in (0, 1)]
    exists = [torch.ones(4, 6, dtype=torch.bool) for _ in values]
    for side in exists:
        side[:, 5] = False
    if divergence in BOUNDED:
        exists[0][0, 2] = exists[1][3, 0] = False
    return values, exists


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_both_sides_with_hard_term_weights_and_dropped_rows(divergence: str, masked: bool) -> None:
    values, exists = masked_inputs(divergence)
    target = torch.tensor([1, -1, -100, 3])
    weight = torch.tensor([0.5, 2.0, 1.0, 0.3])

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if masked:
            student, teacher = torch.where(exists[0], student, -INF), torch.where(exists[1], teacher, -INF)
        return rows(
            student, teacher, target, sample_weight=weight, divergence=divergence, beta=0.3, temperature=2.0,
            teacher_temperature=1.5, soft_weight=0.8, hard_weight=0.7, label_smoothing=0.1,
        )  # fmt: skip

    leaves = tuple(x.requires_grad_() for x in values)
    assert torch.autograd.gradcheck(loss, leaves)
    if divergence in ("forward_kl", "jsd", "reverse_kl"):
        assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck_of_the_reductions(reduction: str) -> None:
    student, teacher = double(3, 4, 0).requires_grad_(), double(3, 4, 1).requires_grad_()
    target = torch.tensor([0, -100, 2])
    options: dict[str, Any] = {"hard_weight": 1.0, "reduction": reduction}
    assert torch.autograd.gradcheck(lambda s, t: rows(s, t, target, **options), (student, teacher))


def test_gradients_survive_extreme_and_infinite_logits() -> None:
    """No NaN leaks from a masked or an underflowing class, not even into second derivatives."""
    for divergence in DIVERGENCES:
        student, teacher = double(3, 6, 0) * 100, double(3, 6, 1) * 100
        student[:, 5] = teacher[:, 5] = -INF
        student[0, 0] = teacher[0, 0] = -1e30
        student.requires_grad_()
        teacher.requires_grad_()
        value = rows(student, teacher, divergence=divergence, temperature=0.05)
        first = torch.autograd.grad(value.sum(), (student, teacher), create_graph=True)
        assert all(g.isfinite().all() and g[:, 5].eq(0).all() for g in first)
        second = torch.autograd.grad(
            torch.stack([g[:, 1].sum() for g in first]).sum(), (student, teacher), allow_unused=True
        )
        assert all(g is None or g.isfinite().all() for g in second)
