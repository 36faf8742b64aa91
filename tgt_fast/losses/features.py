"""Losses that bring the student's features to the teacher's: embeddings, hints, attention maps."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.losses.rows import FeatureLoss
from tgt_fast.ops import _checks

_DISTANCES: Final = ("mse", "l2", "cosine")


class _Projected(FeatureLoss):
    """With a module of its own, whose parameters are trained with the student's."""

    projection: nn.Module | None

    def __init__(self, projection: nn.Module | None, **options: Any) -> None:
        super().__init__(**options)
        if projection is not None and not isinstance(projection, nn.Module):
            raise ArgumentError(f"{self.op}: the projection must be a torch.nn.Module, got {type(projection).__name__}")
        self.projection = projection

    def prepare(self, student: Tensor) -> Tensor:
        if self.projection is None:
            return student
        made: Tensor = self.projection(student)
        return made


class EmbeddingDistillation(_Projected):
    r"""``mean_d (s_d - t_d)**2`` ("mse"), ``|s - t|`` ("l2") or ``1 - cos(s, t)`` ("cosine") of ``(..., D)``.

    Args:
        distance: one of the three.
        projection: None, or a module such as ``nn.Linear(64, 128)`` that brings the student's embeddings to the
            teacher's width. Its parameters go into the optimizer beside the student's (``loss.parameters()``).
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: the distances of sentence-transformers' distillation losses (Reimers and Gurevych, "Making Monolingual
    Sentence Embeddings Multilingual using Knowledge Distillation", EMNLP 2020, takes "mse"). Evidence there is of
    sentence embeddings in further languages, and of smaller encoders.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.EmbeddingDistillation("l2")(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).item()
    5.0
    """

    def __init__(self, distance: str = "mse", projection: nn.Module | None = None, **options: Any) -> None:
        super().__init__(projection, **options)
        self.distance = distance
        self.check()

    def check(self) -> None:
        super().check()
        _checks.choice(self.op, "distance", self.distance, _DISTANCES)

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        found: Tensor
        if self.distance == "mse":
            found = (student - teacher).square().mean(-1)
        elif self.distance == "l2":
            found = torch.linalg.vector_norm(student - teacher, dim=-1)
        else:
            found = 1 - (_unit(student) * _unit(teacher)).sum(-1)
        return found

    def shown(self) -> dict[str, Any]:
        return {"distance": self.distance, **super().shown()}


class _Maps(_Projected):
    maps: ClassVar[bool] = True
    channels: ClassVar[bool] = True  # both sides have as many

    def check_widths(self, student: Tensor, teacher: Tensor) -> None:
        alike = student.dim() == teacher.dim() and (not self.channels or student.shape[1] == teacher.shape[1])
        if not alike or not 2 + (not self.channels) <= student.dim() <= 5:
            raise ShapeError(
                f"{self.op}: feature maps [B, channels, ...] must fit together, got student {tuple(student.shape)} "
                f"and teacher {tuple(teacher.shape)}"
                + ("; projection= brings the student's channels to the teacher's" if self.channels else "")
            )

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        # Of two sizes the smaller: what is averaged is known, what is interpolated is not.
        size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        return self.compare(_pooled(student, size), _pooled(teacher, size))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError


class FitNets(_Maps):
    r"""``mean (r(s) - t)**2`` over what an example's feature maps hold, r a regressor that is trained along.

    Maps ``[B, channels, ...]`` of any number of dimensions up to three; a row is an example. Of two sizes the larger is
    averaged down to the smaller.

    Args:
        projection: r, None, or a module such as ``nn.Conv2d(16, 64, 1)`` that brings the student's channels to the
            teacher's. Its parameters go into the optimizer beside the student's (``loss.parameters()``).
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, with the mean over elements that later
    comparisons take in the place of half the sum. Evidence, from the comparison of Tian et al. ("Contrastive
    Representation Distillation", ICLR 2020) on CIFAR-100, VGG13 to VGG8: 70.4 % without a teacher, 71.0 % with it,
    73.0 % with KL.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.FitNets()(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)).item()
    1.0
    """

    def __init__(self, projection: nn.Module | None = None, **options: Any) -> None:
        super().__init__(projection, **options)
        self.check()

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().flatten(1).mean(-1)


class AttentionTransfer(_Maps):
    r"""``mean_x (a_s(x) - a_t(x))**2``, ``a(x)`` the mean over channels of ``|f(x)|**p``, of length 1 over places x.

    Maps ``[B, channels, ...]`` whose numbers of channels may differ; a row is an example. Of two sizes the larger is
    averaged down to the smaller.

    Args:
        p: the power, > 0.
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017; as in the official code, which
    weighs it with 1000. Invariant to scales of either side. Evidence, from the comparison of Tian et al. ("Contrastive
    Representation Distillation", ICLR 2020) on CIFAR-100, VGG13 to VGG8: 70.4 % without a teacher, 71.4 % with it,
    73.0 % with KL; between networks of different kinds it did harm.

    >>> import torch, tgt_fast as tgt
    >>> maps = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> tgt.losses.AttentionTransfer()(3 * maps, maps).item()
    0.0
    """

    channels: ClassVar[bool] = False

    def __init__(self, p: float = 2.0, **options: Any) -> None:
        super().__init__(None, **options)
        self.p = p
        self.check()

    def check(self) -> None:
        super().check()
        _checks.number(self.op, "p", self.p, 0, 64, open_low=True)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self._attention(student) - self._attention(teacher)).square().mean(-1)

    def _attention(self, maps: Tensor) -> Tensor:
        return _unit(maps.abs().pow(self.p).mean(1).flatten(1))

    def shown(self) -> dict[str, Any]:
        return {"p": self.p, **super().shown()}


def _unit(x: Tensor) -> Tensor:
    """Of length 1 along the last dimension; nothing stays nothing."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length.detach() > 0, length, 1.0)


def _pooled(maps: Tensor, size: list[int]) -> Tensor:
    if list(maps.shape[2:]) == size:
        return maps
    pools: tuple[Any, ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    made: Tensor = pools[len(size) - 1](maps, size)
    return made
