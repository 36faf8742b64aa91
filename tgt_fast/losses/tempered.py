"""Losses between whole distributions of a row: WTTM, the symmetric cross-entropy, reverse KL on the student's top k."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.options import TEMPERATURES
from tgt_fast.losses.rows import RowLoss, cross_entropy, kl, log_mass, log_softmax
from tgt_fast.ops import _checks

_TAILS: Final = ("bucket", "renormalize")


class WTTM(RowLoss):
    r"""``u * KL(p**l / u, q)``, ``u = sum_c p_c**l``, ``l = 1 / T``, p and q the softmaxes at temperature 1.

    The teacher alone is tempered. u, the row's weight, is large where the teacher is unsure: 1 for one that is certain,
    and up to ``C**(1 - l)``. There is no factor T**2.

    Args:
        temperature: T >= 1 in the paper; here any that :func:`tgt_fast.distillation_loss` takes.
        weighted: False leaves u out of the product (TTM).
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024; the formula of
    the official code. TTM is plain distillation, and a Renyi entropy of the student as a regulariser:
    ``CE(p~, q) = T * CE(p~, q~) - (T - 1) * H_l(q)`` with p~ and q~ at temperature T. Evidence there: ImageNet,
    ResNet-34 to ResNet-18, 70.7 % with KL to 72.2 %; CIFAR-100, ResNet32x4 to ResNet8x4, 73.3 % to 76.1 %.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.WTTM(temperature=2.0)(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    def __init__(self, temperature: float = 4.0, *, weighted: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.temperature, self.weighted = temperature, weighted
        self.check()

    def check(self) -> None:
        super().check()
        _checks.number(self.op, "temperature", self.temperature, *TEMPERATURES)
        _checks.flag(self.op, "weighted", self.weighted)

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        powers = teacher.log_softmax(-1) / self.temperature
        loss = kl(powers.log_softmax(-1), student.log_softmax(-1))
        return loss * powers.logsumexp(-1).exp() if self.weighted else loss

    def shown(self) -> dict[str, Any]:
        more = {} if self.weighted else {"weighted": False}
        return {"temperature": self.temperature, **more, **super().shown()}


class SymmetricCE(RowLoss):
    r"""``T**2 * ((1 - a) * CE(p, q) + a * CE(q, p))``, ``CE(p, q) = -sum p log q``, p and q at temperature T.

    Args:
        alpha: a in [0, 1], the share of the direction in which the student is the distribution.
        temperature: T.
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Dobler et al., "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation", CVPR 2023, whose halves
    are the default. Its minimum in q is not p: ``CE(q, p)`` alone wants all mass on the teacher's likeliest class.
    Evidence there is of adaptation at test time, towards a mean teacher, not of distillation.

    >>> import torch, tgt_fast as tgt
    >>> loss = tgt.losses.SymmetricCE()(torch.zeros(1, 2), torch.zeros(1, 2))
    >>> round(loss.item(), 4)  # log(2)
    0.6931
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.alpha, self.temperature = alpha, temperature
        self.check()

    def check(self) -> None:
        super().check()
        _checks.number(self.op, "alpha", self.alpha, 0, 1)
        _checks.number(self.op, "temperature", self.temperature, *TEMPERATURES)

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        log_p, log_q = ((x / self.temperature).log_softmax(-1) for x in (teacher, student))
        loss = torch.zeros_like(weights)
        for share, one, other in ((1 - self.alpha, log_p, log_q), (self.alpha, log_q, log_p)):
            if share:  # a direction that is off must not bring its infinities
                loss = loss + share * cross_entropy(one, other)
        return self.temperature**2 * loss

    def shown(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "temperature": self.temperature, **super().shown()}


class TopKReverseKL(RowLoss):
    r"""``T**2 * KL(q~, p~)``, q~ and p~ on the k classes that the *student* finds likeliest, at temperature T.

    With ``tail="bucket"`` the other classes are one more, on both sides: the divergence is never negative, never above
    the whole reverse KL, and that itself for ``k >= C``. With ``tail="renormalize"`` both sides are restricted to the k
    classes: what mass the student has beyond them then costs nothing, and may grow. The choice of the classes has
    no gradient.

    Args:
        k: how many classes.
        temperature: T.
        tail: "bucket" or "renormalize".
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: no paper of its own; a form that distillation of language models on their own outputs is asked for in, with
    reports of a student that loses its mass to the tail without the bucket. That the bucket keeps it below the whole is
    the data-processing inequality. Evidence: none published; no gain on this library's digits.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.TopKReverseKL(k=2)(torch.eye(3), torch.eye(3)).item()
    0.0
    """

    def __init__(self, k: int = 16, temperature: float = 1.0, *, tail: str = "bucket", **options: Any) -> None:
        super().__init__(**options)
        self.k, self.temperature, self.tail = k, temperature, tail
        self.check()

    def check(self) -> None:
        super().check()
        _checks.integer(self.op, "k", self.k, 1, 2**62)
        _checks.number(self.op, "temperature", self.temperature, *TEMPERATURES)
        _checks.choice(self.op, "tail", self.tail, _TAILS)

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        ours, theirs = student / self.temperature, teacher / self.temperature
        ids = ours.detach().topk(min(self.k, ours.shape[1]), dim=-1).indices
        if self.tail == "renormalize":
            ours, theirs = ours.gather(1, ids), theirs.gather(1, ids)
            among = ours.detach() != -math.inf
            return self.temperature**2 * kl(log_softmax(ours, among), log_softmax(theirs, among))
        rest = torch.ones_like(ours, dtype=torch.bool).scatter(1, ids, False)
        sides = []
        for x in (ours, theirs):
            log_p = x.log_softmax(-1)
            sides.append(torch.cat([log_p.gather(1, ids), log_mass(log_p, rest)[:, None]], -1))
        return self.temperature**2 * kl(*sides)

    def shown(self) -> dict[str, Any]:
        return {"k": self.k, "temperature": self.temperature, "tail": self.tail, **super().shown()}
