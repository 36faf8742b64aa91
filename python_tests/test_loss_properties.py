"""The losses beside the fused ones: by hand, and what their papers state."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from losses_kit import MAPS, S, T, Y, huber, normal
from torch import nn
from torch.nn import functional as F

import tgt_fast as tgt
from tgt_fast import losses as L
from tgt_fast.errors import ShapeError


def test_by_hand() -> None:
    third = torch.zeros(1, 3)
    sure = torch.tensor([[math.log(2.0), 0.0, 0.0]])  # 1/2, 1/4, 1/4
    unsure = 0.5**0.5 + 1  # sqrt(1/2) + 2 sqrt(1/4)
    shares = [0.5**0.5 / unsure, 0.5 / unsure, 0.5 / unsure]
    # Angles of a right-angled isosceles triangle against three points on a line; huber is half a square up to 1.
    angles = ((0.0, 1.0), (0.5**0.5, -1.0), (0.5**0.5, 1.0))
    of_nine = ((1, 1 / 4), (4, 1 / 8), (4, 1 / 16))
    by_hand = {
        L.WTTM(2.0): (third, sure, unsure * (math.log(3) + sum(p * math.log(p) for p in shares))),
        L.SymmetricCE(): (third, sure, 0.5 * math.log(3) + 0.5 * (5 / 3) * math.log(2)),
        L.TopKReverseKL(1): (sure, third, 0.5 * math.log(1.5) + 0.5 * math.log(0.75)),
        L.GDKD(1, (1.0, 0.0, 0.0)): (third, sure, 0.5 * math.log(1.5) + 0.5 * math.log(0.75)),
        L.GDKD(2, (0.0, 1.0, 0.0)): (third, sure, 5 / 3 * math.log(2) - math.log(3)),  # of 2/3, 1/3 from halves
        L.GDKD(1, (0.0, 0.0, 1.0)): (-sure.roll(1), third, 0.5 * math.log(9 / 8)),  # of halves from 1/3, 2/3
        L.NKD(0.0): (third, sure, 0.5 * math.log(3)),
        L.NKD(1.5): (third, sure, 0.5 * math.log(3) + 1.5 * math.log(2)),  # the others are equally likely
        L.TopKReverseKL(2, tail="renormalize"): (sure, third, 5 / 3 * math.log(2) - math.log(3)),
        L.BiLD(2, 1.0): (third, sure, 0.0),  # one pair, whose softmax is 1
        # Differences log 2, log 2, 0: 2/5, 2/5, 1/5 from thirds, once for each side's order.
        L.BiLD(3, 1.0): (third, sure, 2 * (math.log(3) + 0.8 * math.log(0.4) + 0.2 * math.log(0.2))),
        L.MarginMSE(): (third, sure, math.log(2.0) ** 2),
        L.EmbeddingDistillation(): (torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), 2.5),
        L.EmbeddingDistillation("l2"): (torch.tensor([[4.0, 3.0]]), torch.tensor([[1.0, -1.0]]), 5.0),
        L.EmbeddingDistillation("cosine"): (torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 1 - 0.5**0.5),
        L.MLKDBatch((1.0,)): (third, sure, (3 / 8 - 1 / 3) ** 2),
        L.MLKDClass((1.0,)): (third, sure, sum(n * (a - 1 / 9) ** 2 for n, a in of_nine) / 3),
        L.DIST(): (torch.tensor([[1.0, 3.0], [3.0, 1.0]]).log(), torch.tensor([[6.0, 4.0], [4.0, 6.0]]).log(), 4.0),
        L.RKDDistance(): (torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]]), 2 * 0.25**2 / 9),
        L.RKDAngle(): (torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [1.0], [2.0]]),
                       2 * sum(huber(a - b) for a, b in angles) / 27),
        L.SimilarityPreserving(): (torch.eye(2), torch.ones(2, 1), 0.5 * (1 - 0.5**0.5) ** 2 + 0.5 * 0.5),
        L.FitNets(): (torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]), 5.0),
        L.AttentionTransfer(): (torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), 1.0),
    }  # fmt: skip
    for loss, (student, teacher, expected) in by_hand.items():
        target = torch.zeros(student.shape[0], dtype=torch.int64)
        assert loss(student, teacher, target).item() == pytest.approx(expected, rel=1e-5, abs=1e-7), loss


# What the papers state


def test_dist_is_invariant_to_affine_maps_of_the_probabilities() -> None:
    """Also where they hardly differ, which an epsilon beside the deviations would distort."""
    p = T.softmax(-1)
    uniform = torch.full_like(p, 1 / 6)
    for share in (0.5, 1e-3):
        squeezed = (share * p + (1 - share) * uniform).log()
        assert L.DIST()(squeezed, T).item() == pytest.approx(0, abs=1e-9)
    weak = (1e-3 * p + (1 - 1e-3) * uniform).log().float()
    assert L.DIST()(weak, S.float()).item() == pytest.approx(L.DIST()(T, S).item(), rel=1e-2)
    assert L.DIST()(torch.zeros_like(S), T) == 2  # a constant is uncorrelated with everything


def test_gdkd_with_the_masses_as_weights_is_the_divergence() -> None:
    p = T.softmax(-1)
    order = T.argsort(dim=-1, descending=True)
    mass = p.gather(1, order[:, :2]).sum(-1)
    terms = []
    for place in range(3):
        weights = [0.0, 0.0, 0.0]
        weights[place] = 1.0
        terms.append(L.GDKD(2, weights, reduction="none")(S, T))
    whole = tgt.distillation_loss(S, T, reduction="none")
    torch.testing.assert_close(terms[0] + mass * terms[1] + (1 - mass) * terms[2], whole)
    torch.testing.assert_close(L.GDKD(6, (0, 1, 1))(S, T), whole.mean())  # all classes are of one group


def test_gdkd_on_the_label_alone_is_dkd() -> None:
    """With the teacher's first class in the place of the label: its binary term, and the others' among themselves."""
    label = T.argmax(-1)
    others = torch.ones_like(T, dtype=torch.bool).scatter(1, label[:, None], False)
    nckd = tgt.distillation_loss(S[others].reshape(5, 5), T[others].reshape(5, 5))
    torch.testing.assert_close(L.GDKD(1, (0, 7, 1))(S, T), nckd)


def test_wttm_and_ttm() -> None:
    """At T = 1 plain KL; TTM is distillation with a Renyi entropy of the student as a regulariser."""
    torch.testing.assert_close(L.WTTM(1.0)(S, T), tgt.distillation_loss(S, T))
    temperature = 4.0
    p, q = (T / temperature).softmax(-1), S.softmax(-1)
    ttm = L.WTTM(temperature, weighted=False, reduction="none")(S, T) - (p * p.log()).sum(-1)
    distilled = -(p * (S / temperature).log_softmax(-1)).sum(-1)
    renyi = q.pow(1 / temperature).sum(-1).log() / (1 - 1 / temperature)
    torch.testing.assert_close(ttm, temperature * distilled - (temperature - 1) * renyi)


def test_nkd_of_a_shifted_student_and_its_best_student() -> None:
    torch.testing.assert_close(L.NKD()(S + 3, T, Y), L.NKD()(S, T, Y))
    student = T.clone().requires_grad_()
    L.NKD(gamma=2.0)(student, T, torch.full((5,), -1)).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_reverse_kl_on_the_top_k_rises_to_the_whole() -> None:
    whole = tgt.distillation_loss(S, T, divergence="reverse_kl", reduction="none")
    found = [L.TopKReverseKL(k, reduction="none")(S, T) for k in range(1, 7)]
    for less, more in itertools.pairwise(found):
        assert (less <= more + 1e-12).all()
    torch.testing.assert_close(found[-1], whole)


def test_relations_do_not_see_rotations_and_scales() -> None:
    rotation = torch.linalg.qr(normal(7, 6, 6)).Q
    for loss, shift in ((L.RKDDistance(), 3.0), (L.RKDAngle(), 3.0), (L.SimilarityPreserving(), 0.0)):
        assert loss(5 * S @ rotation + shift, S).item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(loss(5 * S @ rotation + shift, T), loss(S, T))
        alike = torch.ones(3, 2, requires_grad=True)
        loss(alike, normal(8, 3, 2).float()).backward()
        assert alike.grad is not None
        assert alike.grad.isfinite().all()


def test_bild_and_margins_do_not_see_shifts() -> None:
    for loss in (L.BiLD(4), L.MarginMSE()):
        torch.testing.assert_close(loss(S + 3, T - 5), loss(S, T))
        assert loss(T + 1, T).item() == pytest.approx(0, abs=1e-12)
    apart = [[t[max(y, 0)] - t[n] for n in range(6) if n != max(y, 0)] for t, y in zip(T, Y, strict=True)]
    margins = torch.tensor(apart, dtype=torch.float64)
    torch.testing.assert_close(L.MarginMSE()(S, margins, Y), L.MarginMSE()(S, T, Y))


def test_attention_and_hints() -> None:
    torch.testing.assert_close(L.AttentionTransfer()(7 * MAPS[0], MAPS[1]), L.AttentionTransfer()(*MAPS))
    torch.manual_seed(0)
    hint = L.FitNets(nn.Conv2d(2, 3, 1)).double()
    expected = F.mse_loss(F.adaptive_avg_pool2d(hint.projection(MAPS[0]), 2), MAPS[1])  # type: ignore[misc]
    found = hint(*MAPS)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(parameter.grad is not None for parameter in hint.parameters())
    assert sorted(hint.state_dict()) == ["projection.bias", "projection.weight"]
    with pytest.raises(ShapeError, match="projection="):
        L.FitNets()(*MAPS)


def test_the_best_student_of_symmetric_cross_entropy() -> None:
    """The halves add up to a bound of both entropies; the student's direction alone wants all on one class."""
    p, q = T.softmax(-1), S.softmax(-1)
    forward, backward = (L.SymmetricCE(a, reduction="none")(S, T) for a in (0.0, 1.0))
    torch.testing.assert_close(forward, tgt.distillation_loss(S, T, reduction="none") - (p * p.log()).sum(-1))
    reverse = tgt.distillation_loss(S, T, divergence="reverse_kl", reduction="none")
    torch.testing.assert_close(backward, reverse - (q * q.log()).sum(-1))
    torch.testing.assert_close(L.SymmetricCE(reduction="none")(S, T), (forward + backward) / 2)
    torch.testing.assert_close(L.SymmetricCE()(S, T), L.SymmetricCE()(T, S))  # with halves it is symmetric
    sure = torch.where(torch.arange(6) == T.argmax(-1, keepdim=True), 40.0, 0.0).double()
    for other in (T, S):
        assert (L.SymmetricCE(1.0, reduction="none")(sure, T) < L.SymmetricCE(1.0, reduction="none")(other, T)).all()


