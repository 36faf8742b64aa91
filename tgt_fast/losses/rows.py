"""What the losses beside the fused ones share: rows that count, what is masked in them, and their reduction.

They are written in PyTorch's own operations. A loss says what a row costs; which rows count, their weights, their
number and the precision are settled here, by the conventions of :func:`tgt_fast.distillation_loss`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.calls import is_soft
from tgt_fast.kernels.linear_call import row_weights
from tgt_fast.kernels.options import REDUCTIONS, DistillOptions, LinearTensors
from tgt_fast.ops import _checks
from tgt_fast.ops._distill_arguments import flat_labels, mask_of
from tgt_fast.ops.counts import counting_group, over_processes
from tgt_fast.ops.topk import TeacherTopK


class RowLoss(nn.Module):
    r"""``sum_i w_i loss_i / sum_i w_i``, for a ``loss_i`` that a subclass states.

    Args:
        reduction: ``"mean"`` divides by the weights of the rows that count (their number, without weights); ``"sum"``;
            ``"none"`` returns a loss a row, 0 for dropped rows.
        ignore_index: the label of rows that do not count.
        unlabeled_index: the label of rows that have none.
        count_group: None; or "world", or a process group, whose processes count the divisor of ``"mean"`` together, as
            for :func:`tgt_fast.distillation_loss`.

    A row that does not count (``ignore_index``, weight 0) gives loss 0 and gradient 0 whatever it holds. Of logits, a
    class that is -inf on both sides does not exist; a row that holds NaN or +inf, or nothing but -inf, gives NaN.
    Arithmetic and loss are float32, float64 where an input is, also under autocast. Gradients go to both sides.
    """

    pairwise: ClassVar[bool] = False  # a row's loss depends on the rows beside it
    maps: ClassVar[bool] = False  # a row is all that lies behind the first dimension, not the last one alone
    logits: ClassVar[bool] = True  # the last dimension holds classes, which labels name
    records: ClassVar[bool] = False  # a TeacherTopK may stand in the place of the teacher's logits
    labels: ClassVar[bool] = False  # target says more than which rows count

    def __init__(
        self, *, reduction: str = "mean", ignore_index: int = -100, unlabeled_index: int = -1, count_group: Any = None
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index, self.unlabeled_index = ignore_index, unlabeled_index
        self.count_group = count_group

    @property
    def op(self) -> str:
        return type(self).__name__

    def check(self) -> None:
        """That the options are in their ranges; at construction and, as they may be changed, at each call.

        Raises:
            ArgumentError: one is not.
        """
        _checks.choice(self.op, "reduction", self.reduction, REDUCTIONS)
        for name in ("ignore_index", "unlabeled_index"):
            _checks.integer(self.op, name, getattr(self, name), -(2**63), 2**63)
        group = counting_group(self.op, self.count_group)
        if group is not None and self.reduction != "mean":
            raise ArgumentError(
                f"{self.op}: count_group counts the divisor of 'mean', but reduction is {self.reduction!r}"
            )

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        """A loss a row, without its weight.

        Args:
            student, teacher: [N, ...] of one wide dtype, zeros in rows that do not count; or a record.
            labels: [N] int64, -1 where there is none; or None.
            weights: [N], 0 for rows that do not count.
        """
        raise NotImplementedError

    def prepare(self, student: Tensor) -> Tensor:
        """The student's side as it is compared, such as projected to the teacher's width."""
        return student

    def forward(
        self,
        student: Tensor,  # [..., C]
        teacher: Any,  # [..., C]
        target: Tensor | None = None,  # [...]
        *,
        weight: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            student, teacher: what is compared; see the loss.
            target: labels, of which ``ignore_index`` drops a row.
            weight: non-negative, not differentiable; 0 drops a row.
            normalizer: a number or 0-d tensor that replaces the divisor of ``"mean"``.
        """
        losses, weights = self.rows(student, teacher, target, weight=weight)
        if normalizer is not None and self.reduction != "mean":
            raise ArgumentError(
                f"{self.op}: normalizer replaces the divisor of 'mean', but reduction is {self.reduction!r}"
            )
        if self.reduction == "none":
            return (losses * weights).reshape(self._shape(student))
        total = (losses * weights).sum()
        if self.reduction == "sum":
            return total
        divisor: Any = normalizer
        if divisor is None:
            divisor = weights.sum()
            group = counting_group(self.op, self.count_group)
            if group is not None:
                (divisor,) = over_processes(group, divisor.double())
        elif isinstance(divisor, Tensor):
            divisor = _checks.real(self.op, "normalizer", divisor)
            _checks.finite_from(self.op, "normalizer", divisor, 0)
        else:
            divisor = _checks.number(self.op, "normalizer", divisor, 0, _checks.LARGE)
        divisor = torch.as_tensor(divisor, dtype=total.dtype, device=total.device)
        if divisor.dim():
            raise ShapeError(f"{self.op}: normalizer must be a number or a 0-d tensor, got {tuple(divisor.shape)}")
        nothing = divisor == 0
        return torch.where(nothing, 0.0, total / torch.where(nothing, 1.0, divisor))

    def rows(
        self, student: Tensor, teacher: Any, target: Tensor | None = None, *, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` reduces: a loss a row without its weight, and the weights, 0 where a row is dropped.

        Returns:
            Two tensors [N], the rows one after the other.
        """
        self.check()
        student = self.prepare(_checks.floating(self.op, "student", student))
        record = isinstance(teacher, TeacherTopK)
        if record and not self.records:
            raise ArgumentError(f"{self.op}: it needs the teacher's {'logits' if self.logits else 'features'}, got a "
                                "top-k record")  # fmt: skip
        theirs = _checks.floating(self.op, "teacher", teacher.log_probs if record else teacher)
        shape = self._check_shapes(student, theirs, record)
        _checks.same_device(self.op, "student", student, "teacher", theirs)
        wide = torch.float64 if torch.float64 in (student.dtype, theirs.dtype) else torch.float32
        kept = 1 if self.maps else student.dim() - 1
        count = math.prod(shape)
        ours = student.reshape(count, *student.shape[kept:]).to(wide)
        labels, weights = self._weights(student, target, weight, shape)
        weights = weights.to(wide)
        counted = weights > 0
        if not count:
            return ours.flatten(1).sum(-1), weights
        with torch.autocast(student.device.type, enabled=False):
            ours = self._clean(ours, counted)
            if record:
                others: Any = _flat_record(teacher, count)
            else:
                others = self._clean(theirs.reshape(count, *theirs.shape[kept:]).to(wide), counted)
            losses = self.cost(ours, others, labels, weights)
        return torch.where(counted, losses, 0.0), weights

    def _shape(self, student: Tensor) -> torch.Size:
        return student.shape[:1] if self.maps else student.shape[:-1]

    def _check_shapes(self, student: Tensor, teacher: Tensor, record: bool) -> tuple[int, ...]:
        if min(student.dim(), teacher.dim()) < (2 if self.maps else 1):
            raise ShapeError(
                f"{self.op}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have a dimension "
                f"of {'rows, and more' if self.maps else 'what is compared, the last'}"
            )
        shape = tuple(self._shape(student))
        if shape != tuple(self._shape(teacher)):
            raise ShapeError(
                f"{self.op}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} do not have the same "
                "rows"
            )
        if student.shape[-1] == 0:
            raise ShapeError(f"{self.op}: nothing to compare in student {tuple(student.shape)}")
        if not record:
            self.check_widths(student, teacher)
        return shape

    def check_widths(self, student: Tensor, teacher: Tensor) -> None:
        """That what a row holds fits together. Raises ShapeError."""
        if student.shape != teacher.shape:
            raise ShapeError(f"{self.op}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ")

    def _weights(
        self, student: Tensor, target: Tensor | None, weight: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor | None, Tensor]:
        """Labels [N] of those that need them, and the weights of the rows [N]."""
        options = DistillOptions(
            hard_weight=1.0, ignore_index=self.ignore_index, unlabeled_index=self.unlabeled_index
        )  # labels are looked at
        classes = student.shape[-1] if self.logits else 2**62
        labels = None
        if target is not None:
            target = _checks.real(self.op, "target", target)
            if is_soft(target) and target.dim() == student.dim() and not self.labels:
                target = None  # shares of the classes, which drop no row
        if target is not None:
            _checks.integers(self.op, "target", target, "integer class indices")
            labels = flat_labels(self._spread("target", target, shape, student))
        if weight is not None:
            weight = self._spread("weight", _checks.real(self.op, "weight", weight), shape, student).reshape(-1)
        if _checks.on_plain_cpu(student):
            _checks.check_row_values(self.op, classes, labels if self.logits else None, weight, options)
        if labels is not None and not (self.logits and self.labels):
            labels, options = mask_of(labels, options)
        count = math.prod(shape)
        nothing = student.detach().new_empty(count, 0)
        tensors = LinearTensors(nothing, nothing, None, nothing, None, None, target=labels, sample_weight=weight)
        weights = row_weights(tensors, labels, classes, None, options)
        if weights is None:
            weights = torch.ones(count, dtype=torch.float64, device=student.device)
        if labels is None or not self.labels:
            return None, weights
        return torch.where((labels >= 0) & (labels < classes), labels, -1), weights

    def _spread(self, name: str, tensor: Tensor, shape: tuple[int, ...], student: Tensor) -> Tensor:
        """A number an example for all of its rows, where there is not one a row."""
        _checks.same_device(self.op, name, tensor, "student", student)
        if tuple(tensor.shape) == shape:
            return tensor
        if not tensor.dim() or tuple(tensor.shape) != shape[: tensor.dim()]:
            raise ShapeError(f"{self.op}: {name} {tuple(tensor.shape)} does not match the rows {shape}")
        return tensor.reshape(*tensor.shape, *(1,) * (len(shape) - tensor.dim())).expand(shape)

    def _clean(self, x: Tensor, counted: Tensor) -> Tensor:
        beside = (-1, *(1,) * (x.dim() - 1))
        x = torch.where(counted.reshape(beside), x, 0.0)
        if self.logits:  # a row that is no distribution is NaN throughout, whatever a mask later hides
            x = torch.where(x.detach().amax(-1, keepdim=True).isfinite(), x, math.nan)
        return x

    def shown(self) -> dict[str, Any]:
        """The options that ``repr`` shows."""
        usual: dict[str, Any] = {
            "reduction": "mean", "ignore_index": -100, "unlabeled_index": -1, "count_group": None
        }  # fmt: skip
        return {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.shown().items())


class FeatureLoss(RowLoss):
    """A loss of embeddings or feature maps, of which labels say nothing but which rows count."""

    logits: ClassVar[bool] = False


def _flat_record(record: TeacherTopK, count: int) -> TeacherTopK:
    rest = record.tail_log_prob
    return TeacherTopK(
        record.ids.reshape(count, record.k), record.log_probs.reshape(count, record.k),
        None if rest is None else rest.reshape(count), record.temperature, record.num_classes, record.tail,
    )  # fmt: skip


# Of logarithms of probabilities, along the last dimension, where some are -inf


def log_softmax(x: Tensor, among: Tensor | None = None) -> Tensor:
    """``log softmax`` among some of the classes, -inf for the others; all -inf where there is none."""
    if among is None:
        return x.log_softmax(-1)
    x = torch.where(among, x, -math.inf)
    nothing = x.detach().amax(-1, keepdim=True) == -math.inf
    return torch.where(among & ~nothing, torch.where(nothing, 0.0, x).log_softmax(-1), -math.inf)


def log_mass(x: Tensor, among: Tensor) -> Tensor:
    """The log-sum-exp of some of the classes, -inf where there is none.  [N, C] -> [N]"""
    x = torch.where(among, x, -math.inf)
    nothing = x.detach().amax(-1, keepdim=True) == -math.inf
    return torch.where(nothing[..., 0], -math.inf, torch.where(nothing, 0.0, x).logsumexp(-1))


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum p (log p - log q)`` with 0 log 0 = 0, +inf without a gradient where q lacks what p has.  [N, C] -> [N]"""
    return _expected(log_p, log_q, log_p - log_q)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``-sum p log q``, likewise."""
    return _expected(log_p, log_q, -log_q)


def _expected(log_p: Tensor, log_q: Tensor, value: Tensor) -> Tensor:
    has, lacks = log_p > -math.inf, log_q == -math.inf
    missing = (has & lacks).any(-1)
    # NaN is not above -inf, but its probability is NaN, too, and goes through the product.
    row = (log_p.exp() * torch.where(has & ~lacks, value, 0.0)).sum(-1)
    return torch.where(missing, math.inf, row)
