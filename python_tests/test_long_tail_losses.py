"""Logit adjustment, balanced softmax and LDAM against plain float64, by hand, and by what their papers state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.long_tail import (
    BalancedSoftmaxLoss,
    CosineClassifier,
    DeferredReweighting,
    LDAMLoss,
    LogitAdjustmentLoss,
    post_hoc_adjustment,
)

COUNTS = [50, 20, 5, 1]
KINDS: dict[str, Any] = {
    "logit adjustment": LogitAdjustmentLoss,
    "half": lambda counts, **options: LogitAdjustmentLoss(counts, 0.5, **options),
    "balanced softmax": BalancedSoftmaxLoss,
    "LDAM": LDAMLoss,
}


def batch(rows: int = 7, classes: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(classes, (rows,), generator=generator)
    y[:2] = torch.tensor([-1, -100])
    return logits.requires_grad_(), y, torch.rand(rows, generator=generator)


def plain(kind: str, logits: Tensor, label: int) -> Tensor:
    """One row, in the letters of the papers."""
    z = logits.double()
    n = torch.tensor(COUNTS, dtype=torch.float64)
    if kind == "LDAM":
        margins = n**-0.25 * (0.5 / (n**-0.25).max())
        z = 30 * (z - F.one_hot(torch.tensor(label), len(COUNTS)) * margins)
    elif kind == "balanced softmax":
        return -torch.log(n[label] * z[label].exp() / (n * z.exp()).sum())
    else:
        z = z + torch.log((n / n.sum()) ** (0.5 if kind == "half" else 1.0) + 1e-12)
    return torch.logsumexp(z, 0) - z[label]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_plain_float64(kind: str, reduction: str, weighted: bool) -> None:
    logits, y, share = batch()
    of_class = [1.0, 2.0, 0.5, 3.0]
    loss = KINDS[kind](COUNTS, reduction=reduction, class_weight=of_class if weighted else None)
    found = loss(logits, y, sample_weight=share if weighted else None)
    (slope,) = torch.autograd.grad(found.sum(), logits)

    again = logits.detach().requires_grad_()
    rows, weights = [], []
    for row, label in enumerate(y.tolist()):
        weight = of_class[max(label, 0)] * share[row].double() if weighted else torch.ones((), dtype=torch.float64)
        rows.append(weight * plain(kind, again[row], label) if label >= 0 else again[row].sum() * 0)
        weights.append(weight if label >= 0 else weight * 0)
    total = torch.stack(rows)
    expected = {"none": total, "sum": total.sum(), "mean": total.sum() / torch.stack(weights).sum()}[reduction]
    (expected_slope,) = torch.autograd.grad(expected.sum(), again)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-7, atol=1e-9)


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(2)]])
    label = torch.tensor([1])
    # exp(z) n = 3, 2: the label has 2 of 5
    assert BalancedSoftmaxLoss([3, 1])(logits, label).item() == pytest.approx(-math.log(2 / 5), rel=1e-6)
    assert LogitAdjustmentLoss([3, 1])(logits, label).item() == pytest.approx(-math.log(2 / 5), rel=1e-6)
    # margins 1/4 and 1/2 of n = 16 and 1; z'_1 = log 2 - 1/2
    found = LDAMLoss([16, 1], scale=1.0)(logits, label).item()
    assert found == pytest.approx(math.log(1 + math.exp(0.5) / 2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_balanced_softmax_is_logit_adjustment_at_tau_1(dtype: torch.dtype) -> None:
    logits, y, _ = batch(dtype=dtype)
    assert BalancedSoftmaxLoss(COUNTS)(logits, y).dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(BalancedSoftmaxLoss(COUNTS)(logits, y), LogitAdjustmentLoss(COUNTS)(logits, y))
    plain = F.cross_entropy(logits.float(), torch.where(y < 0, -100, y))
    torch.testing.assert_close(LogitAdjustmentLoss(COUNTS, 0.0)(logits.float(), y), plain)


def test_post_hoc_adjustment_is_the_balanced_rule() -> None:
    """Of the true posterior: p(c | x) ~ pi_c p(x | c), so that the adjusted argmax is that of p(x | c)."""
    torch.manual_seed(0)
    likelihood = torch.rand(500, 4, dtype=torch.float64)
    posterior = likelihood * torch.tensor(COUNTS)
    logits = (posterior / posterior.sum(1, keepdim=True)).log()
    adjusted = post_hoc_adjustment(logits, COUNTS)
    assert torch.equal(adjusted.argmax(1), likelihood.argmax(1))
    assert not torch.equal(logits.argmax(1), likelihood.argmax(1))
    assert torch.equal(post_hoc_adjustment(logits.T, COUNTS, class_dim=0).T, adjusted)


def test_what_logit_adjustment_trains_is_balanced() -> None:
    """With one logit a class and no input the minimum of CE(z + log pi) is where all z are equal."""
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    y = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    loss = LogitAdjustmentLoss(COUNTS)(z.expand(len(y), 4), y)
    (slope,) = torch.autograd.grad(loss, z)
    assert float(slope.abs().max()) < 1e-9


def test_margins_grow_as_classes_get_rarer() -> None:
    margins = LDAMLoss([16, 1, 0, 81], max_margin=0.3).margins
    torch.testing.assert_close(margins, torch.tensor([0.15, 0.3, 0.3, 0.1], dtype=torch.float64))
    logits = torch.zeros(4, 4, requires_grad=True)
    rows = LDAMLoss([16, 1, 1, 81], reduction="none")(logits, torch.arange(4))
    assert rows[3] < rows[0] < rows[1] == rows[2]


def test_a_class_without_examples() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = BalancedSoftmaxLoss([1, 0, 1])(logits, torch.tensor([0]))
    (slope,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(math.log(2))
    assert slope[0, 1] == 0
    with pytest.raises(ArgumentError, match="label 1 is of a class that has no examples"):
        BalancedSoftmaxLoss([1, 0, 1])(logits, torch.tensor([1]))
    assert LogitAdjustmentLoss([1, 0, 1])(logits, torch.tensor([1])).item() == pytest.approx(math.log(1e12), rel=1e-5)


def test_one_class_and_no_row() -> None:
    for kind in KINDS.values():
        logits = torch.randn(3, 1, requires_grad=True)
        assert kind([7])(logits, torch.zeros(3, dtype=torch.int64)).item() == pytest.approx(0, abs=1e-6)
        nothing = kind([7])(logits, torch.full((3,), -1))
        torch.autograd.backward(nothing)
        assert nothing == 0
        assert logits.grad is not None
        assert not logits.grad.any()


def test_shares_positions_and_normalizer() -> None:
    logits, y, _ = batch(6)
    loss = LogitAdjustmentLoss(COUNTS)
    hard = F.one_hot(y.clamp(min=0), 4).double()
    torch.testing.assert_close(loss(logits, hard), loss(logits, y.clamp(min=0)))
    by_position = loss(logits.reshape(2, 3, 4), y.reshape(2, 3))
    torch.testing.assert_close(by_position, loss(logits, y))
    torch.testing.assert_close(loss(logits, y, normalizer=8.0) * 2, loss(logits, y))
    weight = logits[:, 0].detach().abs()
    assert (y < 0).any()  # rows that have no label count in an objective's mean
    torch.testing.assert_close(
        loss.term(logits, None, y, weight=weight),
        loss(logits, y, sample_weight=weight, normalizer=weight[y != -100].sum()),
    )
    assert loss.term(logits, None) == 0
    smooth = LogitAdjustmentLoss(COUNTS, 0.0, label_smoothing=0.2)(logits, y)
    torch.testing.assert_close(smooth, F.cross_entropy(logits, torch.where(y < 0, -100, y), label_smoothing=0.2))


def test_weights_change_from_step_to_step() -> None:
    logits, y, _ = batch()
    loss, reweighting = LDAMLoss(COUNTS), DeferredReweighting(COUNTS, 1, beta=1.0)
    loss.class_weight = reweighting(0)
    before = loss(logits, y)
    torch.testing.assert_close(before, LDAMLoss(COUNTS)(logits, y))
    loss.class_weight = reweighting(1)
    n = 1 / torch.tensor(COUNTS, dtype=torch.float64)
    torch.testing.assert_close(
        loss(logits, y), LDAMLoss(COUNTS, class_weight=4 * n / n.sum())(logits, y), rtol=1e-6, atol=0.0
    )
    assert loss(logits, y) != before


def test_the_cosine_classifier_sees_directions_alone() -> None:
    head, x = CosineClassifier(3, 2), torch.randn(5, 3)
    torch.testing.assert_close(head(x), F.cosine_similarity(x[:, None], head.weight[None], dim=2))
    torch.testing.assert_close(head(7 * x), head(x))
    assert repr(head) == "CosineClassifier(in_features=3, out_features=2)"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LogitAdjustmentLoss(COUNTS, -1.0), ArgumentError, "tau"),
        (lambda: LogitAdjustmentLoss(COUNTS, reduction="max"), ArgumentError, "reduction"),
        (lambda: LogitAdjustmentLoss(COUNTS, class_weight=[1.0]), ArgumentError, "class_weight"),
        (lambda: LDAMLoss(COUNTS, scale=0.0), ArgumentError, "scale"),
        (lambda: LDAMLoss(COUNTS)(torch.zeros(1, 4), torch.rand(1, 4)), DTypeError, "margin"),
        (lambda: BalancedSoftmaxLoss([1, 0], label_smoothing=0.1), ArgumentError, "class 1 has no examples"),
        (lambda: LDAMLoss(COUNTS)(torch.zeros(1, 3), torch.zeros(1).long()), ShapeError, "as class_counts"),
        (lambda: LDAMLoss(COUNTS)(torch.zeros(2, 4), torch.zeros(1).long()), ShapeError, "does not fit"),
        (lambda: LDAMLoss(COUNTS)(torch.zeros(1, 4), torch.tensor([4])), ArgumentError, "label 4"),
        (lambda: LDAMLoss(COUNTS)(torch.zeros(1, 4), torch.tensor([-2])), ArgumentError, "label -2"),
        (lambda: post_hoc_adjustment(torch.zeros(2, 3), COUNTS), ShapeError, "4 classes"),
        (lambda: CosineClassifier(0, 2), ArgumentError, "in_features"),
    ],
)
def test_refusals(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
