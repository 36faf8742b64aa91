"""LDAM: a margin a class that grows as its examples get fewer, and the classifier of cosines it is made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast.long_tail.counts import checked_counts
from tgt_fast.long_tail.rows import ClassVector, LongTailLoss, refuse_shares
from tgt_fast.ops import _checks


class LDAMLoss(LongTailLoss):
    r"""Mean over labelled rows of ``CE(scale * z', y)``, where ``z'_y = z_y - m_y`` and else ``z'_c = z_c``::

        m_c = max_margin * n_c**(-1/4) / max_c n_c**(-1/4)

    It is meant for the logits of a :class:`CosineClassifier`, which lie in [-1, 1]; at test time their argmax is taken
    as it is. A class of no examples has the largest margin. With :class:`DeferredReweighting` it is LDAM-DRW.

    Source: Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019,
    equations 11 and 12; the scale is that of their code. Evidence there, with DRW: CIFAR-10-LT of imbalance 100, an
    error of 23.0 %.

    Args:
        class_counts: (C,) training examples of each class.
        max_margin: >= 0, the margin of the rarest class.
        scale: > 0.
        class_weight, label_smoothing, reduction, ignore_index, unlabeled_index: as for
            :class:`tgt_fast.long_tail.LogitAdjustmentLoss`.

    Raises:
        ArgumentError: an option outside its range. DTypeError: shares of the classes as a target.

    >>> import torch, tgt_fast as tgt
    >>> loss = tgt.long_tail.LDAMLoss([16, 1], scale=1.0)
    >>> loss.margins.tolist()
    [0.25, 0.5]
    """

    def __init__(
        self,
        class_counts: Any,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        unlabeled_index: int = -1,
    ) -> None:
        counts = checked_counts("LDAMLoss", class_counts)
        super().__init__(len(counts), class_weight, label_smoothing, reduction, ignore_index, unlabeled_index)
        self.max_margin = _checks.number(self.op, "max_margin", max_margin, 0, 1e30)
        self.scale = _checks.number(self.op, "scale", scale, 0, 1e30, open_low=True)
        rarest = counts[counts > 0].min()
        self._margins = ClassVector(self.max_margin * (rarest / counts.clamp(min=rarest)) ** 0.25)

    @property
    def margins(self) -> Tensor:
        """m, float64 (C,)."""
        return self._margins.values

    def adjusted(self, logits: Tensor, target: Tensor) -> Tensor:
        refuse_shares(self.op, target)
        margin = self._margins.on(logits)[target][:, None]
        return self.scale * logits.scatter_add(1, target[:, None], -margin)

    def extra_repr(self) -> str:
        return f"classes={self.classes}, max_margin={self.max_margin:g}, scale={self.scale:g}"


class CosineClassifier(nn.Module):
    r"""``z_c = <x / ||x||, w_c / ||w_c||>``, in [-1, 1]: a linear layer of normalised features and weights.

    Source: that of LDAM, Cao et al., NeurIPS 2019, whose code normalises both; the features' norm and the weights' then
    tell nothing of how often a class comes.

    Args:
        in_features, out_features: as of ``nn.Linear``; there is no bias.

    Raises:
        ArgumentError: sizes that are none.

    >>> import torch, tgt_fast as tgt
    >>> head = tgt.long_tail.CosineClassifier(4, 3)
    >>> bool((head(100 * torch.randn(8, 4)).abs() <= 1.0001).all())
    True
    """

    def __init__(self, in_features: int, out_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features = _checks.integer("CosineClassifier", "in_features", in_features, 1, 1 << 31)
        self.out_features = _checks.integer("CosineClassifier", "out_features", out_features, 1, 1 << 31)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions that are uniform over the sphere."""
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
