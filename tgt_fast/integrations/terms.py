"""A loss and its soft and hard terms, which add up to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor

from tgt_fast.errors import ShapeError
from tgt_fast.kernels.options import DistillStats
from tgt_fast.losses import DistillationLoss, LinearDistillationLoss
from tgt_fast.losses.distill import FORMS
from tgt_fast.ops._heads import adapters_seen_to
from tgt_fast.ops.topk import TeacherTopK

IGNORED: Final = -100  # the label that the frameworks' own counts leave out
Terms = tuple[Tensor, dict[str, Tensor]]  # the loss, and its terms, detached
_HARD_ALONE: Final = {"soft_weight": 0.0}


class Projection(NamedTuple):
    """The factor and bound between the product of hidden states and head, and the logits of a model."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Said:
    """Outputs of a teacher for a batch: logits or a record of them, or hidden states and the head that makes them."""

    logits: Tensor | TeacherTopK | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    projection: Projection = Projection()  # noqa: RUF009, it cannot be changed


def logits_terms(
    loss: DistillationLoss, logits: Tensor, teacher: Tensor | TeacherTopK, target: Tensor | None, count: Tensor | None
) -> Terms:
    """Of logits (..., C) and one label a row, or one distribution."""
    if target is None:
        return _split(cast(Tensor, loss.soft(logits, teacher, normalizer=count)), None, loss)
    _check_rows("logits", logits, target)
    hard = None
    if _has_both(loss):
        with torch.no_grad():  # before the loss, which may write over the logits
            settings = {**loss._settings, **_HARD_ALONE}
            hard = loss._call(logits, teacher, target, None, count, settings)
    return _split(cast(Tensor, loss(logits, teacher, target, normalizer=count)), cast("Tensor | None", hard), loss)


def linear_terms(
    loss: LinearDistillationLoss,
    settings: dict[str, Any],
    head: tuple[Tensor, Tensor, Tensor | None],  # hidden states (..., H), weight, bias
    said: Said,
    target: Tensor,
    count: Tensor | None,
) -> Terms:
    """Of hidden states and heads, with these settings of the loss."""
    hidden, weight, bias = head
    _check_rows("hidden states", hidden, target)
    teacher = [None if part is None else part.to(hidden.device) for part in (said.hidden, said.weight, said.bias)]

    def call(**changed: Any) -> Any:
        with adapters_seen_to():  # the weights have theirs in them
            return loss._call(
                hidden, weight, *teacher[:2], target, student_bias=bias, teacher_bias=teacher[2],
                teacher_logits=said.logits, normalizer=count, **{**settings, **changed},
            )  # fmt: skip

    if not _has_both(loss):
        return _split(call(), None, loss)
    record = isinstance(said.logits, TeacherTopK)
    if settings["divergence"] != "forward_kl" or record or loss.vocab_map is not None or _is_adjusted(settings):
        with torch.no_grad():
            hard = call(**_HARD_ALONE)
        return _split(call(), hard, loss)
    whole, stats = _with_stats(loss, call)
    counts = target != IGNORED
    rows = counts.sum() if count is None else count
    kl = torch.where(counts, stats.kl.double(), 0.0).sum() / rows
    soft = settings["soft_weight"] * settings["temperature"] ** 2 * kl
    return _split(whole, whole.detach() - soft, loss)


def _is_adjusted(settings: dict[str, Any]) -> bool:
    """True if the soft term is not a number times the KL of the statistics, with one number for all rows."""
    by_row = any(isinstance(settings[name], Tensor) for name in ("temperature", "teacher_temperature"))
    return by_row or any(settings[name] for name in FORMS)


def _with_stats(loss: LinearDistillationLoss, call: Any) -> tuple[Tensor, DistillStats]:
    """The loss and what its pass also knows, whatever the module's own setting."""
    loss.return_stats = True
    try:
        made: tuple[Tensor, DistillStats] = call()
        return made
    finally:
        loss.return_stats = False


def _has_both(loss: DistillationLoss | LinearDistillationLoss) -> bool:
    return bool(loss.hard_weight > 0 and loss.soft_weight > 0)


def _split(whole: Tensor, hard: Tensor | None, loss: DistillationLoss | LinearDistillationLoss) -> Terms:
    value = whole.detach()
    if hard is None:
        hard = value if loss.soft_weight == 0 else torch.zeros_like(value)
    return whole, {"soft": value - hard.detach(), "hard": hard.detach()}


def _check_rows(what: str, rows: Tensor, target: Tensor) -> None:
    if rows.shape[: target.ndim] != target.shape and rows.shape != target.shape:
        raise ShapeError(f"the student's {what} {tuple(rows.shape)} do not fit the labels {tuple(target.shape)}")
