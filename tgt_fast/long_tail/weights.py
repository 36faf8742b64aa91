"""Weights of classes by their effective number of examples, from the start or from some step on."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.long_tail.counts import checked_counts
from tgt_fast.ops import _checks

_NEVER: Final = 1 << 62


def effective_numbers(class_counts: Any, beta: float = 0.9999) -> Tensor:
    r"""``E_c = (1 - beta**n_c) / (1 - beta)``, float64 (C,): examples that overlap count less than once.

    ``-expm1(n log1p(beta - 1)) / (1 - beta)``, so that it is exact where beta is close to 1; 1 for beta = 0, and its
    limit n for beta = 1.

    Source: Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019, equation 2.

    Args:
        class_counts: (C,) examples of each class, >= 0: a tensor, an array or a list. The classes of none have 0.
        beta: in [0, 1].

    Raises:
        ArgumentError: counts that are none, or beta outside its range.

    >>> import tgt_fast as tgt
    >>> tgt.long_tail.effective_numbers([2, 1, 0], beta=0.5).tolist()
    [1.5, 1.0, 0.0]
    """
    counts = checked_counts("effective_numbers", class_counts)
    beta = _checks.number("effective_numbers", "beta", beta, 0, 1)
    if beta == 1:
        return counts
    log = torch.tensor(beta - 1, dtype=torch.float64, device="cpu").log1p()
    found = -torch.expm1(counts * log) / (1 - beta)
    return torch.where(counts > 0, found, 0.0)


def effective_number_weights(class_counts: Any, beta: float = 0.9999) -> Tensor:
    r"""``w_c = (1 / E_c) * C / sum_c 1 / E_c``, float32 (C,): the inverse of :func:`effective_numbers`, C in all.

    A class of no examples has weight 0, and C is then the number of the others.

    Source: Cui et al., CVPR 2019. Evidence there: gains on long-tailed CIFAR of several imbalances, with beta chosen
    for each, and on ImageNet and iNaturalist.

    Args:
        class_counts, beta: as for :func:`effective_numbers`; beta = 1 is the inverse frequency.

    >>> import tgt_fast as tgt
    >>> tgt.long_tail.effective_number_weights([3, 1, 0], beta=1.0).tolist()
    [0.5, 1.5, 0.0]
    """
    numbers = effective_numbers(class_counts, beta)
    present = numbers > 0
    inverse = torch.where(present, 1 / numbers, 0.0)
    return (inverse * (present.sum() / inverse.sum())).to(torch.float32)


class DeferredReweighting:
    r"""DRW: ``weights(step) = 1`` before ``start``, from there on :func:`effective_number_weights`.

    Give them to a loss as it trains: ``loss.class_weight = reweighting(step)``.

    Source: Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019, section
    3.3, where the last fifth of the epochs is weighted, with beta 0.9999. Evidence there: that of :class:`LDAMLoss`.

    Args:
        class_counts: (C,) examples of each class.
        start: >= 0, the first step, or epoch, that is weighted.
        beta: in [0, 1].

    >>> import tgt_fast as tgt
    >>> reweighting = tgt.long_tail.DeferredReweighting([3, 1], start=160, beta=1.0)
    >>> reweighting(159).tolist(), reweighting(160).tolist()
    ([1.0, 1.0], [0.5, 1.5])
    """

    def __init__(self, class_counts: Any, start: int, beta: float = 0.9999) -> None:
        self.start = _checks.integer("DeferredReweighting", "start", start, 0, _NEVER)
        self.beta = _checks.number("DeferredReweighting", "beta", beta, 0, 1)
        self._later = effective_number_weights(class_counts, beta)
        self._before = torch.ones_like(self._later)

    def __call__(self, step: int) -> Tensor:
        """The weights of a step, float32 (C,): one tensor before ``start``, and one after, not to be written to."""
        return self._later if step >= self.start else self._before

    def __repr__(self) -> str:
        return f"DeferredReweighting(classes={len(self._later)}, start={self.start}, beta={self.beta})"
