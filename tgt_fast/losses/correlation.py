"""Losses of how classes and rows of a batch go together: DIST, and the class and batch terms of MLKD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tgt_fast.kernels.options import TEMPERATURES
from tgt_fast.losses.rows import RowLoss
from tgt_fast.ops import _checks


def correlation(x: Tensor, y: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Pearson's, weighted; 0 where a side is constant, up to rounding."""
    return (_standard(x, weights, dim) * _standard(y, weights, dim)).sum(dim)


def _standard(x: Tensor, weights: Tensor, dim: int) -> Tensor:
    """``sqrt(w) (x - mean)`` of length 1, or 0."""
    total = weights.sum(dim, keepdim=True)
    mean = (weights * x).sum(dim, keepdim=True) / torch.where(total > 0, total, 1.0)
    apart = weights.sqrt() * (x - mean)
    length = torch.linalg.vector_norm(apart, dim=dim, keepdim=True)
    # Not an additive epsilon: a student at its beginning has probabilities that hardly differ, which it would distort.
    rounding = 4 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(weights.sqrt() * x, dim=dim, keepdim=True)
    flat = length.detach() <= rounding.detach()
    return torch.where(flat, 0.0 * apart, apart / torch.where(flat, 1.0, length))


class DIST(RowLoss):
    r"""``T**2 * (beta * mean_i (1 - r(p_i, q_i)) + gamma * mean_c (1 - r(p[:, c], q[:, c])))``, Pearson's r.

    With ``p = softmax(t / T)`` and ``q = softmax(s / T)`` [N, C]: the first term (inter-class) compares a row's
    classes, the second (intra-class) a class's rows, over the rows of the call that count, with their weights. The
    second is one number for the batch, which ``"none"`` gives to each row. In several processes each takes the
    batch that it has.

    Args:
        beta, gamma: weights of the two terms, >= 0.
        temperature: T.
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022; formula and defaults as in
    the official code. In the place of its epsilon of 1e-8 in the denominator a constant row or class counts as
    uncorrelated, so that the loss is invariant to positive affine maps of the probabilities however small they are.
    Evidence there: ImageNet, ResNet-34 to ResNet-18, 71.2 % with KL to 72.1 %.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.DIST()(torch.eye(3), torch.zeros(3, 3)).item()  # uncorrelated with what is constant
    2.0
    """

    pairwise: ClassVar[bool] = True

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature
        self.check()

    def check(self) -> None:
        super().check()
        _checks.number(self.op, "beta", self.beta, 0, _checks.LARGE)
        _checks.number(self.op, "gamma", self.gamma, 0, _checks.LARGE)
        _checks.number(self.op, "temperature", self.temperature, *TEMPERATURES)

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        exists = ((student > -math.inf) | (teacher > -math.inf)).to(student.dtype)
        p, q = (teacher / self.temperature).softmax(-1), (student / self.temperature).softmax(-1)
        loss = self.beta * (1 - correlation(p, q, exists, 1)).clamp(min=0)
        if self.gamma:
            there = exists * weights[:, None]
            of_classes = (1 - correlation(p, q, there, 0)).clamp(min=0)  # [C]
            seen = there.detach().amax(0) > 0
            mean = torch.where(seen, of_classes, 0.0).sum() / seen.sum().clamp(min=1)
            loss = loss + self.gamma * mean
        return self.temperature**2 * loss

    def shown(self) -> dict[str, Any]:
        return {"beta": self.beta, "gamma": self.gamma, "temperature": self.temperature, **super().shown()}


class _MLKD(RowLoss):
    pairwise: ClassVar[bool] = True

    def __init__(self, temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0), **options: Any) -> None:
        super().__init__(**options)
        self.temperatures = tuple(temperatures)
        self.check()

    def check(self) -> None:
        super().check()
        for value in self.temperatures:
            _checks.number(self.op, "a temperature", value, *TEMPERATURES)

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        loss = torch.zeros_like(weights)
        for value in self.temperatures:
            loss = loss + self.compare((teacher / value).softmax(-1), (student / value).softmax(-1), weights)
        return loss

    def compare(self, p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def shown(self) -> dict[str, Any]:
        return {"temperatures": self.temperatures, **super().shown()}


class MLKDClass(_MLKD):
    r"""``sum_T || p.T @ p - q.T @ q ||_F**2 / C``, p and q the softmaxes [N, C] of teacher and student at T.

    Which classes are likely together, over the rows of the call: one number, which ``"none"`` gives to each row.
    Weights enter as ``p.T @ diag(w) @ p``. It is a sum over rows before it is squared, so it grows with the batch's
    square.

    Args:
        temperatures: each T.
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023; the class term of the official code, with its
    temperatures. The official code also masks rows by the teacher's confidence: ``weight`` says which rows count here.
    Evidence, of all of its terms on two views of each image: CIFAR-100, ResNet32x4 to ResNet8x4, 73.3 % with KL to
    77.1 %.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.MLKDClass()(torch.eye(3), torch.eye(3)).item()
    0.0
    """

    def compare(self, p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
        w = weights[:, None]
        apart = p.T @ (w * p) - q.T @ (w * q)
        return (apart.square().sum() / p.shape[1]).expand(p.shape[0])


class MLKDBatch(_MLKD):
    r"""``sum_T || p @ p.T - q @ q.T ||_F**2 / N``, p and q the softmaxes [N, C] of teacher and student at T.

    How alike the rows of the call are; a row's loss is its row's part, ``sum_j w_j (p_i . p_j - q_i . q_j)**2``.

    Args:
        temperatures: each T.
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023; the batch term of the official code. Evidence:
    that of :class:`MLKDClass`, of all terms together.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.MLKDBatch()(torch.eye(3), torch.eye(3)).item()
    0.0
    """

    def compare(self, p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
        return (p @ p.T - q @ q.T).square() @ weights
