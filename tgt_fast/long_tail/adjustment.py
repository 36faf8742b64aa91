"""Logit adjustment, as a loss and after training, and balanced softmax."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.long_tail.counts import checked_counts, priors_of
from tgt_fast.long_tail.rows import ClassVector, LongTailLoss
from tgt_fast.ops import _checks

_FLOOR: Final = 1e-12  # of the authors' code: a class that was never seen is not impossible
_LARGE: Final = 1e30


def log_priors(class_counts: Any, tau: float = 1.0) -> Tensor:
    r"""``log(pi_c**tau + 1e-12)`` with ``pi_c = n_c / sum n``, float64 (C,): what logit adjustment adds, or takes away.

    As a bias of student and teacher in :func:`tgt_fast.distillation_loss` it puts the soft term between the posteriors
    of the adjusted priors.

    Args:
        class_counts: (C,) examples of each class, or their shares: a tensor, an array or a list.
        tau: in [0, 1e30], the strength.

    Raises:
        ArgumentError: counts that are none, or tau outside its range.

    >>> import tgt_fast as tgt
    >>> [round(value, 3) for value in tgt.long_tail.log_priors([3, 1, 0]).tolist()]
    [-0.288, -1.386, -27.631]
    """
    return _log_priors("log_priors", class_counts, tau)


def _log_priors(op: str, class_counts: Any, tau: float) -> Tensor:
    tau = _checks.number(op, "tau", tau, 0, _LARGE)
    return (priors_of(op, class_counts).pow(tau) + _FLOOR).log()


def post_hoc_adjustment(logits: Tensor, class_counts: Any, tau: float = 1.0, *, class_dim: int = -1) -> Tensor:
    r"""``z_c - log(pi_c**tau + 1e-12)``: the logits of a trained student, adjusted; their argmax is the prediction.

    With tau 1 and logits that are the true log posteriors it is the argmax of the class-balanced error's Bayes rule.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 9. Evidence, by the authors'
    code: CIFAR-10-LT of imbalance 100, 71.4 % balanced accuracy to 77.3 %; CIFAR-100-LT, 39.9 % to 44.1 %.

    Args:
        logits: (..., C), or with the classes in ``class_dim``; differentiable.
        class_counts, tau: as for :func:`log_priors`; the counts of the data that the student was trained on.
        class_dim: where the classes are.

    Raises:
        ShapeError: logits of another number of classes.

    >>> import torch, tgt_fast as tgt
    >>> tgt.long_tail.post_hoc_adjustment(torch.tensor([1.0, 0.5]), [9, 1]).argmax().item()
    1
    """
    op = "post_hoc_adjustment"
    logits = _checks.floating(op, "logits", logits)
    bias = _log_priors(op, class_counts, tau)
    dim = _checks.integer(op, "class_dim", class_dim, -logits.dim(), max(1, logits.dim()))
    if logits.dim() < 1 or logits.shape[dim] != len(bias):
        raise ShapeError(f"{op}: logits {tuple(logits.shape)} must have {len(bias)} classes, as class_counts")
    shape = [1] * logits.dim()
    shape[dim] = len(bias)
    return logits - bias.to(logits).reshape(shape)


class LogitAdjustmentLoss(LongTailLoss):
    r"""Mean over labelled rows of ``CE(z + log(pi**tau + 1e-12), y)``: logit adjustment as a loss.

    What it trains needs no adjustment afterwards: the argmax of ``z`` is the prediction.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10; the floor is that of their
    code. Evidence, by that code: CIFAR-10-LT of imbalance 100, 71.4 % balanced accuracy to 77.9 %; CIFAR-100-LT, 39.9 %
    to 44.1 %. It is consistent for the balanced error.

    Args:
        class_counts: (C,) training examples of each class.
        tau: in [0, 1e30]; 0 is cross-entropy.
        class_weight: None, or (C,) factors of the rows of a class, an attribute that may change from step to step.
        label_smoothing: in [0, 1].
        reduction: "mean" (over the weights of the rows that count; 0 where none does), "sum" or "none".
        ignore_index, unlabeled_index: labels whose rows are left out.

    Raises:
        ArgumentError: an option outside its range.

    >>> import torch, tgt_fast as tgt
    >>> loss = tgt.long_tail.LogitAdjustmentLoss([3, 1])
    >>> round(loss(torch.zeros(2, 2), torch.tensor([1, -1])).item(), 4)
    1.3863
    """

    def __init__(
        self,
        class_counts: Any,
        tau: float = 1.0,
        *,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        unlabeled_index: int = -1,
    ) -> None:
        bias = _log_priors("LogitAdjustmentLoss", class_counts, tau)
        super().__init__(len(bias), class_weight, label_smoothing, reduction, ignore_index, unlabeled_index)
        self.tau = float(tau)
        self._bias = ClassVector(bias)

    def adjusted(self, logits: Tensor, target: Tensor) -> Tensor:
        return logits + self._bias.on(logits)

    def extra_repr(self) -> str:
        return f"classes={self.classes}, tau={self.tau:g}"


class BalancedSoftmaxLoss(LongTailLoss):
    r"""Mean over labelled rows of ``CE(z + log n, y)``: balanced softmax.

    As a softmax does not mind a constant, it is :class:`LogitAdjustmentLoss` with tau 1 without the floor: a class of
    no examples is out of the softmax, and its label is refused (on a CPU; elsewhere the loss is infinite).

    Source: Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020, equation 4. Evidence,
    by the authors' code: ResNet-32 on CIFAR-10-LT of imbalance 200, 74.0 % to 79.8 %.

    Args:
        class_counts: (C,) training examples of each class.
        class_weight, label_smoothing, reduction, ignore_index, unlabeled_index: as for :class:`LogitAdjustmentLoss`;
            smoothing needs an example of every class.

    >>> import torch, tgt_fast as tgt
    >>> loss = tgt.long_tail.BalancedSoftmaxLoss([3, 1])
    >>> round(loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
    0.2877
    """

    def __init__(
        self,
        class_counts: Any,
        *,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        unlabeled_index: int = -1,
    ) -> None:
        counts = checked_counts("BalancedSoftmaxLoss", class_counts)
        super().__init__(len(counts), class_weight, label_smoothing, reduction, ignore_index, unlabeled_index)
        self._absent = counts == 0
        if self.label_smoothing and bool(self._absent.any()):
            raise ArgumentError(
                f"{self.op}: label_smoothing gives every class a share, class {int(self._absent.nonzero()[0])} has no "
                "examples and no probability"
            )
        self._bias = ClassVector((counts / counts.max()).log())

    def adjusted(self, logits: Tensor, target: Tensor) -> Tensor:
        if not target.is_floating_point() and _checks.on_plain_cpu(target):
            absent = self._absent[target]
            if bool(absent.any()):
                raise ArgumentError(
                    f"{self.op}: label {int(target[absent][0])} is of a class that has no examples by class_counts"
                )
        return logits + self._bias.on(logits)

    def extra_repr(self) -> str:
        return f"classes={self.classes}"
