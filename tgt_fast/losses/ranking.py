"""Losses of differences: between the likeliest logits of a row (BiLD), and between scores of candidates (MarginMSE)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.options import TEMPERATURES
from tgt_fast.losses.rows import RowLoss, kl, log_softmax
from tgt_fast.ops import _checks
from tgt_fast.ops.topk import TeacherTopK

_LED: Final = ("both", "teacher", "student")


class BiLD(RowLoss):
    r"""``KL(softmax(d_t / T), softmax(d_s / T))`` of the differences ``d = z_i - z_j`` between the k likeliest logits.

    Twice, and added up: for the k classes that the teacher finds likeliest, and for the student's. The pairs are
    those with i before j in the leading side's order, ``k (k - 1) / 2`` of them. Classes that either side masks are
    left out. There is no factor T**2. A teacher may be a :class:`tgt_fast.TeacherTopK` for ``led_by="teacher"``: its
    log-probabilities differ as the logits do.

    Args:
        k: how many classes, at least 2.
        temperature: T.
        led_by: "both", or one of the two parts alone, "teacher" or "student".
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Li et al., "BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation", COLING 2025;
    formula and defaults as in the official code. Evidence there: on 13 data sets, with two kinds of language models,
    ahead of KL and five other losses.

    >>> import torch, tgt_fast as tgt
    >>> teacher = torch.tensor([[3.0, 1.0, 0.0]])
    >>> tgt.losses.BiLD(k=2)(teacher + 1, teacher).item()
    0.0
    """

    records: ClassVar[bool] = True

    def __init__(self, k: int = 8, temperature: float = 3.0, *, led_by: str = "both", **options: Any) -> None:
        super().__init__(**options)
        self.k, self.temperature, self.led_by = k, temperature, led_by
        self.check()

    def check(self) -> None:
        super().check()
        _checks.integer(self.op, "k", self.k, 2, 2**15)
        _checks.number(self.op, "temperature", self.temperature, *TEMPERATURES)
        _checks.choice(self.op, "led_by", self.led_by, _LED)

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        if isinstance(teacher, TeacherTopK):
            return self._of_record(student, teacher)
        loss = torch.zeros_like(weights)
        for name, leading in (("teacher", teacher), ("student", student)):
            if self.led_by in ("both", name):
                ids = leading.detach().topk(min(self.k, leading.shape[1]), dim=-1).indices
                loss = loss + self._compare(student.gather(1, ids), teacher.gather(1, ids))
        return loss

    def _of_record(self, student: Tensor, record: TeacherTopK) -> Tensor:
        if self.led_by != "teacher":
            raise ArgumentError(
                f"{self.op}: led_by is {self.led_by!r}, but a record does not know the classes that the student finds "
                "likeliest; pass led_by='teacher'"
            )
        if record.num_classes != student.shape[1]:
            raise ShapeError(
                f"{self.op}: the student has {student.shape[1]} classes, the record's ids point into "
                f"{record.num_classes}"
            )
        if self.k > record.k and record.k < record.num_classes:
            raise ArgumentError(f"{self.op}: k is {self.k}, but the record lists {record.k} classes")
        log_probs, place = record.log_probs.to(student.dtype).topk(min(self.k, record.k), dim=-1)
        ids = torch.where(log_probs > -math.inf, record.ids.to(torch.int64).gather(1, place), 0)
        # Those of logits, times the temperature at which they were taken: what else there is cancels in a difference.
        return self._compare(
            student.gather(1, ids.clamp(0, student.shape[1] - 1)), log_probs * float(record.temperature)
        )

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        first, second = torch.triu_indices(student.shape[1], student.shape[1], 1, device=student.device)
        masked = (student == -math.inf) | (teacher == -math.inf)
        among = ~(masked[:, first] | masked[:, second])
        ours, theirs = (torch.where(masked, 0.0, x) / self.temperature for x in (student, teacher))
        return kl(
            log_softmax(theirs[:, first] - theirs[:, second], among),
            log_softmax(ours[:, first] - ours[:, second], among),
        )

    def shown(self) -> dict[str, Any]:
        more = {} if self.led_by == "both" else {"led_by": self.led_by}
        return {"k": self.k, "temperature": self.temperature, **more, **super().shown()}


class MarginMSE(RowLoss):
    r"""``mean_n ((s_y - s_n) - (t_y - t_n))**2`` over the negatives n of a row of scores, y its positive.

    Student and teacher give the scores ``(..., C)`` of C candidates to a query. ``target`` says which one is the
    positive; without one (or with ``unlabeled_index``) it is the first. A candidate that is -inf on either side is left
    out. Of the teacher the margins ``t_y - t_n`` may be given instead, ``(..., C - 1)`` in the order of the negatives.

    Args:
        reduction, ignore_index, unlabeled_index, count_group: see :class:`tgt_fast.losses.RowLoss`.

    Source: Hofstatter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", 2020; as in sentence-transformers, whose mean is over queries and negatives alike. Evidence there is
    of passage ranking, where students learn from cross-encoders whose scores have other ranges than their own.

    >>> import torch, tgt_fast as tgt
    >>> tgt.losses.MarginMSE()(torch.tensor([[3.0, 1.0]]), torch.tensor([[9.0, 5.0]])).item()
    4.0
    """

    labels: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.check()

    def check_widths(self, student: Tensor, teacher: Tensor) -> None:
        candidates = student.shape[-1]
        if candidates < 2 or teacher.shape[-1] not in (candidates, candidates - 1):
            raise ShapeError(
                f"{self.op}: scores of C >= 2 candidates need as many of the teacher, or C - 1 margins; got "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            )

    def cost(self, student: Tensor, teacher: Any, labels: Tensor | None, weights: Tensor) -> Tensor:
        count, candidates = student.shape
        positive = torch.zeros(count, dtype=torch.int64, device=student.device)
        if labels is not None:
            positive = labels.clamp(min=0)
        place = positive[:, None]
        # The negatives in their order, with the positive's place closed.
        negatives = torch.arange(candidates - 1, device=student.device).expand(count, -1)
        negatives = negatives + (negatives >= place)
        ours = student.gather(1, negatives)
        live = ours != -math.inf
        margins = student.gather(1, place) - torch.where(live, ours, 0.0)
        if teacher.shape[1] == candidates:
            theirs = teacher.gather(1, negatives)
            live = live & (theirs != -math.inf)
            theirs = teacher.gather(1, place) - torch.where(live, theirs, 0.0)
        else:
            theirs = teacher
        errors = torch.where(live, margins - theirs, 0.0).square()
        return errors.sum(-1) / live.sum(-1).clamp(min=1)