def test_mlkd_compares_relations_alone() -> None:
    """The batch term does not see which class is which, the class term which row; each is 0 for the other's turn."""
    turn, rows = torch.tensor([3, 1, 0, 5, 4, 2]), torch.tensor([4, 2, 0, 1, 3])
    batch, classes = L.MLKDBatch(), L.MLKDClass()
    torch.testing.assert_close(batch(S[:, turn], T), batch(S, T))
    torch.testing.assert_close(classes(S[rows], T), classes(S, T))
    for loss, moved in ((batch, T[:, turn]), (classes, T[rows])):
        assert loss(moved, T).item() == pytest.approx(0, abs=1e-12)
    assert batch(T[rows], T) > 1e-3
    assert classes(T[:, turn], T) > 1e-3


def test_embeddings_of_length_one() -> None:
    """Their squared distance is twice one minus the cosine, which does not see lengths."""
    s, t = (F.normalize(x, dim=-1) for x in (S, T))
    cosine = L.EmbeddingDistillation("cosine", reduction="none")
    torch.testing.assert_close(6 * L.EmbeddingDistillation(reduction="none")(s, t), 2 * cosine(s, t))
    torch.testing.assert_close(cosine(7 * S, 0.1 * T), cosine(S, T))
    torch.testing.assert_close(L.EmbeddingDistillation("l2", reduction="none")(s, t).square(), 2 * cosine(s, t))


def test_bild_sees_the_leading_classes_alone() -> None:
    """Noise in the tail costs nothing, as long as it stays there, and masks do not change what is left."""
    order = T.argsort(dim=-1, descending=True)
    among = torch.zeros_like(T, dtype=torch.bool).scatter(1, order[:, :3], True)
    lowest = T.gather(1, order[:, 2:3])
    for noise in (0.0, -5.0, -math.inf):
        changed = torch.where(among, T, lowest - 1 + noise)
        torch.testing.assert_close(L.BiLD(3, led_by="teacher")(S, changed), L.BiLD(3, led_by="teacher")(S, T))
