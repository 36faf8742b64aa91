"""Losses of how the embeddings of a batch lie to each other, whatever space they are in."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tgt_fast.losses.rows import FeatureLoss


class _Relational(FeatureLoss):
    pairwise: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.check()

    def check_widths(self, student: Tensor, teacher: Tensor) -> None:
        """Each side is compared with itself, so that any two widths go together."""


class RKDDistance(_Relational):
    r"""``mean_ij huber(|s_i - s_j| / m_s, |t_i - t_j| / m_t)``, m the mean of a side's distances above 0.

    Over all pairs of the rows of the call, embeddings ``(..., D)`` of any two widths; Huber's loss with its bend at 1.
    A row's loss is the mean over its pairs.

    Args:
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019; as in the official code, which weighs it with
    25. Invariant to rotations, shifts and scales of either side. Evidence, from the comparison of Tian et al.
    ("Contrastive Representation Distillation", ICLR 2020) on CIFAR-100, VGG13 to VGG8: 70.4 % without a teacher, 71.5 %
    with distances and angles, 73.0 % with KL, which it stands beside.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.RKDDistance()(2 * torch.eye(3), torch.eye(3)).item()
    0.0
    """

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        pairs = weights[:, None] * weights
        apart = F.smooth_l1_loss(_distances(student, pairs), _distances(teacher, pairs), reduction="none")
        return apart @ weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _distances(x: Tensor, pairs: Tensor) -> Tensor:
    """Those between rows, in units of their mean.  [N, D] -> [N, N]"""
    found = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    there = pairs * (found.detach() > 0)
    total = there.sum()
    mean = (there * found).sum() / torch.where(total > 0, total, 1.0)
    return found / torch.where(total > 0, mean, 1.0)


class RKDAngle(_Relational):
    r"""``mean_ijk huber(cos(s_j - s_i, s_k - s_i), cos(t_j - t_i, t_k - t_i))``.

    The angles at a row between two others, for all triples of the rows of the call: memory for ``N**3`` cosines and
    ``N**2 D`` differences. Embeddings ``(..., D)`` of any two widths. A row's loss is the mean of the angles at it.

    Args:
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019; as in the official code, which weighs it with
    50. Invariant to rotations, shifts and scales of either side. Evidence: see :class:`RKDDistance`.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.RKDAngle()(torch.eye(3), torch.eye(3)).item()
    0.0
    """

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        apart = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
        share = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        return apart @ share @ share


def _cosines(x: Tensor) -> Tensor:
    """[N, D] -> [N, N, N]; 0 for a direction of no length."""
    apart = x[None] - x[:, None]  # [i, j] is x_j - x_i
    length = torch.linalg.vector_norm(apart, dim=-1, keepdim=True)
    unit = apart / torch.where(length.detach() > 0, length, 1.0)
    return unit @ unit.transpose(1, 2)


class SimilarityPreserving(_Relational):
    r"""``mean_ij (g_s[i, j] - g_t[i, j])**2``, g the rows of ``A @ A.T``, each divided by its length.

    Over all pairs of the rows of the call, embeddings A ``(..., D)`` of any two widths; feature maps are flattened to
    them first. A row's loss is the mean over its pairs.

    Args:
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, who weigh it with 3000. Invariant
    to rotations and scales of either side. Evidence, from the comparison of Tian et al. ("Contrastive Representation
    Distillation", ICLR 2020) on CIFAR-100, VGG13 to VGG8: 70.4 % without a teacher, 72.7 % with it, 73.0 % with KL.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.SimilarityPreserving()(2 * torch.eye(3), torch.eye(3)).item()
    0.0
    """

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        apart = (_similarities(student) - _similarities(teacher)).square()
        return apart @ weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _similarities(x: Tensor) -> Tensor:
    found = x @ x.T
    length = torch.linalg.vector_norm(found, dim=1, keepdim=True)
    return found / torch.where(length.detach() > 0, length, 1.0)
