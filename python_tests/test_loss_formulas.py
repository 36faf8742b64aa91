"""The losses beside the fused ones: each against a second implementation, row by row in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from losses_kit import MAPS, Array, S, T, Y, huber, soft
from torch import Tensor

import tgt_fast as tgt
from tgt_fast import losses as L
from tgt_fast.errors import ArgumentError, ShapeError

WEIGHT = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.25])


def kl(p: Array, q: Array) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def pearson(x: Array, y: Array) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def dist(s: Array, t: Array, _: Array) -> float:
    q, p = (np.stack([soft(row, 2.0) for row in x]) for x in (s, t))
    inter = np.mean([1 - pearson(a, b) for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - pearson(a, b) for a, b in zip(p.T, q.T, strict=True)])
    return float(4 * (3 * inter + 0.5 * intra))


def mlkd(of_classes: bool) -> Callable[..., float]:
    def formula(s: Array, t: Array, _: Array) -> float:
        total = 0.0
        for temperature in (2.0, 4.0):
            q, p = (np.stack([soft(row, temperature) for row in x]) for x in (s, t))
            apart = p.T @ p - q.T @ q if of_classes else p @ p.T - q @ q.T
            total += (apart**2).sum() / len(apart)
        return total

    return formula


def nkd(s: Array, t: Array, y: Array) -> float:
    total = 0.0
    for one, other, label in zip(s, t, y, strict=True):
        rest = [c for c in range(len(one)) if c != label]
        if label >= 0:
            total -= soft(other)[label] * math.log(soft(one)[label])
        total -= 1.5 * 9 * sum(soft(other[rest], 3.0) * np.log(soft(one[rest], 3.0)))
    return total / len(s)


def gdkd(s: Array, t: Array, _: Array) -> float:
    total = 0.0
    for one, other in zip(s, t, strict=True):
        order = np.argsort(-other)
        q, p = soft(one, 2.0), soft(other, 2.0)
        masses = [[x[order[:2]].sum(), x[order[2:]].sum()] for x in (p, q)]
        within = [[x[g] / x[g].sum() for x in (p, q)] for g in (order[:2], order[2:])]
        total += 4 * (0.5 * kl(*masses) + 2 * kl(*within[0]) + 3 * kl(*within[1]))
    return total / len(s)


def wttm(s: Array, t: Array, _: Array) -> float:
    found = []
    for one, other in zip(s, t, strict=True):
        powers = soft(other) ** 0.25
        found.append(powers.sum() * kl(powers / powers.sum(), soft(one)))
    return float(np.mean(found))


def symmetric(s: Array, t: Array, _: Array) -> float:
    pairs = [(soft(a, 2.0), soft(b, 2.0)) for a, b in zip(s, t, strict=True)]
    return float(np.mean([4 * (-0.7 * sum(p * np.log(q)) - 0.3 * sum(q * np.log(p))) for q, p in pairs]))


def topk_reverse(tail: str) -> Callable[..., float]:
    def formula(s: Array, t: Array, _: Array) -> float:
        total = 0.0
        for one, other in zip(s, t, strict=True):
            top = np.argsort(-one)[:3]
            q, p = soft(one, 2.0), soft(other, 2.0)
            if tail == "bucket":
                total += 4 * kl([*q[top], 1 - q[top].sum()], [*p[top], 1 - p[top].sum()])
            else:
                total += 4 * kl(q[top] / q[top].sum(), p[top] / p[top].sum())
        return total / len(s)

    return formula


def bild(s: Array, t: Array, _: Array) -> float:
    total = 0.0
    for one, other in zip(s, t, strict=True):
        for leading in (one, other):
            top = np.argsort(-leading)[:4]
            pairs = [(i, j) for a, i in enumerate(top) for j in top[a + 1 :]]
            ours, theirs = ([x[i] - x[j] for i, j in pairs] for x in (one, other))
            total += kl(soft(theirs, 3.0), soft(ours, 3.0))
    return total / len(s)


def margin(s: Array, t: Array, y: Array) -> float:
    found = []
    for one, other, label in zip(s, t, y, strict=True):
        label = max(label, 0)
        found += [(one[label] - one[n] - other[label] + other[n]) ** 2 for n in range(len(one)) if n != label]
    return float(np.mean(found))


def rkd_distance(s: Array, t: Array, _: Array) -> float:
    def relative(x: Array) -> Array:
        found = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return found / found[found > 0].mean()

    return float(np.mean([huber(x) for x in (relative(s) - relative(t)).ravel()]))


def rkd_angle(s: Array, t: Array, _: Array) -> float:
    def cosine(x: Array, i: int, j: int, k: int) -> float:
        a, b = x[j] - x[i], x[k] - x[i]
        return 0.0 if i in (j, k) else float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    n = range(len(s))
    return float(np.mean([huber(cosine(s, i, j, k) - cosine(t, i, j, k)) for i in n for j in n for k in n]))


def similarity(s: Array, t: Array, _: Array) -> float:
    rows = [[row / np.linalg.norm(row) for row in x @ x.T] for x in (s, t)]
    return float(((np.array(rows[0]) - np.array(rows[1])) ** 2).mean())


def embedding(distance: str) -> Callable[..., float]:
    def formula(s: Array, t: Array, _: Array) -> float:
        if distance == "mse":
            return float(((s - t) ** 2).mean())
        if distance == "l2":
            return float(np.mean([np.linalg.norm(a - b) for a, b in zip(s, t, strict=True)]))
        return float(np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t, strict=True)]))

    return formula


def halved(maps: Array) -> Array:
    """Means over 2 x 2 places."""
    b, c, h, w = maps.shape
    return maps.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))


def attention(s: Array, t: Array, _: Array) -> float:
    total = 0.0
    for one, other in zip(halved(s), t, strict=True):
        a, b = ((np.abs(x) ** 3).mean(0).ravel() for x in (one, other))
        total += ((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).mean()
    return total / len(s)


def fitnets(s: Array, t: Array, _: Array) -> float:
    return float(((halved(s) - t) ** 2).mean())


CASES: dict[str, tuple[Any, Callable[..., float], Tensor, Tensor]] = {
    "DIST": (L.DIST(3.0, 0.5, 2.0), dist, S, T),
    "MLKDClass": (L.MLKDClass((2, 4)), mlkd(True), S, T),
    "MLKDBatch": (L.MLKDBatch((2, 4)), mlkd(False), S, T),
    "NKD": (L.NKD(temperature=3.0), nkd, S, T),
    "GDKD": (L.GDKD(2, (0.5, 2.0, 3.0), 2.0), gdkd, S, T),
    "WTTM": (L.WTTM(4.0), wttm, S, T),
    "SymmetricCE": (L.SymmetricCE(0.3, 2.0), symmetric, S, T),
    "TopKReverseKL": (L.TopKReverseKL(3, 2.0), topk_reverse("bucket"), S, T),
    "TopKReverseKL-renormalize": (L.TopKReverseKL(3, 2.0, tail="renormalize"), topk_reverse("renormalize"), S, T),
    "BiLD": (L.BiLD(4), bild, S, T),
    "MarginMSE": (L.MarginMSE(), margin, S, T),
    "RKDDistance": (L.RKDDistance(), rkd_distance, S, T[:, :4]),
    "RKDAngle": (L.RKDAngle(), rkd_angle, S, T[:, :4]),
    "SimilarityPreserving": (L.SimilarityPreserving(), similarity, S, T[:, :4]),
    "EmbeddingDistillation-mse": (L.EmbeddingDistillation(), embedding("mse"), S, T),
    "EmbeddingDistillation-l2": (L.EmbeddingDistillation("l2"), embedding("l2"), S, T),
    "EmbeddingDistillation-cosine": (L.EmbeddingDistillation("cosine"), embedding("cosine"), S, T),
    "FitNets": (L.FitNets(), fitnets, MAPS[0], MAPS[1][:, :2]),
    "AttentionTransfer": (L.AttentionTransfer(3.0), attention, *MAPS),
}
every = pytest.mark.parametrize("name", CASES)


@every
def test_the_formula(name: str) -> None:
    loss, formula, s, t = CASES[name]
    expected = formula(s.numpy(), t.numpy(), Y.numpy())
    assert abs(expected) > 1e-3
    assert loss(s, t, Y).item() == pytest.approx(expected, rel=1e-9)
    single = loss(s.float(), t.float(), Y)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-4)


@every
def test_gradients_to_both_sides(name: str) -> None:
    loss, _, s, t = CASES[name]
    sides = [x[:3].clone().requires_grad_() for x in (s, t)]
    if name == "NKD":  # p_y is taken without one
        sides[1] = sides[1].detach()
    assert torch.autograd.gradcheck(lambda *x: loss(*x, Y[:3]), sides)


@every
def test_dropped_rows_are_as_if_they_were_not_there(name: str) -> None:
    """Whatever they hold; weights of 2 are as if rows came twice, also among pairs."""
    loss, _, s, t = CASES[name]
    kept = loss(s[[0, 1, 3]], t[[0, 1, 3]], Y[[0, 1, 3]])
    dirty = [x.clone() for x in (s, t)]
    for x in dirty:
        x[[2, 4]] = math.nan
    target = Y.clone()
    target[2] = -100
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    student = dirty[0].requires_grad_()
    found = loss(student, dirty[1], target, weight=weight)
    torch.testing.assert_close(found, kept, rtol=1e-9, atol=1e-12)
    found.backward()
    assert student.grad is not None
    assert (student.grad[[2, 4]] == 0).all()
    assert student.grad[[0, 1, 3]].flatten(1).norm(dim=1).min() > 0
    twice = [x[[0, 1, 1]] for x in (s, t, Y)]
    weighed = loss(s[:2], t[:2], Y[:2], weight=torch.tensor([1.0, 2.0]))
    # Between copies there is no distance and no angle; and a length that a weight entered would change with its scale.
    if name not in ("RKDDistance", "RKDAngle", "SimilarityPreserving"):
        torch.testing.assert_close(weighed, loss(*twice), rtol=1e-9, atol=1e-12)


@every
def test_reductions(name: str) -> None:
    loss, _, s, t = CASES[name]
    rows = type(loss).__call__
    try:
        loss.reduction = "none"
        each = rows(loss, s, t, Y, weight=WEIGHT)
        loss.reduction = "sum"
        total = rows(loss, s, t, Y, weight=WEIGHT)
    finally:
        loss.reduction = "mean"
    assert each.shape == (5,)
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(loss(s, t, Y, weight=WEIGHT), total / WEIGHT.sum())
    torch.testing.assert_close(loss(s, t, Y, weight=WEIGHT, normalizer=3.0), total / 3)
    for nothing in (loss(s[:0], t[:0]), loss(s, t, weight=torch.zeros(5)), loss(s, t, normalizer=0)):
        assert nothing == 0


MASKABLE = [name for name, (loss, *_) in CASES.items() if loss.logits]


@pytest.mark.parametrize("name", MASKABLE)
def test_classes_that_are_masked_on_both_sides_do_not_exist(name: str) -> None:
    loss, _, s, t = CASES[name]
    labels = Y.clamp(max=4)
    wide = [torch.cat([x, torch.full((5, 2), -math.inf, dtype=x.dtype)], 1) for x in (s, t)]
    student = wide[0].requires_grad_()
    expected = loss(s, t, labels)
    if name == "MLKDClass":  # which divides by the number of columns
        expected = expected * 6 / 8
    found = loss(student, wide[1], labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[:, 6:] == 0).all()


@pytest.mark.parametrize("name", MASKABLE)
def test_a_row_that_is_no_distribution_is_nan_and_alone_in_it(name: str) -> None:
    loss, _, s, t = CASES[name]
    loss.reduction = "none"
    try:
        for value in (math.nan, math.inf):
            bad = s.clone()
            bad[1, 3] = value
            found = loss(bad, t, Y)
            assert found[1].isnan()
            assert loss.pairwise or found[[0, 2, 3, 4]].isfinite().all()
    finally:
        loss.reduction = "mean"


def test_a_student_without_a_class_that_the_teacher_has() -> None:
    lacking = S.clone()
    lacking[:, 1] = -math.inf
    for name in ("NKD", "WTTM", "SymmetricCE"):
        student = lacking.clone().requires_grad_()
        found = CASES[name][0](student, T, Y)
        assert found == math.inf
        found.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
    assert CASES["TopKReverseKL"][0](lacking, T).isfinite()


@every
def test_one_number_an_example_serves_all_its_rows(name: str) -> None:
    loss, _, s, t = CASES[name]
    if loss.maps:
        with pytest.raises(ShapeError, match="rows"):
            loss(s, t, weight=torch.ones(5, 4))
        return
    wide = [x.reshape(5, 1, -1).expand(5, 2, -1) for x in (s, t)]
    both = loss(*wide, Y, weight=WEIGHT)
    apart = loss(*wide, Y[:, None].expand(5, 2), weight=WEIGHT[:, None].expand(5, 2))
    torch.testing.assert_close(both, apart)


# Records


def test_records_in_the_place_of_logits() -> None:
    record = tgt.topk_teacher(T, 3, temperature=2.0)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])
    gdkd = L.GDKD(3, (0.5, 2.0, 0.0), 2.0)
    torch.testing.assert_close(gdkd(S, record, weight=weights), gdkd(S, T, weight=weights))
    bild = L.BiLD(3, led_by="teacher")
    torch.testing.assert_close(bild(S, record, weight=weights), bild(S, T, weight=weights))
    for loss, option in (
        (L.GDKD(3, temperature=2.0), r"weights\[2\]"), (L.GDKD(2, (1, 1, 0), 2.0), "k=2"), (L.BiLD(3), "led_by"),
        (L.BiLD(4, led_by="teacher"), "lists 3"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=option):
            loss(S, record)
    with pytest.raises(ArgumentError, match="needs the teacher's logits"):
        L.DIST()(S, record)


def test_padding_of_a_record_is_no_class() -> None:
    ids = torch.tensor([[0, 1, 99]])
    log_probs = torch.log(torch.tensor([[0.5, 0.25, 0.0]], dtype=torch.float64))
    record = tgt.TeacherTopK(ids, log_probs, torch.log(torch.tensor([0.25])), 1.0, 6)
    same = tgt.TeacherTopK(ids[:, :2], log_probs[:, :2], torch.log(torch.tensor([0.25])), 1.0, 6)
    torch.testing.assert_close(L.GDKD(3, (1, 1, 0))(S[:1], record), L.GDKD(2, (1, 1, 0))(S[:1], same))
    torch.testing.assert_close(L.BiLD(3, led_by="teacher")(S[:1], record), L.BiLD(2, led_by="teacher")(S[:1], same))


# What is refused


def test_what_is_refused() -> None:
    for name, (loss, _, s, t) in CASES.items():
        for bad, match in (
            ({"student": s.long()}, "student"), ({"student": s[:3]}, "rows"), ({"target": Y[:2]}, "target"),
            ({"weight": -torch.ones(5)}, "weight"), ({"weight": torch.ones(3)}, "weight"),
        ):  # fmt: skip
            with pytest.raises((ArgumentError, ShapeError, tgt.errors.DTypeError), match=match):
                loss(**{"student": s, "teacher": t, **bad})
        with pytest.raises(ArgumentError, match="reduction"):
            type(loss)(reduction="batchmean")
        assert name.split("-")[0] in repr(loss)
    options: list[tuple[Any, dict[str, Any]]] = [
        (L.DIST, {"beta": -1}), (L.MLKDBatch, {"temperatures": (0,)}), (L.NKD, {"gamma": math.nan}),
        (L.GDKD, {"k": 0}), (L.GDKD, {"weights": (1, 1)}), (L.WTTM, {"temperature": 0}),
        (L.SymmetricCE, {"alpha": 2}), (L.TopKReverseKL, {"tail": "uniform"}), (L.BiLD, {"k": 1}),
        (L.BiLD, {"led_by": "label"}), (L.EmbeddingDistillation, {"distance": "l1"}), (L.AttentionTransfer, {"p": 0}),
        (L.FitNets, {"projection": 3}), (L.DIST, {"ignore_index": 0.5}),
    ]  # fmt: skip
    for kind, option in options:
        with pytest.raises(ArgumentError):
            kind(**option)
    with pytest.raises(ShapeError, match="differ"):
        L.NKD()(S, T[:, :4])
    with pytest.raises(ArgumentError, match="target"):
        L.NKD()(S, T, torch.full((5,), 6))


def test_shares_of_the_classes_drop_no_row_and_are_no_labels() -> None:
    shares = T.softmax(-1)
    torch.testing.assert_close(L.DIST()(S, T, shares), L.DIST()(S, T))
    with pytest.raises(tgt.errors.DTypeError, match="target"):
        L.NKD()(S, T, shares)


def test_exact_under_autocast() -> None:
    for name in ("DIST", "SimilarityPreserving", "GDKD"):
        loss, _, s, t = CASES[name]
        s, t = s.float(), t.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(s, t)
        assert torch.equal(found, loss(s, t)), name
