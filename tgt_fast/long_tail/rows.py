"""Cross-entropy of adjusted logits over the rows that count: what the losses of this package share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.ops import _checks

REDUCTIONS = ("mean", "sum", "none")


class ClassVector:
    """A number a class, kept in float64 whatever a module is cast to, and once on each device that asked for it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    def on(self, like: Tensor) -> Tensor:
        key = like.device, like.dtype
        if key not in self._there:
            self._there[key] = self.values.to(*key)
        return self._there[key]


class LongTailLoss(nn.Module):
    """The base of the losses: reductions, missing labels, weights of rows and of classes."""

    def __init__(
        self, classes: int, class_weight: Any, label_smoothing: float, reduction: str, ignore_index: int,
        unlabeled_index: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.op = type(self).__name__
        self.classes = classes
        self.reduction = _checks.choice(self.op, "reduction", reduction, REDUCTIONS)
        self.ignore_index = _checks.integer(self.op, "ignore_index", ignore_index, -(2**63), 2**63)
        self.unlabeled_index = _checks.integer(self.op, "unlabeled_index", unlabeled_index, -(2**63), 2**63)
        self.label_smoothing = _checks.number(self.op, "label_smoothing", label_smoothing, 0, 1)
        self.class_weight = class_weight

    @property
    def class_weight(self) -> Tensor | None:
        """(C,) factors of the rows of a class, or None; they count in the divisor of "mean", as PyTorch's do."""
        return None if self._class_weight is None else self._class_weight.values

    @class_weight.setter
    def class_weight(self, value: Any) -> None:
        if value is None:
            self._class_weight: ClassVector | None = None
            return
        try:
            found = torch.as_tensor(value).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"{self.op}: class_weight must be (C,) numbers, got {value!r:.200} ({error})") from None
        if found.shape != (self.classes,) or not bool((found.isfinite() & (found >= 0)).all()):
            raise ArgumentError(
                f"{self.op}: class_weight must be ({self.classes},) finite numbers >= 0, got {value!r:.200}"
            )
        self._class_weight = ClassVector(found)

    def adjusted(self, logits: Tensor, target: Tensor) -> Tensor:
        """The logits whose cross-entropy is taken, [rows, C]; ``target``: [rows] labels, or [rows, C] shares."""
        raise NotImplementedError

    def forward(
        self,
        logits: Tensor,  # [..., C]
        target: Tensor,  # [...] or [..., C]
        *,
        sample_weight: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            logits: the student's, floating point, (..., C); computed in float32 at least.
            target: (...) integer labels, of which ``ignore_index`` and ``unlabeled_index`` leave their row out; or
                (..., C) shares of the classes.
            sample_weight: (...) factors of the rows, >= 0.
            normalizer: in the place of the counted rows' total weight, for reduction "mean".

        Raises:
            ShapeError, DTypeError, ArgumentError: with the offending values; labels are looked at on a CPU alone.
        """
        logits = _checks.floating(self.op, "logits", logits)
        if logits.dim() < 1 or logits.shape[-1] != self.classes:
            raise ShapeError(f"{self.op}: logits {tuple(logits.shape)} must be (..., {self.classes}), as class_counts")
        shape, soft = logits.shape[:-1], isinstance(target, Tensor) and target.is_floating_point()
        target = _checks.floating(self.op, "target", target) if soft else _checks.integers(self.op, "target", target)
        if target.shape != (logits.shape if soft else shape):
            raise ShapeError(f"{self.op}: target {tuple(target.shape)} does not fit logits {tuple(logits.shape)}")
        rows = logits.reshape(-1, self.classes)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        target = target.reshape(-1, self.classes).to(rows.dtype) if soft else target.reshape(-1).to(torch.int64)
        weight = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
        if sample_weight is not None:
            given = _checks.real(self.op, "sample_weight", sample_weight)
            if given.shape != shape:
                raise ShapeError(f"{self.op}: sample_weight {tuple(given.shape)} must be {tuple(shape)}, one a row")
            weight = given.reshape(-1).to(rows.dtype)
        loss, weight = self._shares(rows, target, weight) if soft else self._labels(rows, target, weight)
        if self.reduction == "none":
            return loss.reshape(shape)
        if self.reduction == "sum":
            return loss.sum()
        total = weight.sum() if normalizer is None else torch.as_tensor(normalizer, device=loss.device)
        total = total.to(loss.dtype)
        return torch.where(total > 0, loss.sum() / torch.where(total > 0, total, 1.0), loss.sum() * 0)

    def term(
        self, student: Tensor, teacher: Any, target: Tensor | None = None, *, weight: Tensor | None = None
    ) -> Tensor:
        """The loss in the form of those of ``tgt_fast.losses``, as :class:`tgt_fast.Term` calls it.

        The teacher has no say, and rows without labels, such as synthetic ones, cost nothing. It divides as the hard
        term of an objective does, by the weights of all rows but those with ``ignore_index``: rows without a label
        count there, ``class_weight`` does not.
        """
        if target is None:
            return torch.zeros((), dtype=torch.promote_types(student.dtype, torch.float32), device=student.device)
        rows = torch.ones(student.shape[:-1], dtype=torch.float64, device=student.device)
        counted = rows if weight is None else weight.double()
        if not target.is_floating_point():
            counted = torch.where(target == self.ignore_index, 0.0, counted)
        return self(student, target, sample_weight=weight, normalizer=counted.sum())  # type: ignore[no-any-return]

    def _labels(self, rows: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the weight of each row."""
        counted = (target != self.ignore_index) & (target != self.unlabeled_index)
        if _checks.on_plain_cpu(target) and bool(counted.any()):
            least, most = (int(bound) for bound in target[counted].aminmax())
            if least < 0 or most >= self.classes:
                wrong = least if least < 0 else most
                raise ArgumentError(f"{self.op}: label {wrong} is not in [0, {self.classes})")
        label = torch.where(counted, target, 0).clamp(0, self.classes - 1)
        weight = torch.where(counted, weight, 0.0)
        if self._class_weight is not None:
            weight = weight * self._class_weight.on(rows)[label]
        logs = self.adjusted(rows, label).log_softmax(1)
        loss = -logs.gather(1, label[:, None]).squeeze(1)
        if self.label_smoothing:
            loss = torch.lerp(loss, -logs.mean(1), self.label_smoothing)
        return weight * torch.where(counted, loss, 0.0), weight

    def _shares(self, rows: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self._class_weight is not None or self.label_smoothing:
            raise ArgumentError(f"{self.op}: class_weight and label_smoothing serve labels, not shares of the classes")
        logs = self.adjusted(rows, target).log_softmax(1)
        return -weight * torch.where(target > 0, target * logs, 0.0).sum(1), weight


def refuse_shares(op: str, target: Tensor) -> None:
    """
    Raises:
        DTypeError: shares of the classes where there must be one label a row.
    """
    if target.is_floating_point():
        raise DTypeError(f"{op}: the label of a row has a margin; shares of the classes (mixup) have none")
